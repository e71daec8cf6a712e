"""``osum-npu train``: train a recipe, or go on with an interrupted run."""

from __future__ import annotations

import argparse

from osum_npu.cli.recipe import add_recipe_arguments, read_recipe


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("train", help="train a recipe; an interrupted run goes on where it stopped")
    add_recipe_arguments(parser)
    parser.add_argument("--time-limit", metavar="H:MM:SS", help="save and end after this time, with status 75")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="record so many steps in OUT/profile")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; print where the model lies."""
    from osum_npu.training.interrupt import read_time_limit

    limit = None if args.time_limit is None else read_time_limit(args.time_limit)
    recipe = read_recipe(args)
    from osum_npu.training.loop import train

    print(f"model: {train(recipe, time_limit=limit, profile=args.profile)}")
    return 0
