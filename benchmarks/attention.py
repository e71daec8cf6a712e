"""Attention on the chosen backend against its reference: forward and backward, medians in milliseconds.

OSUM_BACKEND=cpu python benchmarks/attention.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from osum_npu import backend, functional

REPEATS = 15


def median(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 3):
        began = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:]) * 1e3


def run(way: Callable[..., Tensor], inputs: list[Tensor], mask: Tensor | None) -> None:
    way(*inputs, mask_BTS=mask).sum().backward()


def main() -> None:
    device = backend.current().activate()
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("B    T     H  D   dtype     mask   reference      chosen       ratio")
    for B, T, H, D in [(16, 96, 4, 48), (48, 128, 4, 48), (4, 1500, 6, 64)]:
        for dtype in (torch.float32, torch.bfloat16):
            for masked in (False, True):
                inputs = [torch.randn(B, T, H, D, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
                mask = (torch.arange(T, device=device) < T - 3).expand(B, 1, T) if masked else None
                slow = median(partial(run, functional.attention.reference, inputs, mask), device)
                fast = median(partial(run, functional.attention, inputs, mask), device)
                print(
                    f"{B:<4} {T:<5} {H:<2} {D:<3} {str(dtype)[6:]:<9} {masked!s:<6} "
                    f"{slow:8.2f} ms  {fast:8.2f} ms  {slow / fast:6.2f}"
                )


if __name__ == "__main__":
    main()
