"""``osum-npu show``: print the merged recipe, every default spelled out."""

from __future__ import annotations

import argparse

from osum_npu.cli.recipe import add_recipe_arguments, read_recipe


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("show", help="print the merged recipe with all defaults")
    add_recipe_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print YAML."""
    from osum_npu.config import dump_recipe

    print(dump_recipe(read_recipe(args)), end="")
    return 0
