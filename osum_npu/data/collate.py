"""From examples to a batch of tensors: sound is read, prompts and answers become token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osum_npu.audio.augment import Drawn, SpecAugmentConfig, draw
from osum_npu.audio.mel import frame_count
from osum_npu.audio.read import SAMPLE_RATE, AudioError, read_audio
from osum_npu.data.plan import Example, padded_length
from osum_npu.tasks import Prompts, draw_prompt, prompts, spell, write
from osum_npu.tasks.answer import STAMP_SECONDS


@dataclass(frozen=True)
class Batch:
    """Utterances that are computed together, and the questions asked about them. Shapes: B utterances, S samples."""

    examples: list[Example]
    wave_BS: Tensor
    """float32, 16 kHz, zero behind each end."""
    samples: list[int]
    about: list[int]
    """Of each question, which utterance it is about."""
    prompts: list[list[int]]
    answers: list[list[int]]
    """Token ids with the end mark."""
    spellings: list[str]
    """What the CTC head should spell: the transcript and all labels; empty where there is neither."""
    drawn: list[Drawn] | None
    """What augmentation hides."""
    skipped: list[str]
    """Utterances that could not be read: ``key: reason``."""

    @property
    def seconds(self) -> float:
        """Sound in this batch, without padding."""
        return sum(self.samples) / SAMPLE_RATE

    @property
    def label_count(self) -> int:
        """Tokens that the LLM learns from this batch."""
        return sum(map(len, self.answers))


@dataclass(frozen=True)
class Collator:
    """Turns examples into a :class:`Batch`; runs in the loader's workers."""

    tokenizer: Any
    n_mels: int
    seed: int
    spec_augment: SpecAugmentConfig | None
    max_seconds: float
    wordings: Prompts = field(default_factory=prompts)
    """Instructions by task."""
    stamp_seconds: float = STAMP_SECONDS
    """Resolution of written word times."""

    def __call__(self, examples: Sequence[Example], epoch: int) -> Batch:
        """Read and tokenize.

        What is drawn at random (wording of the prompt, augmentation) follows from (seed, epoch, key) alone, so it
        does not depend on batch, worker or rank. An utterance that cannot be read is named in ``skipped``.
        """
        kept: list[Example] = []
        waves: list[Tensor] = []
        skipped: list[str] = []
        for example in examples:
            row = example.utterance
            try:
                wave = read_audio(row.wav, row.start, row.end, max_seconds=self.max_seconds)
            except AudioError as error:
                skipped.append(f"{row.key}: {error}")
                continue
            kept.append(example)
            waves.append(torch.from_numpy(np.ascontiguousarray(wave)))
        rngs = [random.Random(f"{self.seed}/{epoch}/{example.utterance.key}") for example in kept]
        questions = [(i, task) for i, example in enumerate(kept) for task in example.tasks]
        asked = [draw_prompt(kept[i].utterance, task, self.wordings, rngs[i]) for i, task in questions]
        samples = [len(wave) for wave in waves]
        drawn = None
        if self.spec_augment is not None:
            drawn = [draw(self.spec_augment, frame_count(n), self.n_mels, rng) for n, rng in zip(samples, rngs)]
        end = self.tokenizer.eos_token_id
        answers = self._ids([write(task, kept[i].utterance, self.stamp_seconds) for i, task in questions])
        return Batch(
            examples=kept,
            wave_BS=self._pad(waves),
            samples=samples,
            about=[i for i, _ in questions],
            prompts=self._ids(asked),
            answers=[[*ids, end] for ids in answers],
            spellings=[spell(e.utterance) for e in kept],
            drawn=drawn,
            skipped=skipped,
        )

    def _pad(self, waves: list[Tensor]) -> Tensor:
        """Put waves side by side, zero behind each end, ``[B, S]``."""
        if not waves:
            return torch.zeros(0, 0)
        longest = max(map(len, waves))
        limit = max(longest, int(self.max_seconds * SAMPLE_RATE))
        wave_BS = torch.zeros(len(waves), min(limit, round(padded_length(longest / SAMPLE_RATE) * SAMPLE_RATE)))
        for row, wave in zip(wave_BS, waves):
            row[: len(wave)] = wave
        return wave_BS

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        return ids
