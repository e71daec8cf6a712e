"""What the choice of an implementation costs a call: an op against its implementation called directly.

python benchmarks/dispatch.py
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable
from typing import Any

import torch

from osum_npu import backend, functional

CALLS = 2000
REPEATS = 15


def median_microseconds(call: Callable[[], Any]) -> float:
    times = timeit.repeat(call, number=CALLS, repeat=REPEATS)
    return statistics.median(times) / CALLS * 1e6


def main() -> None:
    backend.load("cpu").activate()
    torch.set_num_threads(1)
    gate, up = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16)
    x = torch.randn(1, 2, 1, 16)
    cases: list[tuple[Any, tuple[Any, ...]]] = [(functional.swiglu, (gate, up)), (functional.attention, (x, x, x))]
    print(f"{'op':<12}{'op, µs':>10}{'direct, µs':>12}{'choice, µs':>12}")
    for op, args in cases:
        direct = op.choose(*args).call
        by_op = median_microseconds(lambda op=op, args=args: op(*args))  # type: ignore[misc]
        alone = median_microseconds(lambda direct=direct, args=args: direct(*args))  # type: ignore[misc]
        chosen = median_microseconds(lambda op=op, args=args: op.choose(*args))  # type: ignore[misc]
        print(f"{op.name:<12}{by_op:>10.2f}{alone:>12.2f}{chosen:>12.2f}")


if __name__ == "__main__":
    main()
