"""What a training writes down: JSON lines, TensorBoard where it is installed, a progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from osum_npu.files import write_text


class Log:
    """Writes ``out/log.jsonl`` and ``out/tensorboard``, and shows progress on the terminal."""

    def __init__(self, out: Path, total_steps: int, done_steps: int) -> None:
        """Open the log.

        Args:
            out: folder of the run.
            total_steps: of the run.
            done_steps: where the run goes on; rows of later steps, written before a kill, are dropped.
        """
        self.path = out / "log.jsonl"
        kept = [row for row in read_log(self.path) if row["step"] <= done_steps]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=done_steps + 1)
        except ImportError:
            pass  # the extra `train` brings it; the same numbers are in log.jsonl
        self.bar = tqdm(total=total_steps, initial=done_steps, unit="step", smoothing=0.05)

    def advance(self, stage: str) -> None:
        """Move the bar by one step."""
        self.bar.set_description(stage, refresh=False)
        self.bar.update()

    def row(self, row: dict[str, Any]) -> None:
        """Write one row of numbers."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in row.items():
                if name not in ("step", "stage") and isinstance(value, int | float):
                    self.board.add_scalar(name, value, row["step"])
        if "audio_hours_per_hour" in row:
            loss, wait = row.get("loss", row.get("ctc_loss")), row["waiting_share"]
            words = f"loss {loss:.3f}, {row['audio_hours_per_hour']:.0f} h/h, waiting {wait:.0%}"
            self.bar.set_postfix_str(words, refresh=False)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.bar.write(message)

    def close(self) -> None:
        """Finish."""
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()


class Silence(Log):
    """The log of a rank that writes nothing."""

    def __init__(self) -> None:
        """Open nothing."""

    def advance(self, stage: str) -> None:
        """Show nothing."""

    def row(self, row: dict[str, Any]) -> None:
        """Write nothing."""

    def say(self, message: str) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Close nothing."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a log; a last line torn by a kill is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
