"""Batched inference: many recordings or texts, several tasks, one pass through the encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from osum_npu import backend
from osum_npu.audio.mel import frame_count, log_mel
from osum_npu.audio.read import AudioError, read_audio
from osum_npu.checkpoints.model_directory import end_ids, load_model
from osum_npu.inference.decoding import DECODINGS, Decoding, decode, longest_answer
from osum_npu.models.llm import merge_projections
from osum_npu.models.lora import fold_lora
from osum_npu.models.speech_llm import SpeechLLM
from osum_npu.tasks import (
    Answer,
    Prompts,
    Task,
    Utterance,
    first_prompt,
    prompt_fault,
    prompts,
    read,
    read_prefixed,
)
from osum_npu.tasks.form import get_form
from osum_npu.tasks.prompts import NO_PROMPT

_WINDOW = 16
"""Batches' worth of recordings that are read and sorted by length together."""


@dataclass(frozen=True)
class Result:
    """What a model said about one recording, or one text."""

    utterance: Utterance
    answers: Mapping[str, Answer] = field(default_factory=dict)
    """By task name, of the tasks that fit; empty where the recording could not be read."""
    raw: Mapping[str, str] = field(default_factory=dict)
    """The generated text by task name."""
    seconds: float | None = None
    """Length of the sound; ``None`` for text alone."""
    error: str | None = None
    """Why the recording could not be answered about."""

    def as_json(self) -> dict[str, Any]:
        """Return the line that ``osum-npu infer`` writes."""
        wav = self.utterance.wav
        row: dict[str, Any] = {"key": self.utterance.key, "wav": None if wav is None else str(wav)}
        if self.error is not None:
            return {**row, "error": self.error}
        return {**row, "duration": self.seconds, "results": {n: _plain(a) for n, a in self.answers.items()}}


def _plain(answer: Answer) -> dict[str, Any]:
    fields: dict[str, Any] = {name: value for name, value in answer.__dict__.items() if value is not None}
    if answer.words is not None:
        fields["words"] = [[w.text, w.start, w.end] for w in answer.words]
    return fields


