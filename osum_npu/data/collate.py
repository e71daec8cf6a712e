"""From examples to a batch of tensors: sound is read, prompts and answers become token ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from osum_npu.audio.augment import Drawn, SpecAugmentConfig, draw
from osum_npu.audio.mel import frame_count
from osum_npu.audio.read import SAMPLE_RATE, read_audio
from osum_npu.data.plan import Example
from osum_npu.tasks import Prompts, Task, Utterance, draw_prompt, prompts, spell, write
from osum_npu.tasks.answer import STAMP_SECONDS
from osum_npu.tasks.form import Form, get_form
from osum_npu.tasks.instructions import can_be_asked, draw_instruction


@dataclass(frozen=True)
class Batch:
    """Examples that are computed together, and the questions asked about them. Shapes: B sounds, S samples."""

    examples: list[Example]
    """Of those asked about text alone, no sound is among the sounds."""
    wave_BS: Tensor
    """float32, 16 kHz, zero behind each end."""
    samples: list[int]
    about: list[int | None]
    """Of each question, which sound it is about; ``None`` for text alone."""
    prompts: list[list[int]]
    """Token ids before the speech: the instruction, and what the form puts around it."""
    after: list[list[int]]
    """Token ids between the speech and the answer."""
    answers: list[list[int]]
    """Token ids with the end mark."""
    spellings: list[str]
    """What the CTC head should spell of each sound: the transcript and all labels; empty where there is neither."""
    drawn: list[Drawn] | None
    """What augmentation hides of each sound; ``None`` without augmentation."""
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


class _Question(NamedTuple):
    task: Task
    about: int | None
    instruction: str
    answer: list[int]


@dataclass(frozen=True)
class Collator:
    """Turns examples into a :class:`Batch`; runs in the loader's workers."""

    tokenizer: Any
    n_mels: int
    seed: int
    spec_augment: SpecAugmentConfig | None
    max_seconds: float
    form: Form = field(default_factory=lambda: get_form("osum"))
    """The fixed texts that the model learns."""
    wordings: Prompts = field(default_factory=prompts)
    """Instructions by task."""
    natural: float = 0.0
    """Share of the questions that are asked in natural language."""
    stamp_seconds: float = STAMP_SECONDS
    """Resolution of written word times."""
    max_answer_tokens: int | None = None
    """The end mark is not counted."""
    start: Callable[[Task, Utterance], str] | None = None
    """Writes what stands before an answer, where that is no instruction; raises ValueError where it cannot."""

    def __call__(self, examples: Sequence[Example], epoch: int) -> Batch:
        """Read and tokenize.

        What is drawn at random (wording of the prompt, augmentation) follows from (seed, epoch, key) alone, so it
        does not depend on batch, worker or rank. An utterance or a question that cannot be used is named in
        ``skipped``.
        """
        kept: list[Example] = []
        heard: list[Example] = []
        waves: list[Tensor] = []
        rngs: list[random.Random] = []
        questions: list[_Question] = []
        skipped: list[str] = []
        for example, possible in zip(examples, self._answers(examples)):
            row, rng = example.utterance, random.Random(f"{self.seed}/{epoch}/{example.utterance.key}")
            try:
                asked = [self._ask(row, task, rng) for task in example.tasks]
                short, faults = self._short(example.tasks, possible)
                skipped += [f"{row.key}: {fault}" for fault in faults]
                if not short:
                    continue
                wave = None
                if row.wav is not None and any(example.tasks[i].hears for i in short):
                    wave = read_audio(row.wav, row.start, row.end, max_seconds=self.max_seconds)
            except ValueError as error:
                skipped.append(f"{row.key}: {error}")
                continue
            for i in short:
                task = example.tasks[i]
                questions.append(_Question(task, len(heard) if task.hears else None, asked[i], possible[i]))
            kept.append(example)
            if wave is not None:
                heard.append(example)
                waves.append(torch.from_numpy(np.ascontiguousarray(wave)))
                rngs.append(rng)
        samples = [len(wave) for wave in waves]
        drawn = None
        if self.spec_augment is not None:
            drawn = [draw(self.spec_augment, frame_count(n), self.n_mels, rng) for n, rng in zip(samples, rngs)]
        kinds, instructions = [q.task.kind for q in questions], [q.instruction for q in questions]
        framed = self.form.encode(self.tokenizer, kinds, instructions, plain=self.start is None)
        return Batch(
            examples=kept,
            wave_BS=nn.utils.rnn.pad_sequence(waves, batch_first=True) if waves else torch.zeros(0, 0),
            samples=samples,
            about=[question.about for question in questions],
            prompts=[question.before for question in framed],
            after=[question.after for question in framed],
            answers=[[*question.answer, self.tokenizer.eos_token_id] for question in questions],
            spellings=[spell(e.utterance) for e in heard],
            drawn=drawn,
            skipped=skipped,
        )

    def _ask(self, row: Utterance, task: Task, rng: random.Random) -> str:
        said = self._say(row, task, rng)
        if not (said or task.hears or self.form.before[task.kind]):  # its first token would follow from a neighbour
            raise ValueError(f"{task.name} is about text alone, and its instruction is empty: give the row a prompt")
        return said

    def _say(self, row: Utterance, task: Task, rng: random.Random) -> str:
        if self.start:
            return self.start(task, row)
        if self.natural and not row.prompt and can_be_asked(task) and rng.random() < self.natural:
            return draw_instruction(task, "train", rng)
        return draw_prompt(row, task, self.wordings, rng)

    def _answers(self, examples: Sequence[Example]) -> list[list[list[int]]]:
        """Return the token ids of each example's answers, all made in one call of the tokenizer."""
        prefix = self.form.prefix
        written = [write(task, e.utterance, self.stamp_seconds, prefix=prefix) for e in examples for task in e.tasks]
        ids = iter(self._ids(written))
        return [[next(ids) for _ in e.tasks] for e in examples]

    def _short(self, tasks: Sequence[Task], answers: Sequence[Sequence[int]]) -> tuple[list[int], list[str]]:
        """Return which answers are short enough, and what is wrong with the others."""
        limit = len(max(answers, key=len)) if self.max_answer_tokens is None else self.max_answer_tokens
        faults = [
            f"its answer to {task.name} has {len(answer)} tokens, more than the allowed {limit}"
            for task, answer in zip(tasks, answers)
            if len(answer) > limit
        ]
        return [i for i, answer in enumerate(answers) if len(answer) <= limit], faults

    def _ids(self, answers: list[str]) -> list[list[int]]:
        if not answers:
            return []
        # A reply that spells the end mark does not end there; marks of labels and times stay what they are.
        ids: list[list[int]] = self.tokenizer(answers, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids
