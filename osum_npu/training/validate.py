"""The loss on held-out data during a training, as a whole and by task; and when a stage has learned enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from osum_npu.config import Stage
from osum_npu.data.collate import Batch, Collator
from osum_npu.data.plan import Example, WeightedSource, cut, plan_epoch
from osum_npu.models.speech_llm import SpeechLLMOutput

UTTERANCES = 256
"""How many utterances a measurement takes at most."""


@torch.no_grad()
def dev_losses(
    sources: Sequence[WeightedSource], stage: Stage, collate: Collator, forward: Callable[[Batch], SpeechLLMOutput]
) -> tuple[dict[str, float], list[str]]:
    """Measure the stage's loss: ``dev_loss`` over all tokens, and ``dev_loss/TASK`` over those of each task.

    Args:
        sources: the dev data; the same utterances are taken every time.
        stage: whose tasks are asked; it learns answers, or with ``llm_weight`` 0 spellings.
        collate: makes batches, without augmentation.
        forward: computes the losses of a batch.

    Returns:
        The losses, in nats a token; and what could not be read.
    """
    seconds = stage.micro_batch_seconds or stage.batch_seconds
    plan = plan_epoch(sources, stage.tasks, batch_seconds=seconds, seed=0, epoch=0)
    by_task: dict[str, list[Example]] = {}
    for example in [example for step in plan for example in step][:UTTERANCES]:
        by_task.setdefault(example.tasks[0].name, []).append(example)
    sums: dict[str, tuple[float, int]] = {}
    skipped: list[str] = []
    for task, examples in sorted(by_task.items()):
        total, count = 0.0, 0
        for group in cut(sorted(examples, key=_falling), seconds):
            batch = collate(group, epoch=0)
            skipped += batch.skipped
            if not batch.examples:
                continue
            output = forward(batch)
            if stage.llm_weight:
                total, count = total + output.loss_sum.item(), count + output.label_count
            elif output.ctc_sum is not None:
                total, count = total + output.ctc_sum.item(), count + output.ctc_count
        if count:
            sums[task] = total, count
    losses = {f"dev_loss/{task}": total / count for task, (total, count) in sums.items()}
    if sums:
        losses = {"dev_loss": sum(t for t, _ in sums.values()) / sum(n for _, n in sums.values()), **losses}
    return losses, skipped


class EarlyStop:
    """Knows the best of a stage's dev losses, and when to stop waiting for a better one."""

    def __init__(self, patience: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Begin, or go on.

        Args:
            patience: measurements without a better loss after which it is enough.
            rows: of the stage's log so far.
        """
        self.patience, self.loss, self.step, self.waited = patience, float("inf"), 0, 0
        for row in rows:
            if "dev_loss" in row:
                self.better(row["step"], row["dev_loss"])

    def better(self, step: int, loss: float) -> bool:
        """Take a measurement; say whether it is the best so far."""
        if loss < self.loss:
            self.loss, self.step, self.waited = loss, step, 0
            return True
        self.waited += 1
        return False

    @property
    def enough(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience


def _falling(example: Example) -> float:
    return -example.utterance.seconds
