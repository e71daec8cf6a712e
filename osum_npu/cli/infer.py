"""``osum-npu infer``: answers about sound files, one JSON object a line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from osum_npu.cli.answering import add_answering_arguments, read_answering
from osum_npu.cli.tasks import add_tasks_argument, read_tasks

if TYPE_CHECKING:
    from osum_npu.tasks import Task, Utterance

SOUND = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".m4a", ".wma"})
"""Endings of the files that are taken from a folder."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("infer", help="answer about files, folders or manifests, or a written question")
    parser.add_argument("--model", required=True, help="model directory")
    add_tasks_argument(parser, "asr")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="an instruction of your own, or without input a question by itself; its answer is read as that of the one "
        "task named",
    )
    add_answering_arguments(parser)
    parser.add_argument("--out", help="JSONL file to write (default: the terminal)")
    parser.add_argument("input", nargs="*", help="sound files, folders of them, or manifests")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer; return 1 if some input could not be used, which is named."""
    tasks = read_tasks(args)
    if args.prompt is not None and not args.input:
        from osum_npu.tasks import Utterance

        utterances, faults = [Utterance(key="prompt", wav=None)], list[str]()
    else:
        utterances, faults = gather(args.input)
    if args.prompt is not None:
        utterances = ask(utterances, args.prompt, tasks)
    total = len(utterances) + len(faults)
    settings = read_answering(args)
    from tqdm import tqdm

    from osum_npu.inference.engine import Engine

    engine = Engine.load(args.model, **settings)
    part = f"{args.out}.part" if args.out else None
    if part:
        Path(part).parent.mkdir(parents=True, exist_ok=True)
    with open(part, "w", encoding="utf-8") if part else nullcontext(sys.stdout) as out:
        for result in tqdm(
            engine.answer(utterances, tasks), "infer", len(utterances), unit="file", disable=not args.out
        ):
            if result.error is not None:
                faults.append(result.error)
            print(json.dumps(result.as_json(), ensure_ascii=False), file=out, flush=not args.out)
    if part:
        os.replace(part, args.out)
    for fault in faults:
        print(f"skipped: {fault}", file=sys.stderr)
    if faults:
        print(f"{len(faults)} of {total} inputs skipped or unreadable", file=sys.stderr)
    return 1 if faults else 0


def ask(utterances: list[Utterance], prompt: str, tasks: list[Task]) -> list[Utterance]:
    """Give an instruction to all recordings that bring none of their own.

    Raises:
        ValueError: the instruction is empty or too long, or it would be asked for several tasks.
    """
    from osum_npu.tasks import prompt_fault

    if not prompt.strip():
        raise ValueError("--prompt is empty; <no_prompt> asks without any instruction")
    if fault := prompt_fault(prompt):
        raise ValueError(f"--prompt: {fault}")
    if len(tasks) != 1:
        names = ", ".join(task.name for task in tasks)
        raise ValueError(f"--prompt is one question, and --tasks wants answers to {len(tasks)}: {names}; name one")
    return [u if u.prompt is not None else replace(u, prompt=prompt) for u in utterances]


def gather(inputs: list[str]) -> tuple[list[Utterance], list[str]]:
    """List the recordings that files, folders and manifests name, and what is wrong with the rest.

    Raises:
        ValueError: nothing at all to answer about.
    """
    from osum_npu.data.manifest import is_manifest, read_manifest
    from osum_npu.tasks import Utterance

    utterances: list[Utterance] = []
    faults: list[str] = []
    for name in inputs:
        path = Path(name)
        if is_manifest(path):
            manifest = read_manifest(path)
            utterances += manifest.utterances
            faults += [str(fault) for fault in manifest.faults]
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SOUND)
            utterances += [Utterance(key=str(p.relative_to(path)), wav=str(p)) for p in found]
            if not found:
                faults.append(f"{path}: no sound file in this folder ({', '.join(sorted(SOUND))})")
        else:
            utterances.append(Utterance(key=path.stem, wav=str(path)))
    if not utterances:
        raise ValueError("\n".join(["nothing to answer about:", *faults]))
    return utterances, faults
