"""Tokenizers: that of a released LLM, or a small one, learned from a corpus, for LLMs that are trained from nothing.

Nothing else in the project knows which one it works with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from osum_npu.models import pangu
from osum_npu.tasks.text import HAN

END = "<|endoftext|>"


def load_tokenizer(name_or_path: str) -> Any:
    """Load the tokenizer of a released LLM from a folder or a hub, as its files describe it; their code is not run."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import has_file

    settings = get_tokenizer_config(name_or_path)
    kind = settings.get("tokenizer_class")
    if kind == pangu.TOKENIZER_CLASS and not has_file(name_or_path, "tokenizer.json"):
        return pangu.load_tokenizer(name_or_path, settings)
    # AutoTokenizer would replace the way in which a tokenizer of no family splits words by that of the LLM's family.
    of_no_family = kind in ("TokenizersBackend", "PreTrainedTokenizerFast", pangu.TOKENIZER_CLASS)
    return (PreTrainedTokenizerFast if of_no_family else AutoTokenizer).from_pretrained(name_or_path)


def train_tokenizer(texts: Iterable[str], marks: Sequence[str], vocabulary: int = 2000) -> Any:
    """Learn byte-pair units from ``texts``; any text can be written with them, unknown characters as bytes.

    Words keep one id wherever they stand: the space is part of the word, also at the start and behind a mark, and
    Han characters are units of their own. Decoding may therefore put spaces around them, which
    :func:`osum_npu.tasks.normalize_text` removes.

    Args:
        texts: transcripts, replies, prompts.
        marks: strings that are one unit each (``<male>``, ``<0.42>``).
        vocabulary: number of units, marks not counted.

    Returns:
        A ``transformers.PreTrainedTokenizerFast`` with end mark :data:`END`, which also pads.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learned = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"[{HAN}]"), "isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
            pre_tokenizers.Split(Regex(r"[^▁\w]"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    # Anew around the learned units: training made the bytes special, and decoding leaves special tokens out.
    tokenizer = Tokenizer(learned.model)
    tokenizer.pre_tokenizer = learned.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁")])
    tokenizer.add_special_tokens([END])
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
