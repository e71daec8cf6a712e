"""What a training came to, on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import Any

_HEAD = ("stage", "last step", "loss", "dev loss", "best", "audio h/h", "waiting")


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Make a table of the stages from the rows of a log.

    A loss is that of the first and of the last row; with two losses, that of the answers. ``audio h/h`` and ``waiting``
    are medians of the rows.
    """
    lines = [_HEAD]
    for stage, group in groupby(rows, key=lambda row: str(row["stage"])):
        mine = list(group)
        dev = [row["dev_loss"] for row in mine if row.get("dev_loss") is not None]
        steps = [row for row in mine if "learning_rate" in row]
        name = "loss" if any("loss" in row for row in steps) else "ctc_loss"
        speeds = [row["audio_hours_per_hour"] for row in steps]
        waits = [row["waiting_share"] for row in steps if "waiting_share" in row]
        lines.append(
            (
                stage,
                str(mine[-1]["step"]),
                f"{steps[0][name]:.3f} → {steps[-1][name]:.3f}" if steps else "",
                f"{dev[-1]:.3f}" if dev else "",
                f"{min(dev):.3f}" if dev else "",
                f"{median(speeds):.0f}" if speeds else "",
                f"{median(waits):.0%}" if waits else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
