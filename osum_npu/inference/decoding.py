"""How an answer is searched for, and what ends it.

Shapes: B utterances, E speech embeddings of all of them, H their width, R rows (a row for each beam of each utterance),
L tokens so far, N block lengths, W window,
V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from osum_npu.models.speech_llm import SpeechLLM
from osum_npu.tasks import Task, Utterance

LOOP_REPEATS = 4
"""A block of tokens is a loop only if it stands at least so many times in a row."""
LOOP_TOKENS = 32
"""… and if these repetitions are so many tokens together: "ha ha ha" may be said thirty times."""
LOOP_BLOCK = 48
"""Longest block that is looked for, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen. Temperature and length penalty are 1 everywhere, as in the releases."""

    beams: int = 1
    sample: bool = False
    top_k: int = 0
    """Draw from so many likeliest tokens; of use with ``sample``, like ``top_p``."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    """Of tokens that the answer holds already; 1 for none. The instruction does not count."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; ``None`` lets it follow from the task and the length of the sound."""
    cut_loops: bool = True
    """End an answer that repeats itself, and cut the repetitions off."""


DECODINGS: dict[str, Decoding] = {
    "greedy": Decoding(),
    "beam": Decoding(beams=4),
    "osum": Decoding(
        beams=4, sample=True, top_k=5, top_p=0.9, repetition_penalty=1.05, max_new_tokens=400, cut_loops=False
    ),
    "osum-echat": Decoding(
        sample=True, top_k=5, top_p=0.9, repetition_penalty=1.05, max_new_tokens=400, cut_loops=False
    ),
    "osum-pangu": Decoding(repetition_penalty=1.05, max_new_tokens=400, cut_loops=False),
}
"""By the names that users write. ``osum``, ``osum-echat`` and ``osum-pangu`` are the settings of the releases
(ASLP-lab/OSUM, OSUM and OSUM-EChat; ASLP-lab/OSUM-Pangu); their ``min_length`` of 1 counts the instruction too, so it
changes nothing and is left out here."""


_FREE_TOKENS = {"text": 0, "chat": 200, "chat_think": 400, "text2text": 400, "intent": 0}
"""What an answer may have beyond what follows from the sound, in tokens by kind of task."""
_OWN_INSTRUCTION_TOKENS = 200
"""… and where an instruction of the utterance's own may ask for anything."""


def get_decoding(name: str) -> Decoding:
    """Return the settings that users call ``name``.

    Raises:
        ValueError: none are called that.
    """
    if name not in DECODINGS:
        raise ValueError(f"there is no decoding {name!r}; there are {', '.join(DECODINGS)}")
    return DECODINGS[name]


def longest_answer(task: Task, utterance: Utterance, seconds: float) -> int:
    """Return how many tokens an answer may have: more than any that is right, so that a wrong one ends at last.

    Nobody says more than 30 tokens of any tokenizer in a second. Word times make 12 tokens of each word where digits
    are tokens. Replies, and answers to an instruction of the utterance's own, do not follow from the sound.

    Args:
        task: what is asked.
        utterance: about which.
        seconds: length of its sound; 0 for text alone.
    """
    words = (100 if task.name == "timestamps" else 30) * seconds if task.transcript else 0
    anything = task.kind == "text" and utterance.prompt is not None
    return 40 + round(words) + (_OWN_INSTRUCTION_TOKENS if anything else _FREE_TOKENS[task.kind])


