"""``osum-npu average``: the mean of several checkpoints of one training."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("average", help="average the weights of several checkpoints of one training")
    parser.add_argument(
        "checkpoint", nargs="+", type=Path, help="model directories, checkpoints/step_N of a finished run, or .pt files"
    )
    parser.add_argument("--out", type=Path, required=True, help="model directory to write; a .pt file where all are")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Average."""
    from osum_npu.checkpoints.average import average

    average(args.checkpoint, args.out)
    print(f"{len(args.checkpoint)} averaged: {args.out}")
    return 0
