"""A plan as a table for people, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from osum_npu.planning.estimate import StagePlan


def warnings(plans: Sequence[StagePlan]) -> list[str]:
    """Return a line for every stage that does not fit its device."""
    return [
        f"stage {one.stage!r} does not fit {one.device}: it needs {_gb(one.memory_bytes)} of {_gb(one.capacity)} GB; "
        + (f"set micro_batch_seconds to {one.largest_seconds:g} or less" if one.largest_seconds else _NOTHING_FITS)
        for one in plans
        if not one.fits
    ]


_NOTHING_FITS = "not even one utterance does: try activation_checkpointing: true, and sharding: full on several devices"


def format_plans(plans: Sequence[StagePlan]) -> str:
    """Write plans side by side, a column each."""
    rows = [("", [f"{one.stage}" for one in plans]), ("device", [f"{one.devices} × {one.device}" for one in plans])]
    rows += [("parameters, million", [f"{one.parameters / 1e6:,.1f}" for one in plans])]
    rows += [("trainable, million", [f"{one.trainable / 1e6:,.2f}" for one in plans])]
    rows += [("utterances at once", [f"{one.utterances} × {one.micro_batches}" for one in plans])]
    parts = [part for part in plans[0].memory if any(one.memory[part] for one in plans)]
    rows += [(f"  {part}, GB", [_gb(one.memory[part]) for one in plans]) for part in parts]
    rows += [("memory, GB", [_gb(one.memory_bytes) for one in plans])]
    rows += [("of the device, GB", [_gb(one.capacity) for one in plans])]
    rows += [("fits", ["yes" if one.fits else "NO" for one in plans])]
    rows += [("largest at once, s of sound", [f"{one.largest_seconds:,.0f}" for one in plans])]
    rows += [("step, s", [f"{one.step_seconds:.3f}" for one in plans])]
    rows += [("  of it communication, s", [f"{one.communication_seconds:.3f}" for one in plans])]
    rows += [("communication, GB a device", [_gb(one.communication_bytes) for one in plans])]
    rows += [("model flops, T a device", [f"{one.flops / 1e12:,.2f}" for one in plans])]
    rows += [("MFU", [f"{one.utilization:.1%}" for one in plans])]
    rows += [("audio hours an hour", [f"{one.audio_hours_per_hour:,.0f}" for one in plans])]
    rows += [("steps", [f"{one.steps:,}" for one in plans])]
    rows += [("time to finish, h", [f"{one.hours:,.2f}" for one in plans])]
    widths = [max(len(cells[i]) for _, cells in rows) + 2 for i in range(len(plans))]
    head = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{name:<{head}}{''.join(f'{cell:>{width}}' for cell, width in zip(cells, widths))}" for name, cells in rows
    )


def as_json(plans: Sequence[StagePlan]) -> list[dict[str, Any]]:
    """Return plans as plain values: bytes, seconds and counts."""
    more = ("memory_bytes", "fits", "hours")
    return [{**asdict(one), **{name: getattr(one, name) for name in more}} for one in plans]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"
