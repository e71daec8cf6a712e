"""Which updates of the weights are left out, and when a run goes back to an earlier checkpoint.

An update is left out where its gradient or a loss is not finite, or where either is far above what the stage has seen
of late. If that does not end, the weights are at fault: the run rewinds to a checkpoint of better days and goes on with
the data behind, which is what the builders of PaLM did by hand (Chowdhery et al., PaLM, 2022, section 5.1).
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from osum_npu.files import write_text
from osum_npu.training.state import Progress

STREAK = 10
"""Updates left out in a row after which the run rewinds."""
MAX_REWINDS = 3
"""Rewinds of a run; after these it gives up."""
WINDOW = 64
"""Updates whose median is the usual value."""
KNOWN = 16
"""Updates of a stage after which a usual value is known."""
HARMLESS_LOSS = 1.0
"""Nats. A lower loss is no spike, however small the usual one."""


class Rewind(Exception):  # noqa: N818  a turn of the run, no error
    """The weights are at fault; its words say why."""

    def __init__(self, words: str, progress: Progress) -> None:
        """Carry where the run stood when it was found out."""
        super().__init__(words)
        self.progress = progress


class Watch:
    """Judges every update of a run. All ranks see the same numbers, so they judge alike."""

    def __init__(self, path: Path, spike_factor: float | None) -> None:
        """Begin with nothing known.

        Args:
            path: a file of the run, to remember in.
            spike_factor: how far above the usual value is a spike; ``None`` leaves out what is not finite alone.
        """
        self.path, self.spike_factor = path, spike_factor
        self.rewinds = 0
        self.left_out = 0
        """Updates left out since the run began."""
        self.streak = 0
        """Updates left out in a row."""
        self.seen: dict[str, deque[float]] = {}

    def begin_stage(self) -> None:
        """Forget what was usual: a stage has losses and gradients of its own."""
        self.seen, self.streak = {}, 0

    def fault(self, numbers: Mapping[str, float], clip: float) -> str:
        """Say why the update is to be left out; empty where it is sound.

        Args:
            numbers: ``gradient_norm`` and the losses of the step, over all ranks.
            clip: norm to which gradients are cut; one within it does no harm.
        """
        reason = next((words for name, value in numbers.items() if (words := self._spike(name, value, clip))), "")
        if reason:
            self.streak, self.left_out = self.streak + 1, self.left_out + 1
        else:
            self.streak = 0
            for name, value in numbers.items():
                if value > 0:  # a step whose data all failed has no gradient
                    self.seen.setdefault(name, deque(maxlen=WINDOW)).append(value)
        return reason

    def _spike(self, name: str, value: float, clip: float) -> str:
        words = name.replace("_", " ")
        if not math.isfinite(value):
            return f"the {words} is not finite"
        seen = self.seen.get(name, ())
        harmless = clip if name == "gradient_norm" else HARMLESS_LOSS
        if self.spike_factor is None or len(seen) < KNOWN or value <= harmless:
            return ""
        usual = median(seen)
        return f"the {words} is {value:.4g}, usual is {usual:.4g}" if value > self.spike_factor * usual else ""

    def rewind(self, progress: Progress, fault: str) -> Rewind:
        """Return what turns the run back."""
        return Rewind(f"{self.streak} updates in a row were left out, the last because {fault}", progress)

    def target(self, found: Mapping[Path, Progress], turn: Rewind) -> Path:
        """Choose where to rewind to: the newest checkpoint of the stage from which an update was made that stayed.

        The end of the stage before counts as one: it is this stage's beginning.

        Args:
            found: checkpoints of the run, oldest first, and where each stands.
            turn: of this run.

        Raises:
            ValueError: there is none, or the run has rewound too often.
        """
        at = turn.progress
        begin, end = at.step - at.stage_step, at.step - self.streak
        older = [path for path, then in found.items() if begin <= then.step < end]
        if older and self.rewinds < MAX_REWINDS:
            return older[-1]
        tried = f"after {self.rewinds} rewinds" if older else "with no earlier checkpoint of this stage to rewind to"
        raise ValueError(f"step {at.step}: {turn}, {tried}: lower learning_rate, or set precision: float32")

    def save(self, step: int, keep: int) -> None:
        """Remember what is known at a checkpoint, beside what was known at those before it.

        Args:
            step: of the checkpoint, which must not be there yet.
            keep: how many checkpoints there are before it, at most.
        """
        known = {"rewinds": self.rewinds, "left_out": self.left_out, "streak": self.streak}
        seen = {name: list(values) for name, values in self.seen.items()}
        kept = [(n, state) for n, state in self._remembered().items() if int(n) < step][-keep:]
        write_text(self.path, json.dumps({**dict(kept), str(step): {**known, "seen": seen}}))

    def load(self, step: int) -> None:
        """Know what was known at a checkpoint; nothing, where nothing was remembered."""
        state = self._remembered().get(str(step), {})
        self.rewinds, self.left_out, self.streak = (state.get(name, 0) for name in ("rewinds", "left_out", "streak"))
        self.seen = {name: deque(values, maxlen=WINDOW) for name, values in state.get("seen", {}).items()}

    def _remembered(self) -> dict[str, Any]:
        return json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
