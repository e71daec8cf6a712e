"""The arguments by which verbs say how a model is asked and answers: ``--prompts``, ``--decoding``, ``--seed``."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_answering_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    parser.add_argument("--prompts", metavar="FILE", help="YAML with the wording that a released checkpoint learned")
    parser.add_argument(
        "--decoding",
        metavar="NAME",
        default="greedy",
        help="greedy, beam, osum, osum-echat or osum-pangu (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of decodings that draw at random (default: %(default)s)")


def read_answering(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of :class:`osum_npu.inference.engine.Engine` that the arguments name.

    Raises:
        ValueError: there is no such decoding, or the prompts cannot be read.
    """
    from osum_npu.tasks import read_prompts

    wordings, ignored = read_prompts(args.prompts)
    if ignored:
        print(ignored, file=sys.stderr)
    from osum_npu.inference.decoding import get_decoding

    return {"decoding": get_decoding(args.decoding), "wordings": wordings, "seed": args.seed}
