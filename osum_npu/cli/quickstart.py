"""``osum-npu quickstart``: the main job from nothing: corpus, staged training, scores, an answer about a file."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("quickstart", help="make a corpus, train a small OSUM on it, score every task")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--train", type=int, default=12000, help="training utterances (default: %(default)s)")
    parser.add_argument("--test", type=int, default=1600, help="test utterances (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=400, help="test utterances a task (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="at most so many steps a stage, to try the whole chain in short")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="changes to the recipe")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run all of it; print the table, one transcript, where the report lies and how long each part took."""
    from dataclasses import replace
    from importlib.resources import as_file, files

    from osum_npu.config import load_recipe
    from osum_npu.data.synthesis.corpus import synthesize
    from osum_npu.evaluation import format_table
    from osum_npu.evaluation.run import evaluate
    from osum_npu.inference.engine import Engine
    from osum_npu.tasks import TASKS, Utterance
    from osum_npu.training.loop import train

    corpus, began, parts = args.out / "corpus", time.perf_counter(), {}

    def lap(name: str) -> None:
        nonlocal began
        parts[name], began = time.perf_counter() - began, time.perf_counter()

    if not (corpus / "test.jsonl").exists():
        synthesize(corpus, {"train": args.train, "dev": 200, "test": args.test})
    lap("corpus")
    places = [f"out={args.out}", *(f"data.{s}.corpus.path={corpus / s}.jsonl" for s in ("train", "dev"))]
    with as_file(files("osum_npu_recipes").joinpath("quickstart/recipe.yaml")) as path:
        recipe = load_recipe([path], [*places, *args.overrides])
    if args.steps is not None:
        recipe = replace(
            recipe, stages=tuple(replace(stage, steps=min(stage.steps, args.steps)) for stage in recipe.stages)
        )
    model = train(recipe)
    lap("training")
    report = evaluate(
        model,
        [corpus / "test.jsonl"],
        list(TASKS.values()),
        args.out / "report",
        limit=args.limit,
        log=args.out / "log.jsonl",
    )
    lap("evaluation")
    print(format_table(report.scores))
    with (corpus / "test.jsonl").open(encoding="utf-8") as rows:
        wav = corpus / json.loads(next(rows))["wav"]
    for result in Engine.load(model).answer([Utterance(key=wav.stem, wav=str(wav))], [TASKS["asr"]]):
        print(f"\n{wav}\n  {result.answers['asr'].text if result.error is None else result.error}\n")
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items()))
    print(f"report: {report.page}")
    return 0
