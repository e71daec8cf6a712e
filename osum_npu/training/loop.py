"""The training loop: stages, steps, checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osum_npu import backend, launch
from osum_npu.checkpoints.model_directory import save_model
from osum_npu.config import Recipe, RecipeError, Stage, dump_recipe, missing_files
from osum_npu.files import write_text
from osum_npu.models.speech_llm import SpeechLLM
from osum_npu.planning.fit import fit_warnings, present
from osum_npu.training.agreement import Notes
from osum_npu.training.build import Trainee, build
from osum_npu.training.card import model_card
from osum_npu.training.feed import Feed
from osum_npu.training.interrupt import Interrupt, Interrupted, report_saved
from osum_npu.training.log import Log, Silence, read_log
from osum_npu.training.meter import Meter
from osum_npu.training.optimizer import Optimizers, freeze, schedule
from osum_npu.training.profile import Profile
from osum_npu.training.ranks import Ranks
from osum_npu.training.saver import Saver, checkpoints, newest_whole
from osum_npu.training.sharding import reshard, shard, whole_state
from osum_npu.training.skipped import Skipped
from osum_npu.training.state import (
    Progress,
    check_unchanged,
    facts,
    frozen_parts,
    read_progress,
    restore_optimizer,
    restore_rng,
    restore_weights,
    tensors,
)
from osum_npu.training.step import Computation
from osum_npu.training.summary import summary
from osum_npu.training.validate import EarlyStop, dev_losses
from osum_npu.training.watch import STREAK, Rewind, Watch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(recipe: Recipe, *, time_limit: float | None = None, profile: int = 0) -> Path:
    """Train, or go on where an interrupted run of the same recipe stopped.

    Args:
        recipe: all of the training.
        time_limit: seconds from now after which the run saves and ends.
        profile: steps to record into ``out/profile``.

    Returns:
        The finished model's directory, ``out/model``.

    Raises:
        Interrupted: SIGTERM or the time limit has ended the run; all it did is saved.
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
    return _Run(recipe, out, time_limit).run(profile)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in words that something could not be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the run could not be written to {path}: {error}; make room there and allow writing, then give the same "
            "command again"
        ) from error


def _taken(out: Path, text: str) -> list[str]:
    """Say so where the folder holds what another recipe than ``text`` has trained."""
    saved, trained = out / "recipe.yaml", checkpoints(out / "checkpoints") or (out / "model").exists()
    if trained and saved.exists() and saved.read_text("utf-8") != text:
        return [f"out: {out} holds a run of another recipe ({saved}); choose another out, or remove that folder"]
    return []


