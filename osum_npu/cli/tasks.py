"""The argument by which verbs take tasks: ``--tasks asr,gender``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from osum_npu.tasks import Task


def add_tasks_argument(parser: argparse.ArgumentParser, default: str, everything: str = "the eight") -> None:
    """Add ``--tasks``; the verb's help tells what ``all`` means to it."""
    parser.add_argument(
        "--tasks",
        default=default,
        help="names, OSUM's codes or tags, with commas: asr,age+gender or SER; "
        f"all: {everything} (default: %(default)s)",
    )


def read_tasks(args: argparse.Namespace) -> list[Task]:
    """Return the tasks named.

    Raises:
        ValueError: one of them does not exist.
    """
    from osum_npu.tasks import TASKS, get_task

    if args.tasks == "all":
        return list(TASKS.values())
    return [get_task(name) for name in args.tasks.split(",") if name]
