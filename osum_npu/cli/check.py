"""``osum-npu check``: find all that is wrong with a recipe, without a device."""

from __future__ import annotations

import argparse

from osum_npu.cli.recipe import add_recipe_arguments, read_recipe


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("check", help="say all that is wrong with a recipe, a line each")
    add_recipe_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every fault; return 1 if there is one."""
    from osum_npu.config import RecipeError, missing_files

    try:
        faults = missing_files(read_recipe(args))
    except RecipeError as error:
        faults = list(error.faults)
    print("\n".join(faults) or "nothing wrong")
    return 1 if faults else 0
