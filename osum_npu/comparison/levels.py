"""The four levels of a comparison, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from osum_npu import functional, parity  # noqa: F401  functional fills the registry
from osum_npu.comparison.modules import check_modules
from osum_npu.comparison.tape import Tape
from osum_npu.comparison.training import Curve, check_model, train_both
from osum_npu.op import REGISTRY
from osum_npu.parity import Row

LEVELS = ("ops", "modules", "model", "run")


def compare_levels(
    levels: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device, steps: int, tape: Tape
) -> tuple[list[Row], list[Curve]]:
    """Hold a device to the reference.

    Args:
        levels: some of :data:`LEVELS`.
        dtypes: to compute in.
        device: an active one.
        steps: of the training at level ``run``.
        tape: records what the device computed.

    Returns:
        A row for everything compared, and the losses of each training.
    """
    rows: list[Row] = []
    curves: list[Curve] = []
    jobs = [(level, dtype) for level in LEVELS if level in levels for dtype in dtypes]
    for level, dtype in (bar := tqdm(jobs, unit="part", leave=False)):
        bar.set_description(f"{level} {parity.short(dtype)}")
        if level == "ops":
            for op in REGISTRY.values():
                rows += parity.check(op, parity.serving(op, dtype, device), dtype, device, tape.add)
        elif level == "modules":
            rows += check_modules(dtype, device, tape.add)
        elif level == "model":
            rows += check_model(dtype, device, tape.add)
        else:
            row, curve = train_both(dtype, device, steps, tape.add)
            rows.append(row)
            curves.append(curve)
    return rows, curves
