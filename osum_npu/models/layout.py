"""Where prompt, speech and answer stand in the sequence that the LLM reads.

``[prompt][speech begin][speech][speech end][answer]``, for training and inference alike. All of it is integers of the
host, made once a batch: the model then fills the sequence with one gather.

Shapes: B sequences, L positions, N labelled positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


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

    stride: int
    """Rows of the table that the speech embeddings of each utterance take; more of them, padding, are left out."""

    def to(self, device: torch.device) -> Layout:
        """Copy to a device."""
        fields: dict[str, Any] = self.__dict__
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        return Layout(**fields | {name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def lay_out(
    prompts: Sequence[Sequence[int]],
    speech_lengths: Sequence[int],
    answers: Sequence[Sequence[int]] | None = None,
    *,
    about: Sequence[int] | None = None,
    multiple_of: int = 1,
    padding: Literal["left", "right"] = "right",
) -> Layout:
    """Arrange a batch.

    Args:
        prompts: token ids of each instruction.
        speech_lengths: speech embeddings of each utterance; the table holds them with the longest as row stride.
        answers: token ids of each answer, end mark included; ``None`` at inference.
        about: which utterance each instruction is about; by default there is one for each.
        multiple_of: the length of the batch is one, so that its shape comes again.
        padding: the side on which short sequences are filled up; left for generation.
    """
    stride, batch = max(speech_lengths), len(prompts)
    about = range(batch) if about is None else about
    answers = answers if answers is not None else [()] * batch
    tokens = np.concatenate([np.asarray(ids, np.int64) for pair in zip(prompts, answers) for ids in pair])
    first_speech = 3 + len(tokens)
    heard = [speech_lengths[utterance] for utterance in about]
    lengths = [len(p) + 2 + n + len(a) for p, n, a in zip(prompts, heard, answers)]
    longest = -(-max(lengths) // multiple_of) * multiple_of
    source = np.zeros((batch, longest), np.int64)
    position = np.zeros((batch, longest), np.int64)
    mask = np.zeros((batch, longest), np.bool_)
    predictors: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    next_token = 3
    for i, (prompt, n, answer, length) in enumerate(zip(prompts, heard, answers, lengths)):
        start = longest - length if padding == "left" else 0
        after_prompt, answer_start = next_token + len(prompt), start + length - len(answer)
        source[i, start : start + length] = np.concatenate(
            [
                np.arange(next_token, after_prompt),
                [1],
                first_speech + about[i] * stride + np.arange(n),
                [2],
                np.arange(after_prompt, after_prompt + len(answer)),
            ]
        )
        next_token = after_prompt + len(answer)
        position[i, start : start + length] = np.arange(length)
        mask[i, start : start + length] = True
        predictors.append(i * longest + np.arange(answer_start - 1, answer_start - 1 + len(answer)))
    labels = np.concatenate([np.asarray(answer, np.int64) for answer in answers])
    return Layout(
        tokens=torch.from_numpy(tokens),
        source_BL=torch.from_numpy(source),
        mask_BL=torch.from_numpy(mask),
        position_BL=torch.from_numpy(position),
        predictor_N=torch.from_numpy(np.concatenate(predictors)),
        label_N=torch.from_numpy(labels),
        stride=stride,
    )
