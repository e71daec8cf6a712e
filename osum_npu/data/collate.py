"""From examples to a batch of tensors: sound is read, prompts and answers become token ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osum_npu.audio.augment import Drawn, SpecAugmentConfig, draw
from osum_npu.audio.mel import frame_count
from osum_npu.audio.read import SAMPLE_RATE, read_audio
from osum_npu.data.plan import Example
from osum_npu.tasks import Task, Utterance, draw_prompt, spell, write


@dataclass(frozen=True)
class Batch:
    """Utterances that are computed together. Shapes: B utterances, S samples."""

    examples: list[Example]
    wave_BS: Tensor
    """float32, 16 kHz, zero behind each end."""
    samples: list[int]
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
    max_answer_tokens: int | None = None
    """The end mark is not counted."""
    start: Callable[[Task, Utterance], str] | None = None
    """Writes what stands before an answer, where that is no instruction; raises ValueError where it cannot."""

    def __call__(self, examples: Sequence[Example], epoch: int) -> Batch:
        """Read and tokenize.

        What is drawn at random (wording of the prompt, augmentation) follows from (seed, epoch, key) alone, so it
        does not depend on batch, worker or rank. An utterance that cannot be used is named in ``skipped``.
        """
        kept: list[Example] = []
        waves: list[Tensor] = []
        prompts: list[str] = []
        answers: list[list[int]] = []
        rngs: list[random.Random] = []
        skipped: list[str] = []
        for example, answer in zip(examples, self._ids([write(e.task, e.utterance) for e in examples])):
            row, rng = example.utterance, random.Random(f"{self.seed}/{epoch}/{example.utterance.key}")
            try:
                if self.max_answer_tokens is not None and len(answer) > self.max_answer_tokens:
                    raise ValueError(
                        f"its answer has {len(answer)} tokens, more than the allowed {self.max_answer_tokens}"
                    )
                prompt = self.start(example.task, row) if self.start else row.prompt or draw_prompt(example.task, rng)
                wave = read_audio(row.wav, row.start, row.end, max_seconds=self.max_seconds)
            except ValueError as error:
                skipped.append(f"{row.key}: {error}")
                continue
            kept.append(example)
            waves.append(torch.from_numpy(np.ascontiguousarray(wave)))
            prompts.append(prompt)
            answers.append([*answer, self.tokenizer.eos_token_id])
            rngs.append(rng)
        samples = [len(wave) for wave in waves]
        drawn = None
        if self.spec_augment is not None:
            drawn = [draw(self.spec_augment, frame_count(n), self.n_mels, rng) for n, rng in zip(samples, rngs)]
        return Batch(
            examples=kept,
            wave_BS=torch.nn.utils.rnn.pad_sequence(waves, batch_first=True) if waves else torch.zeros(0, 0),
            samples=samples,
            prompts=self._ids(prompts),
            answers=answers,
            spellings=[spell(e.utterance) for e in kept],
            drawn=drawn,
            skipped=skipped,
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        return ids
