"""``osum-npu data``: make, prepare and check data."""

from __future__ import annotations

import argparse
from pathlib import Path

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

    check = verbs.add_parser("check", help="find all that is wrong with manifests and their sound files")
    check.add_argument("manifest", nargs="+", type=Path, help="JSONL manifests")
    check.add_argument("--no-audio", action="store_true", help="look at the rows only")
    check.set_defaults(run=run_check)


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
