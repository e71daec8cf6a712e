"""``osum-npu train``: train a recipe, or go on with an interrupted run."""

from __future__ import annotations

import argparse

from osum_npu.cli.recipe import add_recipe_arguments, read_recipe


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("train", help="train a recipe; an interrupted run goes on where it stopped")
    add_recipe_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; print where the model lies."""
    recipe = read_recipe(args)
    from osum_npu.training.loop import train

    print(f"model: {train(recipe)}")
    return 0
