"""Where prompt, speech and answer stand in the sequences that the LLM reads.

``[prompt][speech begin][speech][speech end][after][answer]``, for training and inference alike; a sequence about text
alone has neither speech nor its marks. To learn, all sequences of a batch lie end to end in one row; to answer, they
are a batch filled up on the left. All of it is integers of the host, made once a batch: the model then fills the
sequences with one gather.

Shapes: B rows, L positions, N labelled positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from osum_npu.packing import STEP


@dataclass(frozen=True)
class Layout:
    """A batch of sequences as places in a table of embedding rows.

    The table's rows are: 0 padding, 1 speech begin, 2 speech end, then all token ids, then all speech embeddings.
    """

    tokens: Tensor
    """int64: the token ids of all sequences, one behind the other."""
    source_BL: Tensor
    """int64: row of the table for each position."""
    mask_BL: Tensor
    """bool: False at padding."""
    position_BL: Tensor
    """int64: place within the sequence, 0 at padding."""
    predictor_N: Tensor
    """int64: flat positions (in B × L) whose output predicts a label."""
    label_N: Tensor
    """int64: the labels."""
    packed: tuple[int, ...] | None
    """Length of each sequence where all lie end to end in one row, what fills the row counted as one; else ``None``."""

    def to(self, device: torch.device) -> Layout:
        """Copy to a device."""
        fields: dict[str, Any] = self.__dict__
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        return Layout(**fields | {name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def lay_out(
    prompts: Sequence[Sequence[int]],
    speech_lengths: Sequence[int],
    answers: Sequence[Sequence[int]],
    about: Sequence[int | None] | None = None,
    after: Sequence[Sequence[int]] | None = None,
) -> Layout:
    """Arrange a batch to learn from: all sequences end to end in one row.

    Args:
        prompts: token ids of what stands before each speech: the instruction, and what the form puts around it.
        speech_lengths: speech embeddings of each utterance, which stand end to end in the table.
        answers: token ids of each answer, end mark included.
        about: which utterance each instruction is about, ``None`` for text alone; by default there is one for each.
        after: token ids between each speech and its answer; by default there are none.
    """
    lengths, *_ = parts = _sequences(prompts, speech_lengths, answers, about, after)
    filling = -sum(lengths) % STEP
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return _place(parts, starts, (1, sum(lengths) + filling), (*lengths, *([filling] if filling else [])))


def lay_out_left(
    prompts: Sequence[Sequence[int]],
    speech_lengths: Sequence[int],
    about: Sequence[int | None] | None = None,
    after: Sequence[Sequence[int]] | None = None,
) -> Layout:
    """Arrange a batch to answer: a row for each sequence, all ending together; otherwise as :func:`lay_out`."""
    lengths, *_ = parts = _sequences(prompts, speech_lengths, [()] * len(prompts), about, after)
    longest = max(lengths)
    starts = np.arange(1, len(lengths) + 1) * longest - lengths
    return _place(parts, starts, (len(lengths), longest), None)


_Sequences = tuple[list[int], NDArray[np.int64], list[NDArray[np.int64]], NDArray[np.int64], NDArray[np.int64]]


def _sequences(
    prompts: Sequence[Sequence[int]],
    speech_lengths: Sequence[int],
    answers: Sequence[Sequence[int]],
    about: Sequence[int | None] | None,
    after: Sequence[Sequence[int]] | None,
) -> _Sequences:
    """Return the lengths, all token ids, what each sequence takes from the table, labels and how many of each."""
    about = range(len(prompts)) if about is None else about
    after = [()] * len(prompts) if after is None else after
    tokens = np.concatenate([np.asarray(ids, np.int64) for row in zip(prompts, after, answers) for ids in row])
    speech_starts = 3 + len(tokens) + np.cumsum(speech_lengths, dtype=np.int64) - speech_lengths
    sources, next_token = [], 3
    for prompt, behind, answer, utterance in zip(prompts, after, answers, about):
        speech_place = next_token + len(prompt)
        end = speech_place + len(behind) + len(answer)
        source = np.arange(next_token, end)
        if utterance is not None:
            speech = speech_starts[utterance] + np.arange(speech_lengths[utterance])
            source = np.insert(source, len(prompt), [1, *speech, 2])
        sources.append(source)
        next_token = end
    labels = np.concatenate([np.asarray(answer, np.int64) for answer in answers])
    return [len(source) for source in sources], tokens, sources, labels, np.array([len(answer) for answer in answers])


def _place(
    parts: _Sequences, starts: NDArray[np.int64], shape: tuple[int, int], packed: tuple[int, ...] | None
) -> Layout:
    """Put sequences at their places in B × L."""
    lengths, tokens, sources, labels, label_counts = parts
    source, position = np.zeros(shape[0] * shape[1], np.int64), np.zeros(shape[0] * shape[1], np.int64)
    within = np.concatenate([np.arange(length) for length in lengths])
    places = np.repeat(starts, lengths) + within
    source[places], position[places] = np.concatenate(sources), within
    ends = starts + lengths
    counted = np.concatenate([np.arange(count) for count in label_counts])
    predictors = np.repeat(ends - label_counts - 1, label_counts) + counted
    return Layout(
        tokens=torch.from_numpy(tokens),
        source_BL=torch.from_numpy(source).view(shape),
        mask_BL=torch.from_numpy(source).view(shape) != 0,
        position_BL=torch.from_numpy(position).view(shape),
        predictor_N=torch.from_numpy(predictors.astype(np.int64)),
        label_N=torch.from_numpy(labels),
        packed=packed,
    )
