"""The arguments by which verbs take a recipe: YAML files, then ``dotted.key=value``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from osum_npu.config import Recipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the positional arguments."""
    parser.add_argument(
        "recipe", nargs="+", metavar="RECIPE.yaml|dotted.key=value", help="layers, merged left to right"
    )


def read_recipe(args: argparse.Namespace) -> Recipe:
    """Read and check what the arguments name.

    Raises:
        RecipeError: with a line for every fault.
    """
    from osum_npu.config import load_recipe

    overrides = [word for word in args.recipe if "=" in word]
    return load_recipe([word for word in args.recipe if "=" not in word], overrides)
