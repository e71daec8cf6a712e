"""Samples of what a device computed, small enough to carry to another machine."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from osum_npu.parity import VANISHING, Row

_SAMPLES = 64
"""Entries kept of a tensor."""


class Tape:
    """Root-mean-square and some entries of named tensors.

    Names begin with level, op or module, dtype and case, with ``/`` between them.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.samples: dict[str, npt.NDArray[np.float32]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a sample: the root-mean-square, then entries at places that follow from the name."""
        flat = tensor.detach().cpu().to(torch.float64).flatten()
        places = np.random.RandomState(zlib.crc32(name.encode())).randint(0, max(1, flat.numel()), _SAMPLES)
        picked = flat[torch.from_numpy(np.unique(places))] if flat.numel() else flat
        size = flat.square().mean().sqrt() if flat.numel() else flat.new_zeros(())
        self.samples[name] = torch.cat([size[None], picked]).numpy().astype(np.float32)

    def save(self, path: Path) -> None:
        """Write a compressed ``.npz``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, device=np.array(self.device), **self.samples)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Tape:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: there is no such file, or it is none of :meth:`save`.
        """
        try:
            with np.load(path) as file:
                tape = cls(str(file["device"]))
                tape.samples = {name: file[name] for name in file.files if name != "device"}
        except (OSError, ValueError, KeyError) as fault:
            raise ValueError(f"{path} is no recording of osum-npu parity --save: {fault}") from fault
        return tape

    def against(self, other: Tape, rows: list[Row]) -> list[Row]:
        """Compare with a recording made elsewhere.

        Args:
            other: the recording.
            rows: of this run: what was compared with the reference, with the tolerances.

        Returns:
            One row for each of ``rows`` that both machines computed. Each may be off by its tolerance, so twice that
            is allowed between the two.
        """
        compared = []
        for row in rows:
            tag = f"{row.level}/{row.name}/{row.dtype}/{row.case.partition(':')[0]}/"
            names = [name for name in self.samples if name.startswith(tag) and name in other.samples]
            if not names:
                continue
            forward = self._worst(other, [name for name in names if "/gradient" not in name])
            backward = self._worst(other, [name for name in names if "/gradient" in name])
            compared.append(
                replace(
                    row,
                    provider=f"against {other.device}",
                    forward_error=forward,
                    gradient_error=backward,
                    tolerance=(2 * row.tolerance[0], 2 * row.tolerance[1]),
                )
            )
        return compared

    def _worst(self, other: Tape, names: list[str]) -> float:
        """Return the largest difference over a tensor's size; what vanishes beside the others counts by the largest."""
        largest = max((float(other.samples[name][0]) for name in names), default=0.0)
        worst = 0.0
        for name in names:
            mine, theirs = self.samples[name].astype(np.float64), other.samples[name].astype(np.float64)
            if mine.shape != theirs.shape:
                return math.inf
            size = theirs[0] if theirs[0] >= VANISHING * largest else largest
            difference = float(np.abs(mine - theirs).max())
            error = 0.0 if difference == 0 else difference / size if size else math.inf
            worst = float(np.max([worst, error]))  # which keeps a NaN, as max() does not
        return worst
