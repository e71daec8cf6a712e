"""``osum-npu eval``: scores by task, and a report to look at."""

from __future__ import annotations

import argparse
from pathlib import Path

from osum_npu.cli.answering import add_answering_arguments, read_answering
from osum_npu.cli.tasks import add_tasks_argument, read_tasks


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("eval", help="score a model on labelled data and write a report")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--data", required=True, action="append", help="manifest of any form; may be given again")
    add_tasks_argument(parser, "all")
    add_answering_arguments(parser)
    parser.add_argument("--limit", type=int, help="at most so many utterances a task, spread evenly")
    parser.add_argument(
        "--natural", action="store_true", help="ask in natural language, too, and compare with the fixed wording"
    )
    parser.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="NAME=REPORT",
        help="report.json of an earlier stage, to show how well it followed instructions; may be given again",
    )
    parser.add_argument("--out", required=True, help="folder for report.json, report.html and predictions.jsonl")
    parser.add_argument("--log", help="log.jsonl of the training, for the learning curves (default: beside the model)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate; print the table."""
    tasks = read_tasks(args)
    from osum_npu.evaluation import format_instructions, format_table
    from osum_npu.evaluation.run import evaluate

    log = Path(args.log) if args.log else Path(args.model).parent / "log.jsonl"
    settings = read_answering(args)
    facts = {"decoding": args.decoding} | ({"prompts": args.prompts} if args.prompts else {})
    report = evaluate(
        args.model,
        args.data,
        tasks,
        Path(args.out),
        limit=args.limit,
        natural=args.natural,
        stages=read_stages(args.stage),
        log=log,
        facts=facts,
        **settings,
    )
    print(format_table(report.scores))
    if told := format_instructions(report.instructions):
        print(f"\n{told}\n")
    for line in report.skipped[:5]:
        print(f"skipped: {line}")
    print(f"report: {report.page}")
    return 0


def read_stages(words: list[str]) -> dict[str, Path]:
    """Read ``NAME=REPORT``.

    Raises:
        ValueError: a word is of another form.
    """
    pairs = [word.partition("=") for word in words]
    if bad := [word for word, (name, _, path) in zip(words, pairs) if not (name and path)]:
        raise ValueError(f"--stage wants a name and a report, such as stage2=out/report.json, not {', '.join(bad)}")
    return {name: Path(path) for name, _, path in pairs}
