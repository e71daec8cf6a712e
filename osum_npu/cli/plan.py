"""``osum-npu plan``: memory, step time and time to finish of a recipe on a device, before it is started."""

from __future__ import annotations

import argparse
from pathlib import Path

from osum_npu.cli.recipe import add_recipe_arguments, read_recipe


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("plan", help="say what a recipe needs on a device: memory, time, communication")
    add_recipe_arguments(parser)
    parser.add_argument("--device", required=True, help="what to run on, several with commas: 910B,h200")
    parser.add_argument("--devices", type=int, default=1, help="how many of it (default: %(default)s)")
    parser.add_argument("--devices-file", type=Path, help="YAML with devices of your own")
    parser.add_argument("--utterance-seconds", type=float, default=10.0, help="a long utterance (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=20, help="of an instruction (default: %(default)s)")
    parser.add_argument("--tokens-per-second", type=float, default=4.0, help="of the answers (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; return 1 if a stage does not fit."""
    for name in ("devices", "utterance_seconds", "prompt_tokens", "tokens_per_second"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    recipe = read_recipe(args)
    import json

    from tqdm import tqdm

    from osum_npu.files import write_text
    from osum_npu.planning.devices import find_device, read_devices
    from osum_npu.planning.estimate import How, plan_stage
    from osum_npu.planning.report import as_json, format_plans, warnings
    from osum_npu.planning.sizes import read_sizes
    from osum_npu.planning.step import Speech

    table = read_devices(args.devices_file)
    chosen = [find_device(name.strip(), table) for name in args.device.split(",")]
    how = How.of(recipe, args.devices, Speech(args.utterance_seconds, args.prompt_tokens, args.tokens_per_second))
    config = read_sizes(recipe)
    work = [(stage, name, device) for stage in recipe.stages for name, device in chosen]
    plans = [
        plan_stage(config, stage, recipe.precision, name, device, how)
        for stage, name, device in tqdm(work, unit="stage", leave=False)
    ]
    print(format_plans(plans))
    for line in warnings(plans):
        print(f"warning: {line}")
    if args.json:
        write_text(args.json, json.dumps(as_json(plans), indent=1) + "\n")
    return 1 if warnings(plans) else 0
