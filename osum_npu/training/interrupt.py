"""A run that is asked to end early: it finishes its step, saves, and asks to be started again.

It is asked by SIGTERM, as launchers and schedulers do, or by a limit of time. Each rank may be asked at another moment,
or one alone, so the ranks agree in every step (see ``loop.py``).
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from osum_npu.files import write_text

STATUS = 75
"""Exit status of a run that saved before its end: EX_TEMPFAIL of sysexits.h, "try again"."""
SAVED = "OSUM_SAVED"
"""Environment variable with the file to write once all is saved: both launchers hide the status of a rank."""
_ECHO_SECONDS = 2.0
"""A signal so soon after the first is the same one: a scheduler and a launcher may both have sent it."""
_LIMIT = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")


class Interrupted(Exception):  # noqa: N818  as KeyboardInterrupt, this is no error
    """The run has ended early; all it did is saved."""


class Interrupt:
    """Notices that the run has to end; to be used by ``with``."""

    def __init__(self, time_limit: float | None = None) -> None:
        """Start the clock.

        Args:
            time_limit: seconds from now after which the run has to end.
        """
        self.began, self.time_limit = time.monotonic(), time_limit
        self.asked: float | None = None
        self.before: Any = signal.SIG_DFL

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)

    @property
    def wanted(self) -> bool:
        """Whether this process has been asked to end."""
        out_of_time = self.time_limit is not None and time.monotonic() - self.began >= self.time_limit
        return out_of_time or self.asked is not None

    def _ask(self, number: int, _: FrameType | None) -> None:
        """Note the first signal; the second ends the process at once."""
        if self.asked is None:
            self.asked = time.monotonic()
        elif time.monotonic() - self.asked > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def report_saved(words: str) -> None:
    """Write ``words`` to the file that :data:`SAVED` names, if any."""
    if path := os.environ.get(SAVED):
        write_text(Path(path), words + "\n")


def read_time_limit(text: str) -> float:
    """Return the seconds of a limit as schedulers write it: ``3:50:00``, ``1-12:00:00``.

    Raises:
        ValueError: it has another form.
    """
    if not (found := _LIMIT.fullmatch(text)):
        raise ValueError(f"time limit {text!r}: wanted hours:minutes:seconds, as 3:50:00, or with days, as 1-12:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
