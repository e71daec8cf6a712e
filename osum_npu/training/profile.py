"""A trace of a few steps of a training, and the operators that take the most time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from osum_npu.files import write_text

WARM_STEPS = 3
"""Steps before the first recorded one: libraries choose and prepare their kernels in them."""
_ROWS = 20
"""Operators in the table."""


class Profile:
    """Records some steps into a folder."""

    def __init__(
        self,
        steps: int,
        folder: Path,
        device: torch.device,
        own: Callable[[Path], Any] | None,
        say: Callable[[str], None],
    ) -> None:
        """Wait for the first step.

        Args:
            steps: how many to record; 0 records nothing.
            folder: for the trace.
            device: of this process.
            own: the backend's profiler, where it has one.
            say: tells people.
        """
        self.steps, self.folder, self.device, self.own, self.say = steps, folder, device, own, say
        self.seen = 0
        self.recorder: Any = None

    def tick(self) -> None:
        """Note that a step begins."""
        self.seen += 1
        if self.steps and self.seen == WARM_STEPS + 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.recorder = self.own(self.folder) if self.own else profile()
            self.recorder.start()
        elif self.seen == WARM_STEPS + 1 + self.steps:
            self.close()

    def close(self) -> None:
        """Write down what was recorded, if anything."""
        if self.recorder is None:
            if self.steps and self.seen <= WARM_STEPS:
                self.say(f"profile: nothing recorded, the first {WARM_STEPS} steps are left out")
            return
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        recorder, self.recorder, self.steps = self.recorder, None, 0
        recorder.stop()
        if self.own is None:
            recorder.export_chrome_trace(str(self.folder / "trace.json"))
            longest = "self_cpu_time_total" if self.device.type == "cpu" else "self_device_time_total"
            table = recorder.key_averages().table(sort_by=longest, row_limit=_ROWS, max_name_column_width=50)
            write_text(self.folder / "operators.txt", table)
            self.say(table)
        self.say(f"profile: {self.folder}")
