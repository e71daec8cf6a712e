"""Texts of users as token ids that are text and nothing else.

An instruction may hold ``<|im_end|>``, ``[unused10]`` or ``<male>``. To the model these must be letters, not the end of
a turn or a label: a tokenizer on its own takes such strings for its special tokens and marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any


def encode_plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts of users; no id is that of a special token or of a mark.

    What spells one is cut in its middle and encoded in parts. All other text has the ids that the tokenizer gives it.

    Args:
        tokenizer: of transformers, fast or not.
        texts: as users write them.
    """
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids
    # Runs of spaces are marks of some tokenizers, and text all the same; one letter cannot be cut.
    marks = {i: str(mark) for i, mark in tokenizer.added_tokens_decoder.items() if len(str(mark).strip()) > 1}
    return [
        ids if marks.keys().isdisjoint(ids) else _encode_parts(tokenizer, text, marks)
        for text, ids in zip(texts, encoded)
    ]


def _encode_parts(tokenizer: Any, text: str, marks: dict[int, str]) -> list[int]:
    """Encode a text in which marks are cut, or letter by letter where the tokenizer still makes some out."""
    ids: list[int] = []
    for parts in (list(_cut(text, marks.values())), list(text)):
        encoded = tokenizer(parts, add_special_tokens=False, split_special_tokens=True).input_ids
        ids = list(chain.from_iterable(encoded))
        if marks.keys().isdisjoint(ids):
            return ids
    return [i for i in ids if i not in marks]


def _cut(text: str, marks: Iterable[str]) -> Iterator[str]:
    """Cut a text so that no part holds a mark."""
    pattern = re.compile("|".join(map(re.escape, marks)))
    left = [text]
    while left:
        part = left.pop()
        if found := pattern.search(part):
            middle = (found.start() + found.end()) // 2
            left += [part[middle:], part[:middle]]
        elif part:
            yield part
