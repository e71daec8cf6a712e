"""The command line. Verbs import what is heavy only when they run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from osum_npu import __version__, launch
from osum_npu.cli import average, check, convert, data, doctor, evaluate, infer, parity, plan, quickstart, show, train
from osum_npu.training.interrupt import STATUS, Interrupted

VERBS = (quickstart, train, check, show, plan, infer, evaluate, data, convert, average, doctor, parity)


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="osum-npu",
        description="Train, evaluate and serve speech-understanding LLMs.",
        epilog="OSUM_BACKEND=npu|cuda|musa|cpu|auto chooses the device.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit status.

    0 done, 1 the verb found something wrong, 2 it could not start, 75 it saved before its end, 130 interrupted.
    """
    if launch.is_scheduler():
        print("osum-npu: msrun's copy for a scheduler, which is not needed; done")
        return 0
    args = make_parser().parse_args(argv)
    # transformers prints advice about settings that are ours to make
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        launch.prepare()
        return int(args.run(args))
    except ValueError as error:
        print(f"osum-npu: {error}" if "\n" not in str(error) else str(error), file=sys.stderr)
        return 2
    except Interrupted as end:
        print(f"osum-npu: {end}", file=sys.stderr)
        return STATUS
    except KeyboardInterrupt:
        print("osum-npu: interrupted", file=sys.stderr)
        return 130
