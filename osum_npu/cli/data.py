"""``osum-npu data``: make, prepare and check data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from osum_npu.cli.tasks import add_tasks_argument, read_tasks

if TYPE_CHECKING:
    from osum_npu.tasks import Task

CORPORA = ("aishell1", "fsdd", "librispeech", "speechocean762")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb and its own verbs."""
    parser = subparsers.add_parser("data", help="make, prepare and check data")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    synthesize = verbs.add_parser("synthesize", help="speak a labelled corpus with espeak-ng")
    synthesize.add_argument("out", type=Path, help="folder to write: train.jsonl, dev.jsonl, test.jsonl, audio/")
    synthesize.add_argument("--train", type=int, default=12000, help="training utterances (default: %(default)s)")
    synthesize.add_argument("--dev", type=int, default=200, help="development utterances (default: %(default)s)")
    synthesize.add_argument("--test", type=int, default=2000, help="test utterances (default: %(default)s)")
    synthesize.add_argument("--seed", type=int, default=0, help="the same seed makes the same corpus")
    synthesize.set_defaults(run=run_synthesize)

    prepare = verbs.add_parser("prepare", help="write manifests for a public corpus in its own layout")
    prepare.add_argument("corpus", choices=CORPORA, help="which corpus")
    prepare.add_argument("source", type=Path, help="its unpacked folder")
    prepare.add_argument("out", type=Path, help="folder for the manifests")
    prepare.set_defaults(run=run_prepare)

    intents = verbs.add_parser("intents", help="make up instructions, each with the name of the task it asks for")
    intents.add_argument("out", type=Path, help="folder to write: train.jsonl, dev.jsonl, test.jsonl")
    intents.add_argument("--train", type=_positive, default=20000, help="training rows (default: %(default)s)")
    intents.add_argument("--dev", type=_positive, default=500, help="development rows (default: %(default)s)")
    intents.add_argument("--test", type=_positive, default=2000, help="test rows (default: %(default)s)")
    add_tasks_argument(intents, "all", everything="all that the documentation lists and an instruction can ask for")
    intents.add_argument("--seed", type=int, default=0, help="the same seed makes the same instructions")
    intents.set_defaults(run=run_intents)

    pack = verbs.add_parser("pack", help="write a manifest and its sounds as shards; goes on after an interruption")
    pack.add_argument("manifest", type=Path, help="a manifest of any form")
    pack.add_argument("out", type=Path, help="folder to write: shards_list.txt and the tars")
    pack.add_argument("--per-tar", type=_positive, default=1000, help="utterances a tar (default: %(default)s)")
    pack.set_defaults(run=run_pack)

    unpack = verbs.add_parser("unpack", help="write shards as a JSONL manifest and sound files")
    unpack.add_argument("shards", type=Path, help="list of shards, or one shard")
    unpack.add_argument("out", type=Path, help="folder to write: manifest.jsonl and audio/")
    unpack.set_defaults(run=run_unpack)

    stats = verbs.add_parser("stats", help="hours by label and language, lengths, texts, duplicates; as a page")
    stats.add_argument("source", nargs="+", type=Path, help="manifests of any form")
    stats.add_argument("--out", required=True, type=Path, help="folder for stats.json and stats.html")
    stats.add_argument("--no-audio", action="store_true", help="do not look for sounds that occur twice")
    stats.set_defaults(run=run_stats)

    check = verbs.add_parser("check", help="find all that is wrong with manifests and their sounds")
    check.add_argument("manifest", nargs="+", type=Path, help="manifests of any form")
    check.add_argument("--no-audio", action="store_true", help="look at the rows only")
    check.set_defaults(run=run_check)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


def run_synthesize(args: argparse.Namespace) -> int:
    """Make the corpus; print what was written."""
    from osum_npu.data.synthesis.corpus import synthesize

    counts = synthesize(args.out, {"train": args.train, "dev": args.dev, "test": args.test}, args.seed)
    for split, count in counts.items():
        print(f"{args.out / split}.jsonl: {count} utterances")
    return 0


def run_prepare(args: argparse.Namespace) -> int:
    """Write manifests; print what was written and skipped."""
    from osum_npu.data.prepare import PREPARE

    print(PREPARE[args.corpus](args.source, args.out))
    return 0


def run_intents(args: argparse.Namespace) -> int:
    """Write instructions; print how many, and how much of the test's words training knows."""
    from osum_npu.data.intents import NGRAM, Part, write_intents

    counts: dict[Part, int] = {"train": args.train, "dev": args.dev, "test": args.test}
    written = write_intents(args.out, counts, _askable(args), args.seed)
    for part, rows in written.rows.items():
        print(f"{args.out / part}.jsonl: {rows} instructions")
    print(
        f"of the different runs of {NGRAM} words or Han characters in test, {100 * written.shared:.1f} % occur in train"
    )
    return 0


def _askable(args: argparse.Namespace) -> list[Task]:
    from osum_npu.tasks import LISTED
    from osum_npu.tasks.instructions import can_be_asked

    return [task for task in LISTED.values() if can_be_asked(task)] if args.tasks == "all" else read_tasks(args)


def run_pack(args: argparse.Namespace) -> int:
    """Write shards; return 1 if something had to be left out, which is named."""
    from osum_npu.data.pack import SHARDS_LIST, pack

    packed = pack(args.manifest, args.out, per_tar=args.per_tar)
    for fault in packed.faults:
        print(fault)
    print(f"{args.out / SHARDS_LIST}: {packed.rows} rows in {len(packed.shards)} tars; {len(packed.faults)} faults")
    return 1 if packed.faults else 0


def run_unpack(args: argparse.Namespace) -> int:
    """Write files; return 1 if something had to be left out, which is named."""
    from osum_npu.data.unpack import MANIFEST, unpack

    rows, faults = unpack(args.shards, args.out)
    for fault in faults:
        print(fault)
    print(f"{args.out / MANIFEST}: {rows} rows; {len(faults)} faults")
    return 1 if faults else 0


def run_stats(args: argparse.Namespace) -> int:
    """Write the statistics; print the most important."""
    from osum_npu.data.statistics import measure
    from osum_npu.data.statistics_page import write_statistics

    found = measure(args.source, compare_sounds=not args.no_audio)
    page = write_statistics(found, args.out)
    for name, amount in {**found.tasks, "all": found.total}.items():
        print(f"{name:<12}{amount.rows:>10} rows{amount.hours:>12.3f} h")
    for line in found.faults[:5]:
        print(f"left out: {line}")
    print(
        f"{len(found.same_key)} keys in several sources, {len(found.same_sound)} sounds twice, "
        f"{len(found.faults)} faults; {page}"
    )
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print every fault of every manifest; return 1 if there is one."""
    from osum_npu.data.manifest import read_manifest

    found = 0
    for path in args.manifest:
        manifest = read_manifest(path, check_audio=not args.no_audio)
        for fault in manifest.faults:
            print(fault)
        found += len(manifest.faults)
        seconds = sum(u.duration or 0.0 for u in manifest.utterances)
        print(f"{path}: {len(manifest.utterances)} good rows, {seconds / 3600:.2f} h; {len(manifest.faults)} faults")
    return 1 if found else 0
