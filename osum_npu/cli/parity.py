"""``osum-npu parity``: hold a device to the reference, from single ops to a training."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

LEVELS = "ops,modules,model,run"
STEPS = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("parity", help="hold a device's numbers to the reference")
    parser.add_argument("--backend", help="whose device (default: OSUM_BACKEND)")
    parser.add_argument("--level", default=LEVELS, help="some of these, with commas (default: %(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16, with commas (default: all of the backend)")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the training (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for parity.json and parity.html")
    parser.add_argument("--save", type=Path, help="also keep samples of all numbers in this file, to compare elsewhere")
    parser.add_argument("--against", type=Path, help="compare with such a file, made on another machine")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, write the report, print the table; return 0 only if all holds."""
    import torch

    from osum_npu import backend
    from osum_npu.comparison import Tape, compare_levels, write_report
    from osum_npu.comparison.facts import facts
    from osum_npu.comparison.report import format_table

    levels = _choose("--level", args.level, LEVELS.split(","))
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {args.steps}")
    other = Tape.load(args.against) if args.against else None
    if args.backend:
        os.environ[backend.VARIABLE] = args.backend
    chosen = backend.current()
    device = chosen.activate()
    own = [str(dtype).removeprefix("torch.") for dtype in chosen.dtypes]
    dtypes = [getattr(torch, name) for name in _choose("--dtype", args.dtype or ",".join(own), own)]
    tape = Tape(str(device))
    rows, curves = compare_levels(levels, dtypes, device, args.steps, tape)
    if other is not None:
        rows += tape.against(other, rows)
    if args.save:
        tape.save(args.save)
    page = write_report(rows, curves, facts(chosen, device), args.out)
    print(format_table(rows))
    print(f"report: {page}")
    return 0 if rows and all(row.ok for row in rows) else 1


def _choose(option: str, words: str, known: list[str]) -> list[str]:
    chosen = [word.strip() for word in words.split(",") if word.strip()]
    if wrong := [word for word in chosen if word not in known] or (not chosen and [words]):
        raise ValueError(f"{option} {wrong[0]!r} is none of {', '.join(known)}")
    return chosen
