"""``osum-npu convert``: checkpoints of other systems into model directories, and back."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb and its systems."""
    parser = subparsers.add_parser("convert", help="turn checkpoints of other systems into model directories, and back")
    systems = parser.add_subparsers(title="systems", required=True, metavar="SYSTEM")
    osum = systems.add_parser("osum", help="OSUM, OSUM-Pangu, and the understanding part of OSUM-EChat")
    osum.add_argument("source", type=Path, help="its .pt file; a model directory with --to-reference")
    osum.add_argument("target", type=Path, help="model directory to write; a .pt file with --to-reference")
    osum.add_argument("--llm", help="folder or hub name of the base LLM; needed, but with --to-reference")
    osum.add_argument("--to-reference", action="store_true", help="back: from a model directory to a .pt file")
    osum.add_argument("--merge", action="store_true", help="fold LoRA into the LLM, and store the LLM inside")
    osum.add_argument("--encoder-heads", type=int, help="attention heads of an encoder whose heads are not 64 wide")
    osum.add_argument("--adapter-heads", type=int, default=4, help="attention heads of the adapter (default: 4)")
    osum.add_argument("--lora-alpha", type=float, help="default: that of the .yaml beside the file, else 32")
    osum.set_defaults(run=run_osum)


def run_osum(args: argparse.Namespace) -> int:
    """Convert, and say where the result and its LLM lie."""
    from osum_npu.checkpoints.osum import export_osum, import_osum

    if args.to_reference:
        export_osum(args.source, args.target, args.llm)
        print(f"checkpoint: {args.target}")
        return 0
    if args.llm is None:
        raise ValueError("convert osum needs --llm: the folder or hub name of the LLM that the file was trained on")
    config = import_osum(
        args.source,
        args.target,
        args.llm,
        merge=args.merge,
        encoder_heads=args.encoder_heads,
        adapter_heads=args.adapter_heads,
        lora_alpha=args.lora_alpha,
    )
    print(f"model: {args.target}")
    print(f"LLM: {f'by reference, {config.llm_path}' if config.llm_path else 'inside'}")
    return 0