class _Run:
    """One process's part of a run."""

    def __init__(self, recipe: Recipe, out: Path, time_limit: float | None = None) -> None:
        self.recipe, self.out = recipe, out
        self.interrupt, self.stopping = Interrupt(time_limit), False
        self.watch = Watch(out / "watch.json", recipe.spike_factor)
        self.backend = backend.current()
        self.device = self.backend.activate()
        self.ranks = Ranks(launch.read(), self.backend.collective, self.device)
        self.dtype = _DTYPES.get(recipe.precision, self.backend.training_dtype)
        self.skipped = Skipped(out / "skipped.txt", self.ranks)
        self.feed = Feed(recipe, self.ranks, self.skipped)
        model, self.tokenizer = build(recipe, self.feed.utterances, self.dtype)
        self.frozen = frozen_parts(model, recipe, self.ranks)
        self.sharded = recipe.sharding != "none" and self.ranks.size > 1
        if recipe.sharding != "none" and self.ranks.size > 1:
            shard(model, recipe.sharding, self.ranks, self.dtype)
        self.model: Trainee = model.to(self.device)
        self.meter = Meter(self.model, recipe.stages[0], self.device)
        self.notes = Notes(self.ranks, self.model)
        self.feed.serve(self.model, self.tokenizer)
        self.data = self.feed.fingerprints
        end = self.tokenizer.eos_token_id
        self.step = Computation(self.model, self.device, self.dtype, self.ranks, sharded=self.sharded, end=end)
        if self.sharded:
            self.step.settle_dtypes(recipe.stages)
        for stage in recipe.stages:  # what would end the last one is said before the first one begins
            freeze(self.model, stage)
            self._optimizers(stage)

    def run(self, profile: int = 0) -> Path:
        """Train all stages that are still to do, and write the model."""
        recipe, progress = self.recipe, Progress()
        damaged: list[str] = []
        found = newest_whole(self.out / "checkpoints", self.ranks, damaged.append)
        if found:
            progress = self._load(found)
            self.skipped.recall()
        self.log = self._open_log(progress)
        self.saver = Saver(self.out / "checkpoints", recipe.keep_checkpoints, self.ranks, self._say)
        self.best = Saver(self.out / "best", 2, self.ranks, self._say)
        steps = profile if self.ranks.leads else 0
        self.profile = Profile(steps, self.out / "profile", self.device, self.backend.profiler, self.log.say)
        self.skipped.report(self.log.say)
        for message in [*damaged, *filter(None, [self.feed.ignored_prompts])]:
            self.log.say(message)
        devices = f"{self.device}" if self.ranks.size == 1 else f"{self.ranks.size} × {self.device.type}"
        self.log.say(f"{devices}, {str(self.dtype).removeprefix('torch.')}, {_millions(self.model)} parameters")
        if self.dtype is torch.bfloat16 and self.backend.training_dtype is torch.float32:
            self.log.say(
                f"warning: this {self.device.type} has no instructions for bfloat16, so the run may take a hundred "
                "times as long as in float32; precision: auto takes what is fast"
            )
        for warning in self._fit_warnings():
            self.log.say(f"warning: {warning}")
        try:
            with self.interrupt:
                self._stages(progress, found)
            self.saver.finish()
            self.skipped.gather()
        except Interrupted as end:
            self.skipped.gather()
            self.ranks.leave()  # launchers kill the other ranks once one has ended so
            report_saved(str(end))
            raise
        finally:
            self.saver.close()
            self.best.close()
            self.profile.close()
            self.skipped.report(self.log.say)
            self.log.close()
        left_out = self.model.left_out() if isinstance(self.model, SpeechLLM) else ()
        weights = whole_state(self.model, self.ranks, left_out)
        if self.ranks.leads:
            with _writing(self.out / "model"):
                save_model(self.model, self.tokenizer, self.out / "model", model_card(recipe), weights)
            print(summary(read_log(self.out / "log.jsonl")))
        self.ranks.leave()
        return self.out / "model"

    def _fit_warnings(self) -> list[str]:
        if not self.ranks.leads or not isinstance(self.model, SpeechLLM) or (here := present(self.device)) is None:
            return []
        return fit_warnings(self.recipe, self.model, self.dtype, here, self.ranks.size)

    def _stages(self, progress: Progress, found: Path | None) -> None:
        """Train all stages from ``progress`` on."""
        while True:
            try:
                progress = self._stage(self.recipe.stages[progress.stage], progress, found)
            except Rewind as turn:
                progress, found = self._rewind(turn)
                continue
            if progress.stage == len(self.recipe.stages) - 1:
                return
            progress, found = Progress(stage=progress.stage + 1, step=progress.step), None

    def _stage(self, stage: Stage, progress: Progress, found: Path | None) -> Progress:
        """Train one stage from ``progress``, with the states of the checkpoint ``found`` if there is one."""
        parameters = freeze(self.model, stage)
        optimizer = self._optimizers(stage)
        if found is not None:
            if progress.stage_step:
                restore_optimizer(found, optimizer, self.model, self.ranks)
            restore_rng(found, self.ranks)
        if progress.stage_step == 0:
            self.watch.begin_stage()
            self.log.say(f"stage {stage.name}: {_millions(parameters)} parameters learn in {stage.steps} steps")
        recipe, self.meter = self.recipe, Meter(self.model, stage, self.device)
        feed = self.meter.timed(self.feed.steps(stage, progress.position))
        early = self._early_stop(stage, progress)
        self.model.train()
        reserved = False
        while progress.stage_step < stage.steps:
            self.profile.tick()
            step = next(feed)
            factor = schedule(stage, progress.stage_step)
            for batch in step.batches:
                self.skipped.add(batch.skipped)
            losses, self.stopping = self.step.backward(stage, step.batches, self.meter, self.interrupt.wanted)
            norm = self.step.clip(parameters, stage.clip)
            # the one time in a step that the host waits for the device: whether to update depends on these
            values = torch.stack([norm.float(), *losses.values()]).tolist()
            numbers = dict(zip(["gradient_norm", *losses], values))
            if fault := self.watch.fault(numbers, stage.clip):
                self.log.say(f"step {progress.step + 1}: {fault}; its update is left out")
            else:
                optimizer.step(factor)
            optimizer.zero_grad()
            if not reserved:
                self.saver.reserve(self._kept(progress, optimizer))
                reserved = True
            progress = Progress(progress.stage, progress.stage_step + 1, progress.step + 1, step.after)
            if progress.step % recipe.log_every == 0:
                notes, warning = self.notes.compare(self.meter, progress.step)
                rates = {"learning_rate": stage.learning_rate * factor, **notes}
                row = {**numbers, **rates, "left_out": self.watch.left_out, "epoch": step.after.epoch}
                self.log.row({"stage": stage.name, "step": progress.step, **row})
                if warning:
                    self.log.say(f"step {progress.step}: {warning}")
            self.log.advance(stage.name)
            if self.watch.streak == STREAK:
                raise self.watch.rewind(progress, fault)
            finished = progress.stage_step == stage.steps
            if finished or progress.step % recipe.dev_every == 0:
                finished |= self._validate(stage, progress, optimizer, early)
            if finished:
                progress = replace(progress, stage_step=stage.steps)
            # none of weights that may be at fault, unless there is no later time
            due = progress.step % recipe.checkpoint_every == 0 and not self.watch.streak
            if finished or due or self.stopping:
                self._save(progress, optimizer)
            if self.stopping:
                self.saver.finish(needed=True)
                raise Interrupted(f"saved after step {progress.step}; the same command goes on from there")
        return progress

    def _validate(self, stage: Stage, progress: Progress, optimizer: Optimizers, early: EarlyStop | None) -> bool:
        """Measure the dev loss; say whether to end the stage early. With patience, it ends with its best weights."""
        mine = [0, 0, 0]
        measures = self.ranks.leads or self.sharded  # of a shared model, each computes all: they meet in every block
        if measures and self.feed.measures(stage) and (losses := self._dev_losses(stage)):
            self.log.row({"stage": stage.name, "step": progress.step, **losses})
            if early is not None and self.ranks.leads:
                mine = [int(early.better(progress.step, losses["dev_loss"])), int(early.enough), early.step]
        if early is None:
            return False
        better, enough, best = self.ranks.counts(*mine)
        if better:
            self.best.save(progress.step, self._kept(progress, optimizer), self._facts(progress))
        if best and (enough or progress.stage_step == stage.steps):
            self.best.finish(needed=True)
            restore_weights(self.out / "best" / f"step_{best:08d}", self.model, self.ranks)
            self.log.say(f"stage {stage.name} ends after step {progress.step} with the weights of step {best}")
        return bool(enough)

    def _save(self, progress: Progress, optimizer: Optimizers) -> None:
        """Begin to write a checkpoint."""
        self.best.finish()  # a run that goes on from here looks for it
        if self.ranks.leads:
            self.watch.save(progress.step, self.recipe.keep_checkpoints)
        self.saver.save(progress.step, self._kept(progress, optimizer), self._facts(progress))
        self.skipped.write()

    def _kept(self, progress: Progress, optimizer: Optimizers) -> dict[str, Tensor]:
        return tensors(self.model, self._trained(progress), optimizer, self.ranks)

    def _facts(self, progress: Progress) -> dict[str, Any]:
        trained = self._trained(progress)
        frozen = {part: known for part, known in self.frozen.items() if part not in trained}
        return facts(progress, self.ranks, self.data, frozen)

    def _trained(self, progress: Progress) -> set[str]:
        """Return the parts that the stages so far have trained; at a stage's end, with those of the next.

        A run that rewinds to the beginning of a stage needs what the stage trains as it was then.
        """
        stages = self.recipe.stages
        ended = progress.stage_step == stages[progress.stage].steps
        return {part for stage in stages[: progress.stage + 1 + ended] for part in stage.trainable}

    def _early_stop(self, stage: Stage, progress: Progress) -> EarlyStop | None:
        """Begin to wait for a better dev loss, or go on from what the log says."""
        if stage.patience is None:
            return None
        self._remove(self.out / "best", progress.step)
        rows = [row for row in read_log(self.out / "log.jsonl") if row["step"] <= progress.step]
        return EarlyStop(stage.patience, [row for row in rows if row["stage"] == stage.name])

    def _load(self, checkpoint: Path) -> Progress:
        """Take the weights of a checkpoint; return where it stood."""
        check_unchanged(checkpoint, self.data, self.frozen)
        progress = read_progress(checkpoint)
        restore_weights(checkpoint, self.model, self.ranks)
        self.watch.load(progress.step)
        return progress

    def _rewind(self, turn: Rewind) -> tuple[Progress, Path]:
        """Go back to an earlier checkpoint of this stage, and on with the data behind the updates left out."""
        folder, at = self.out / "checkpoints", turn.progress
        self.saver.finish()
        left_out, rewinds = self.watch.left_out, self.watch.rewinds + 1
        found = self.watch.target({path: read_progress(path) for path in checkpoints(folder)}, turn)
        progress = self._load(found)
        self.watch.left_out, self.watch.rewinds, self.watch.streak = left_out, rewinds, 0
        self.ranks.counts(0)  # all have read it
        self._remove(folder, progress.step)
        self.log.close()
        self.log = self._open_log(progress)
        self.log.say(f"step {at.step}: {turn}; rewound to step {progress.step}, on with the data behind")
        stage_step = progress.stage_step if progress.stage == at.stage else 0
        return Progress(at.stage, stage_step, progress.step, at.position), found

    def _remove(self, folder: Path, step: int) -> None:
        """Remove the checkpoints of later steps."""
        for later in checkpoints(folder) if self.ranks.leads else ():
            if read_progress(later).step > step:
                shutil.rmtree(later)

    def _say(self, message: str) -> None:
        self.log.say(message)  # whichever is open: a rewind opens another

    def _open_log(self, progress: Progress) -> Log:
        return Log(self.out, self.recipe.steps, progress.step) if self.ranks.leads else Silence()

    def _optimizers(self, stage: Stage) -> Optimizers:
        if not self.recipe.device_adamw:
            return Optimizers(self.model, stage, ranks=self.ranks)
        if self.backend.adamw is None:
            raise ValueError(f"device_adamw: backend {self.backend.name!r} has no AdamW of its own; leave it out")
        if self.ranks.size > 1:
            raise ValueError(f"device_adamw works in one process alone, these are {self.ranks.size}; leave it out")
        return Optimizers(self.model, stage, self.backend.adamw)

    def _dev_losses(self, stage: Stage) -> dict[str, float]:
        """Measure the stage's loss on the dev data, without augmentation."""
        self.model.eval()
        collate, forward = self.feed.collator(stage, augment=False), partial(self.step.forward, stage)
        losses, skipped = dev_losses(self.feed.dev, stage, collate, forward)
        self.skipped.add(skipped)
        reshard(self.model)
        self.model.train()
        return losses


def _millions(parameters: torch.nn.Module | list[torch.nn.Parameter]) -> str:
    listed = parameters.parameters() if isinstance(parameters, torch.nn.Module) else parameters
    return f"{sum(p.numel() for p in listed) / 1e6:.2f} M"