def decode(
    model: SpeechLLM,
    speech_EH: Tensor,
    lengths: Sequence[int],
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    limits: Sequence[int],
    ends: Sequence[int],
    seeds: Sequence[str],
    about: Sequence[int | None] | None = None,
    after: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Answer prompts.

    Args:
        model: whose LLM answers.
        speech_EH: speech embeddings, of :meth:`SpeechLLM.hear`.
        lengths: how many there are of each utterance.
        prompts: token ids before each speech.
        decoding: how to choose.
        limits: longest answer to each, in tokens; ``decoding.max_new_tokens`` goes before.
        ends: token ids that end an answer.
        seeds: what random choices follow from, for each utterance. Drawing token by token (one beam) then depends on
            nothing else; several beams are drawn for the whole batch, from all its seeds together.
        about: which utterance each prompt is about, ``None`` for text alone; by default there is one for each.
        after: token ids between each speech and its answer; by default there are none.

    Returns:
        Token ids of each answer, without the one that ends it.
    """
    if decoding.max_new_tokens is not None:
        limits = [decoding.max_new_tokens] * len(limits)
    processors, stops = LogitsProcessorList(), StoppingCriteriaList([Limits(limits, speech_EH.device)])
    if decoding.cut_loops:
        stops.append(Loops(speech_EH.device))
    settings: dict[str, Any] = {"do_sample": False}
    if decoding.sample and decoding.beams > 1:
        settings = {"do_sample": True, "top_k": decoding.top_k, "top_p": decoding.top_p}
        torch.manual_seed(zlib.crc32("\n".join(seeds).encode()))
    elif decoding.sample:
        processors += [TopKLogitsWarper(decoding.top_k), TopPLogitsWarper(decoding.top_p)]
        processors.append(Draw(seeds, max(limits), decoding.top_k, speech_EH.device))
    ids_BL = model.respond(
        speech_EH,
        lengths,
        prompts,
        about,
        after,
        num_beams=decoding.beams,
        repetition_penalty=decoding.repetition_penalty,
        max_new_tokens=max(limits),
        eos_token_id=list(ends),
        pad_token_id=ends[0],
        logits_processor=processors,
        stopping_criteria=stops,
        **settings,
    )
    answers = [list(takewhile(lambda token: token not in ends, row)) for row in ids_BL.tolist()]
    return [cut_loop(answer) for answer in answers] if decoding.cut_loops else answers


def cut_loop(tokens: list[int]) -> list[int]:
    """Return ``tokens`` without the repetitions at their end, the first occurrence kept.

    What stands at the end fewer than :data:`LOOP_REPEATS` times, or makes fewer than :data:`LOOP_TOKENS` tokens
    altogether, is no loop.
    """
    for block in range(1, min(LOOP_BLOCK, len(tokens) // LOOP_REPEATS) + 1):
        start = len(tokens) - block
        while start > 0 and tokens[start - 1] == tokens[start - 1 + block]:
            start -= 1
        if len(tokens) - start >= max(LOOP_REPEATS * block, LOOP_TOKENS):
            return tokens[: start + block]
    return tokens


class Loops(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Ends an answer as soon as :func:`cut_loop` would cut it."""

    def __init__(self, device: torch.device) -> None:
        block_N1 = torch.arange(1, LOOP_BLOCK + 1)[:, None]
        asked_N1 = (LOOP_REPEATS * block_N1).clamp(min=LOOP_TOKENS) - block_N1
        self.width = int(asked_N1.max())
        self.unasked_NW = (torch.arange(self.width) >= asked_N1).to(device)

    def __call__(self, ids_RL: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Return bool ``[R]``."""
        if ids_RL.shape[1] < LOOP_TOKENS:
            return torch.zeros(len(ids_RL), dtype=torch.bool, device=ids_RL.device)
        newest = ids_RL[:, -(self.width + LOOP_BLOCK) :].flip(1)
        newest = F.pad(newest, (0, self.width + LOOP_BLOCK - newest.shape[1]), value=-1)  # equal to no token
        back_RNW = newest.unfold(1, self.width, 1)  # the last tokens, and those 1, 2, … LOOP_BLOCK places before
        return ((back_RNW[:, :1] == back_RNW[:, 1:]) | self.unasked_NW).all(-1).any(-1)


class Limits(StoppingCriteria):  # type: ignore[misc]
    """Ends each answer at a length of its own."""

    def __init__(self, limits: Sequence[int], device: torch.device) -> None:
        self.limit_B = torch.tensor(limits, device=device)

    def __call__(self, ids_RL: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Return bool ``[R]``."""
        return ids_RL.shape[1] >= self.limit_B.repeat_interleave(len(ids_RL) // len(self.limit_B))


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token, drawn by its probability (Gumbel-max).

    The noise is made beforehand, from each seed alone, so that the token depends neither on the batch nor the device.
    """

    def __init__(self, seeds: Sequence[str], steps: int, top_k: int, device: torch.device) -> None:
        noise_BLK = [np.random.default_rng(list(seed.encode())).gumbel(size=(steps, top_k)) for seed in seeds]
        self.noise_BLK = torch.tensor(np.asarray(noise_BLK, np.float32), device=device)

    def __call__(self, ids_BL: Tensor, scores_BV: Tensor) -> Tensor:
        """Return ``[B, V]``: 0 for the token drawn, else -inf."""
        likeliest_BK, token_BK = scores_BV.topk(self.noise_BLK.shape[-1])
        drawn_B1 = (likeliest_BK + self.noise_BLK[:, ids_BL.shape[1]]).argmax(-1, keepdim=True)
        return torch.full_like(scores_BV, -torch.inf).scatter(1, token_BK.gather(1, drawn_B1), 0.0)
