"""The training loop: stages, steps, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from osum_npu import backend, launch
from osum_npu.audio.augment import apply
from osum_npu.audio.mel import frame_count, log_mel
from osum_npu.checkpoints.model_directory import save_model
from osum_npu.config import Recipe, RecipeError, Source, Stage, dump_recipe, missing_files
from osum_npu.data.collate import Batch, Collator
from osum_npu.data.loader import Step, steps
from osum_npu.data.plan import Example, WeightedSource, cut, plan_epoch, servable
from osum_npu.data.sources import read_source
from osum_npu.files import write_text
from osum_npu.models.speech_llm import SpeechLLM, SpeechLLMOutput
from osum_npu.models.whisper_encoder_decoder import TranscriptStart, WhisperEncoderDecoder
from osum_npu.tasks import read_prompts
from osum_npu.training.build import Trainee, build
from osum_npu.training.card import model_card
from osum_npu.training.log import Log, Silence
from osum_npu.training.optimizer import Optimizers, freeze, schedule
from osum_npu.training.ranks import Ranks
from osum_npu.training.saver import Saver, checkpoints, newest_whole
from osum_npu.training.sharding import blank_batch, clip, reshard, shard, whole_state
from osum_npu.training.state import (
    Progress,
    check_unchanged,
    facts,
    fingerprint,
    frozen_parts,
    read_progress,
    restore_optimizer,
    restore_rng,
    restore_weights,
    tensors,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DEV_UTTERANCES = 256
"""How many utterances a measurement of the dev loss takes at most."""
_MAX_BAD_STEPS = 20
"""Steps in a row with an infinite or undefined gradient after which a run gives up."""


def train(recipe: Recipe) -> Path:
    """Train, or go on where an interrupted run of the same recipe stopped.

    Returns:
        The finished model's directory, ``out/model``.

    Raises:
        RecipeError: a file that the recipe needs is missing, or ``out`` holds another recipe's run.
        ValueError: the backend cannot run here, or the data cannot be used.
    """
    out, text = Path(recipe.out), dump_recipe(recipe)
    if faults := missing_files(recipe) + _taken(out, text):
        raise RecipeError(faults)
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if launch.read().rank == 0:
            write_text(out / "recipe.yaml", text)
    return _Run(recipe, out).run()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in words that something could not be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the run could not be written to {path}: {error}; make room there and allow writing, then "
            "give the same command again"
        ) from error


def _taken(out: Path, text: str) -> list[str]:
    """Say so where the folder holds what another recipe than ``text`` has trained."""
    saved, trained = out / "recipe.yaml", checkpoints(out / "checkpoints") or (out / "model").exists()
    if trained and saved.exists() and saved.read_text("utf-8") != text:
        return [f"out: {out} holds a run of another recipe ({saved}); choose another out, or remove that folder"]
    return []


class _Run:
    """One process's part of a run."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.backend = backend.current()
        self.device = self.backend.activate()
        self.ranks = Ranks(launch.read(), self.backend.collective, self.device)
        self.dtype = _DTYPES.get(recipe.precision, self.backend.dtypes[0])
        self.wordings, self.ignored_prompts = read_prompts(recipe.prompts)
        self.skipped: list[str] = []
        self.train_sources = self._read(recipe.data.train)
        self.dev_sources = self._read(recipe.data.dev)
        model, self.tokenizer = build(recipe, [u for source in self.train_sources for u in source.utterances])
        self.frozen = frozen_parts(model, recipe, self.ranks)
        self.sharded = recipe.sharding != "none" and self.ranks.size > 1
        if recipe.sharding != "none" and self.ranks.size > 1:
            shard(model, recipe.sharding, self.ranks, self.dtype)
        self.model: Trainee = model.to(self.device)
        self.blank = blank_batch(self.tokenizer.eos_token_id)
        self.start: TranscriptStart | None = None
        self.max_answer_tokens = recipe.data.max_answer_tokens
        if isinstance(model, WhisperEncoderDecoder):
            self.start = TranscriptStart.of(self.tokenizer)
            self.max_answer_tokens = min(self.max_answer_tokens or model.max_answer_tokens, model.max_answer_tokens)
        if self.sharded:
            self._settle_dtypes()
        self.data = {name: fingerprint(s.utterances) for name, s in zip(recipe.data.train, self.train_sources)}
        for stage in recipe.stages:  # what would end the last one is said before the first one begins
            freeze(self.model, stage)
            self._optimizers(stage)
            if not _serves(self.train_sources, stage):
                raise ValueError(
                    f"stage {stage.name!r}: no utterance of the training data carries the labels for any of its "
                    f"tasks: {', '.join(stage.tasks)}"
                )

    def run(self) -> Path:
        """Train all stages that are still to do, and write the model."""
        recipe, progress = self.recipe, Progress()
        damaged: list[str] = []
        found = newest_whole(self.out / "checkpoints", self.ranks, damaged.append)
        if found:
            check_unchanged(found, self.data, self.frozen)
            progress = read_progress(found)
            restore_weights(found, self.model, self.ranks)
            self.skipped = [*self._named(), *self.skipped]
        self.log = Log(self.out, recipe.steps, progress.step) if self.ranks.leads else Silence()
        self.saver = Saver(self.out / "checkpoints", recipe.keep_checkpoints, self.ranks, self.log.say)
        self._report_skipped()
        for message in [*damaged, *filter(None, [self.ignored_prompts])]:
            self.log.say(message)
        devices = f"{self.device}" if self.ranks.size == 1 else f"{self.ranks.size} × {self.device.type}"
        self.log.say(f"{devices}, {str(self.dtype).removeprefix('torch.')}, {_millions(self.model)} parameters")
        try:
            for index in range(progress.stage, len(recipe.stages)):
                if index > progress.stage:
                    progress = Progress(stage=index, step=progress.step)
                progress = self._stage(recipe.stages[index], progress, found)
                found = None
            self.saver.finish()
            self.skipped = self.ranks.gather(self.skipped)
        finally:
            self.saver.close()
            self._report_skipped()
            self.log.close()
        left_out = self.model.left_out() if isinstance(self.model, SpeechLLM) else ()
        weights = whole_state(self.model, self.ranks, left_out)
        if self.ranks.leads:
            with _writing(self.out / "model"):
                save_model(self.model, self.tokenizer, self.out / "model", model_card(recipe), weights)
        self.ranks.leave()
        return self.out / "model"

    def _stage(self, stage: Stage, progress: Progress, found: Path | None) -> Progress:
        """Train one stage from ``progress``, with the states of the checkpoint ``found`` if there is one."""
        parameters = freeze(self.model, stage)
        optimizer = self._optimizers(stage)
        if found is not None:
            restore_optimizer(found, optimizer, self.model, self.ranks)
            restore_rng(found, self.ranks)
        if progress.stage_step == 0:
            self.log.say(f"stage {stage.name}: {_millions(parameters)} parameters learn in {stage.steps} steps")
        recipe, feed = self.recipe, self._feed(stage, progress)
        self.model.train()
        began, sound, bad, reserved = time.perf_counter(), 0.0, 0, False
        while progress.stage_step < stage.steps:
            step = next(feed)
            factor = schedule(stage, progress.stage_step)
            losses = self._backward(stage, step)
            if not self.sharded:
                self.ranks.add_gradients(parameters)
            norm = clip(parameters, stage.clip)
            if torch.isfinite(norm):
                optimizer.step(factor)
                bad = 0
            else:
                bad += 1
                self.log.say(f"step {progress.step + 1}: the gradient is not finite; its update is left out")
                if bad == _MAX_BAD_STEPS:
                    raise ValueError(
                        f"{bad} steps in a row had no finite gradient: lower learning_rate, or set precision: float32"
                    )
            optimizer.zero_grad()
            if not reserved:
                self.saver.reserve(self._kept(progress, optimizer))
                reserved = True
            progress = Progress(progress.stage, progress.stage_step + 1, progress.step + 1, step.after)
            sound += sum(batch.seconds for batch in step.batches) * self.ranks.size
            if progress.step % recipe.log_every == 0:
                elapsed = time.perf_counter() - began
                row = {
                    "stage": stage.name,
                    "step": progress.step,
                    **{name: loss.item() for name, loss in losses.items()},
                    "learning_rate": stage.learning_rate * factor,
                    "gradient_norm": norm.item(),
                    "audio_hours_per_hour": sound / elapsed,
                    "epoch": step.after.epoch,
                }
                self.log.row(row)
                began, sound = time.perf_counter(), 0.0
            self.log.advance(stage.name)
            finished = progress.stage_step == stage.steps
            measured = finished or progress.step % recipe.dev_every == 0
            if measured and (self.ranks.leads or self.sharded) and _serves(self.dev_sources, stage):
                self.log.row({"stage": stage.name, "step": progress.step, "dev_loss": self._dev_loss(stage)})
            if finished or progress.step % recipe.checkpoint_every == 0:
                self._save(progress, optimizer)
        return progress

    def _save(self, progress: Progress, optimizer: Optimizers) -> None:
        """Begin to write a checkpoint."""
        trained = self._trained(progress)
        frozen = {part: known for part, known in self.frozen.items() if part not in trained}
        self.saver.save(progress.step, self._kept(progress, optimizer), facts(progress, self.ranks, self.data, frozen))
        self._name_skipped()

    def _kept(self, progress: Progress, optimizer: Optimizers) -> dict[str, Tensor]:
        return tensors(self.model, self._trained(progress), optimizer, self.ranks)

    def _trained(self, progress: Progress) -> set[str]:
        """Return the parts that the stages so far have trained."""
        return {part for stage in self.recipe.stages[: progress.stage + 1] for part in stage.trainable}

    @torch.no_grad()
    def _settle_dtypes(self) -> None:
        """Compute once as if all learned: FSDP settles then, for good, in which dtype the gradient of a block comes."""
        self.model.requires_grad_(True)
        self.model.eval()
        self._forward(self.recipe.stages[0], self.blank)
        reshard(self.model)

    def _optimizers(self, stage: Stage) -> Optimizers:
        if not self.recipe.device_adamw:
            return Optimizers(self.model, stage)
        if self.backend.adamw is None:
            raise ValueError(f"device_adamw: backend {self.backend.name!r} has no AdamW of its own; leave it out")
        if self.ranks.size > 1:
            raise ValueError(f"device_adamw works in one process alone, these are {self.ranks.size}; leave it out")
        return Optimizers(self.model, stage, self.backend.adamw)

    def _feed(self, stage: Stage, progress: Progress) -> Iterator[Step]:
        return steps(
            self.train_sources,
            stage.tasks,
            self._collator(stage),
            batch_seconds=stage.batch_seconds,
            micro_batch_seconds=stage.micro_batch_seconds,
            questions=stage.questions,
            shortest_first=stage.shortest_first,
            start=progress.position,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            workers=self.recipe.data.workers,
        )

    def _collator(self, stage: Stage, *, augment: bool = True) -> Collator:
        return Collator(
            tokenizer=self.tokenizer,
            n_mels=self.model.encoder.config.n_mels,
            seed=self.recipe.seed,
            spec_augment=stage.spec_augment if augment else None,
            max_seconds=min(self.recipe.data.max_seconds, self.model.encoder.config.max_seconds),
            wordings=self.wordings,
            stamp_seconds=self.recipe.stamp_seconds,
            max_answer_tokens=self.max_answer_tokens,
            start=self.start,
        )

    def _backward(self, stage: Stage, step: Step) -> dict[str, Tensor]:
        """Add up this rank's gradients of a step; losses are means over all its tokens, however it is cut."""
        batches = [batch for batch in step.batches if batch.examples]
        for batch in step.batches:
            self.skipped += batch.skipped
        spelled = 0
        if stage.ctc_weight and isinstance(self.model, SpeechLLM):
            spelled = sum(len(self.model.ctc_targets(t)) for batch in batches for t in batch.spellings)
        labels, units = self.ranks.counts(sum(batch.label_count for batch in batches), spelled)
        labels, units = max(1, labels), max(1, units)
        if self.sharded:
            batches += [self.blank] * (self.ranks.most(len(batches)) - len(batches))
        total, ctc_total = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for batch in batches:
            output = self._forward(stage, batch)
            loss = stage.llm_weight * output.loss_sum / labels
            if output.ctc_sum is not None:
                loss = loss + stage.ctc_weight * output.ctc_sum / units
            if loss.requires_grad:
                (loss if batch.examples else loss * 0).backward()  # type: ignore[no-untyped-call]
            if batch.examples:
                total += output.loss_sum.detach()
                ctc_total += 0 if output.ctc_sum is None else output.ctc_sum.detach()
        losses = {"loss": self.ranks.add(total) / labels} if stage.llm_weight else {}
        return {**losses, "ctc_loss": self.ranks.add(ctc_total) / units} if stage.ctc_weight else losses

    def _forward(self, stage: Stage, batch: Batch) -> SpeechLLMOutput:
        model = self.model
        features, _ = log_mel(
            batch.wave_BS.to(self.device), torch.tensor(batch.samples, device=self.device), model.encoder.config.n_mels
        )
        frames = [frame_count(n) for n in batch.samples]
        if batch.drawn is not None:
            features = apply(features, batch.drawn)
        layout = None
        if stage.llm_weight:
            layout = model.layout(frames, batch.prompts, batch.answers, batch.about).to(self.device)
        with self._autocast():
            output: SpeechLLMOutput = model(features, frames, layout, batch.spellings if stage.ctc_weight else None)
        return output

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    @torch.no_grad()
    def _dev_loss(self, stage: Stage) -> float | None:
        """Measure the stage's loss on the dev data, without augmentation; the same utterances every time."""
        seconds = stage.micro_batch_seconds or stage.batch_seconds
        plan = plan_epoch(self.dev_sources, stage.tasks, batch_seconds=seconds, seed=0, epoch=0)
        examples = [example for step in plan for example in step][:_DEV_UTTERANCES]
        collate = self._collator(stage, augment=False)
        self.model.eval()
        total, count = 0.0, 0
        for group in cut(sorted(examples, key=_falling), seconds):
            batch = collate(group, epoch=0)
            self.skipped += batch.skipped
            if not batch.examples:
                continue
            output = self._forward(stage, batch)
            if stage.llm_weight:
                total, count = total + output.loss_sum.item(), count + output.label_count
            elif output.ctc_sum is not None:
                total, count = total + output.ctc_sum.item(), count + output.ctc_count
        reshard(self.model)
        self.model.train()
        return total / count if count else None

    def _read(self, sources: Mapping[str, Source]) -> list[WeightedSource]:
        read = []
        for source in sources.values():
            utterances, skipped = read_source(source.path, self.recipe.data.max_seconds)
            self.skipped += skipped
            read.append(WeightedSource(utterances, source.weight))
        return read

    def _named(self) -> list[str]:
        """Read the names of what this run left out before it was interrupted."""
        path = self.out / "skipped.txt"
        return path.read_text("utf-8").splitlines() if path.exists() else []

    def _name_skipped(self) -> list[str]:
        """Name what was left out in ``out/skipped.txt``, each once."""
        lines = list(dict.fromkeys(self.skipped))
        if lines and self.ranks.leads:
            write_text(self.out / "skipped.txt", "\n".join(lines) + "\n")
        return lines

    def _report_skipped(self) -> None:
        """Name what was left out, on the terminal the first few."""
        if lines := self._name_skipped():
            for line in lines[:5]:
                self.log.say(f"skipped: {line}")
            self.log.say(f"{len(lines)} skipped in all; {self.out / 'skipped.txt'} names each")


def _serves(sources: Sequence[WeightedSource], stage: Stage) -> bool:
    """Whether any utterance carries the labels for any of the stage's tasks."""
    return any(servable(utterance, stage.tasks) for source in sources for utterance in source.utterances)


def _falling(example: Example) -> float:
    return -(example.utterance.duration or 0.0)


def _millions(parameters: torch.nn.Module | list[torch.nn.Parameter]) -> str:
    listed = parameters.parameters() if isinstance(parameters, torch.nn.Module) else parameters
    return f"{sum(p.numel() for p in listed) / 1e6:.2f} M"