class Engine:
    """A loaded model that answers."""

    def __init__(
        self,
        model: SpeechLLM,
        tokenizer: Any,
        device: torch.device,
        *,
        batch_seconds: float = 240.0,
        decoding: Decoding = DECODINGS["greedy"],
        wordings: Prompts | None = None,
        ends: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Take a model.

        Args:
            model: moved to ``device``, put into evaluation mode, no longer to be trained.
            tokenizer: of its LLM.
            device: where to compute.
            batch_seconds: sound computed at once, padding counted.
            decoding: how an answer is searched for.
            wordings: instructions by task; the project's own by default.
            ends: ids of the tokens that end an answer; the tokenizer's end mark by default.
            seed: of decodings that draw at random.
        """
        self.model: SpeechLLM = model.to(device).eval()
        self.form = get_form(model.config.form, model.config.begin_of_text)
        self.form.encode(tokenizer, [], [])  # says now what does not fit
        self.model.llm.generation_config = GenerationConfig()  # an LLM's own would punish repetition, or draw
        merge_projections(self.model.llm)
        self.tokenizer, self.device, self.batch_seconds = tokenizer, device, batch_seconds
        self.decoding, self.wordings, self.seed = decoding, wordings or prompts(), seed
        self.ends = list(ends or [tokenizer.eos_token_id])

    @classmethod
    def load(cls, folder: str | Path, **settings: Any) -> Engine:
        """Load a model directory onto the chosen backend, in that backend's own dtype; settings are those of Engine."""
        chosen = backend.current()
        device, dtype = chosen.activate(), chosen.dtypes[0]
        model, tokenizer = load_model(folder, llm_dtype=dtype if dtype is torch.float32 else "auto")
        if model.config.lora is not None:
            fold_lora(model.llm)  # LoRA is float32: each sum is rounded once, and small updates are not swallowed
        for parameter in model.parameters():  # not the buffers: rounded, rotary frequencies turn far positions wrong
            parameter.data = parameter.data.to(dtype)
        return cls(model, tokenizer, device, ends=end_ids(folder), **settings)

    @property
    def longest(self) -> float:
        """Seconds that the encoder can take at once."""
        return self.model.encoder.config.max_seconds

    def answer(self, utterances: Sequence[Utterance], tasks: Sequence[Task]) -> Iterator[Result]:
        """Answer every task about every recording or text that it fits, in the order given.

        A recording is asked the tasks about sound, a row without one those about text alone. Recordings are batched
        with others of similar length; the answers do not depend on the batch, unless several beams are drawn at random.
        One that cannot be read, or that no task fits, comes back with its ``error`` and stops nothing.
        """
        known = [u.seconds or 10.0 for u in utterances]
        window = max(1, round(_WINDOW * self.batch_seconds / (sum(known) / len(known)))) if known else 1
        for start in range(0, len(utterances), window):
            yield from self._window(utterances[start : start + window], tasks)

    def _window(self, utterances: Sequence[Utterance], tasks: Sequence[Task]) -> list[Result]:
        results: list[Result | None] = [None] * len(utterances)
        waves: dict[int, NDArray[np.float32]] = {}
        texts: dict[int, float] = {}
        for i, u in enumerate(utterances):
            if fault := _unfit(u, tasks):
                results[i] = Result(u, error=f"{u.key}: {fault}")
                continue
            if u.wav is None:
                texts[i] = u.seconds
                continue
            try:
                waves[i] = read_audio(u.wav, u.start, u.end, max_seconds=self.longest)
            except AudioError as error:
                results[i] = Result(u, error=str(error))
        for group in self._groups({i: len(wave) / 16000 for i, wave in waves.items()}):
            self._batch(group, utterances, waves, [task for task in tasks if task.hears], results)
        for group in self._groups(texts):
            self._batch(group, utterances, {}, [task for task in tasks if not task.hears], results)
        return [result for result in results if result is not None]

    def _groups(self, seconds: Mapping[int, float]) -> Iterator[list[int]]:
        """Cut rows, in falling length, into batches that are small enough when they are padded."""
        group: list[int] = []
        for i in sorted(seconds, key=lambda i: -seconds[i]):
            if group and (len(group) + 1) * seconds[group[0]] > self.batch_seconds:
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    @torch.no_grad()  # not inference_mode: ops may ask whose halves two tensors are, which it does not keep
    def _batch(
        self,
        group: Sequence[int],
        utterances: Sequence[Utterance],
        waves: Mapping[int, NDArray[np.float32]],
        tasks: Sequence[Task],
        results: list[Result | None],
    ) -> None:
        """Fill in the results of one batch: of recordings alone, or of texts alone, which have no waves."""
        model = self.model
        heard = [torch.from_numpy(waves[i]) for i in group if i in waves]
        padded = torch.nn.utils.rnn.pad_sequence(heard, batch_first=True) if heard else torch.zeros(0, 0)
        samples = [len(wave) for wave in heard]
        features = log_mel(padded.to(self.device), samples, model.encoder.config.n_mels)
        speech, lengths = model.hear(features.to(model.dtype), [frame_count(n) for n in samples])
        seconds = [len(waves[i]) / 16000 if i in waves else None for i in group]
        answers: list[dict[str, Answer]] = [{} for _ in group]
        raw: list[dict[str, str]] = [{} for _ in group]
        for task in tasks:
            instructions = [first_prompt(utterances[i], task, self.wordings) for i in group]
            asked = self.form.encode(self.tokenizer, [task.kind] * len(group), instructions)
            said = decode(
                model,
                speech,
                lengths,
                [question.before for question in asked],
                self.decoding,
                limits=[longest_answer(task, utterances[i], length or 0.0) for i, length in zip(group, seconds)],
                ends=self.ends,
                seeds=[f"{self.seed}/{task.name}/{utterances[i].key}" for i in group],
                about=range(len(group)) if task.hears else [None] * len(group),
                after=[question.after for question in asked],
            )
            for row, text in enumerate(self.tokenizer.batch_decode(said, skip_special_tokens=True)):
                raw[row][task.name] = text
                answers[row][task.name] = self._read(task, utterances[group[row]], text)
        for row, i in enumerate(group):
            length = seconds[row]
            results[i] = Result(utterances[i], answers[row], raw[row], None if length is None else round(length, 4))

    def _read(self, task: Task, utterance: Utterance, text: str) -> Answer:
        """Read an answer; what a user asked for in words of their own is told by the answer's prefix alone."""
        own = utterance.intent is None and bool((utterance.prompt or "").strip())
        return read_prefixed(text)[1] if self.form.prefix and own and task.hears else read(task, text)


def _unfit(utterance: Utterance, tasks: Sequence[Task]) -> str:
    """Say why none of the tasks can be asked; empty where one can."""
    names = ", ".join(task.name for task in tasks)
    if fault := prompt_fault(utterance.prompt):
        return fault
    if utterance.wav is None and utterance.prompt in (None, NO_PROMPT):
        return "neither a sound nor a prompt"
    if not tasks or any(task.hears == (utterance.wav is not None) for task in tasks):
        return ""
    return f"no sound for {names}" if utterance.wav is None else f"{names} is about text alone, and the row has a sound"
