"""Forms: the fixed texts around an instruction and what is heard, as a checkpoint has learned them.

``[before][instruction][speech][after][answer]``. A model directory's ``config.json`` names its form, and says which of
these texts begin with the tokenizer's mark for the beginning of a text; training and inference follow it alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple, get_args

import yaml

from osum_npu.tasks.plain_text import encode_plain
from osum_npu.tasks.task import Kind

FormName = Literal["osum", "osum_pangu", "osum_pangu_released"]
"""``osum_pangu`` are the texts of OSUM-Pangu's training, ``osum_pangu_released`` those of its inference functions."""

BeginOfText = Literal["none", "fixed", "all"]
"""What begins with ``<s>``: nothing; the form's own texts, as in OSUM-Pangu's training with a tokenizer that adds one;
or the instruction, too, as in its inference functions."""


class Question(NamedTuple):
    """Token ids around the place of the speech."""

    before: list[int]
    after: list[int]


@dataclass(frozen=True)
class Form:
    """How a question is put to a model."""

    prefix: bool
    """Whether answers begin with the tags of their task."""
    prompt: frozenset[Kind]
    """Kinds whose instruction is shown."""
    before: Mapping[Kind, str]
    after: str
    begin_of_text: BeginOfText = "none"

    @property
    def texts(self) -> list[str]:
        """All fixed texts."""
        return list(dict.fromkeys(text for text in (*self.before.values(), self.after) if text))

    def encode(
        self, tokenizer: Any, kinds: Sequence[Kind], instructions: Sequence[str], *, plain: bool = True
    ) -> list[Question]:
        """Turn questions into token ids; each text is tokenized by itself, as the originals do.

        Args:
            tokenizer: of the LLM.
            kinds: of each question's task.
            instructions: empty for none.
            plain: whether instructions are text of users, in which no special token or mark is made out.

        Raises:
            ValueError: texts are to begin with a mark that the tokenizer does not have.
        """
        fixed = [*dict.fromkeys(self.before[kind] for kind in kinds), self.after]
        shown = [text if kind in self.prompt else "" for kind, text in zip(kinds, instructions)]
        mark = self._mark(tokenizer)
        ids_of = dict(zip(fixed, _behind(mark, _encode(tokenizer, fixed))))
        encoded = encode_plain(tokenizer, shown) if plain else _encode(tokenizer, shown)
        own = _behind(mark if self.begin_of_text == "all" else [], encoded)
        return [Question([*ids_of[self.before[kind]], *ids], ids_of[self.after]) for kind, ids in zip(kinds, own)]

    def _mark(self, tokenizer: Any) -> list[int]:
        if self.begin_of_text == "none":
            return []
        if tokenizer.bos_token_id is None:
            raise ValueError(
                f"begin_of_text is {self.begin_of_text!r}, and the tokenizer has no mark for the beginning of a text: "
                "set begin_of_text to 'none', or take another tokenizer"
            )
        return [tokenizer.bos_token_id]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
    return ids


def _behind(mark: list[int], encoded: Sequence[list[int]]) -> list[list[int]]:
    """Put the mark before every text that is not empty."""
    return [[*mark, *ids] if ids else [] for ids in encoded]


def get_form(name: str, begin_of_text: str = "none") -> Form:
    """Return the form of a model.

    Args:
        name: one of :data:`FormName`.
        begin_of_text: one of :data:`BeginOfText`.

    Raises:
        ValueError: there is no form of that name, or no such rule.
    """
    for what, got, known in (("form", name, FormName), ("begin_of_text", begin_of_text, BeginOfText)):
        if got not in get_args(known):
            raise ValueError(f"there is no {what} {got!r}; there are {', '.join(get_args(known))}")
    form = _table()[name]
    return Form(
        prefix=form["prefix"],
        prompt=frozenset(form["prompt"]),
        before=form["before"],
        after=form["after"],
        begin_of_text=begin_of_text,  # type: ignore[arg-type]  # checked above
    )


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(files("osum_npu.tasks").joinpath("forms.yaml").read_text("utf-8"))
    return table
