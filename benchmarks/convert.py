"""What it takes to convert an OSUM checkpoint of full size there and back: time against cp, and memory.

    python benchmarks/convert.py FOLDER [--layers 28]

Makes a bfloat16 file of OSUM's shapes with Qwen2-7B (17 GB) in a new folder below FOLDER, converts it to a model
directory that holds the LLM, converts that back, compares digests of all tensors' bytes, and removes everything. It
needs room for two such files. Before every timed part what it reads is pushed out of the page cache, and the time ends
when the disk has everything. RssAnon is memory that is not that of a mapped file, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from osum_npu.checkpoints.osum_keys import (
    ADAPTER_POSITIONS,
    ALIASES,
    ENCODER_POSITIONS,
    LLM_PREFIXES,
    MARKS,
    OWN_POSITIONS,
    reference_key,
)
from osum_npu.checkpoints.shards import as_bytes
from osum_npu.checkpoints.torch_file import read_torch_file
from osum_npu.models.adapters import OsumAdapterConfig, interleaved_sinusoids
from osum_npu.models.lora import LoraSettings
from osum_npu.models.speech_llm import SpeechLLM, make_config
from osum_npu.models.tokenizer import train_tokenizer
from osum_npu.models.whisper import WhisperEncoderConfig, sinusoids

QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
CODEC_TOKENS = 4097


def shapes(llm: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of OSUM's learned tensors by key."""
    encoder, adapter = WhisperEncoderConfig(), OsumAdapterConfig()
    with torch.device("meta"):
        state = SpeechLLM(make_config(encoder, adapter, llm, LoraSettings())).state_dict()
    width, hidden = encoder.width, state["marks"].shape[1]
    return {
        **{reference_key(n, LLM_PREFIXES[0]): tuple(t.shape) for n, t in state.items() if n != OWN_POSITIONS},
        MARKS: (CODEC_TOKENS + 2, hidden),
        "speaker_head.weight": (CODEC_TOKENS, hidden),
        "speaker_head.bias": (CODEC_TOKENS,),
        "ln_speech.weight": (width,),
        "ln_speech.bias": (width,),
    }


def make_checkpoint(path: Path, llm: dict[str, object]) -> None:
    """Write a checkpoint of normal numbers; every tensor is another stretch of the same 1 GB of them."""
    by_key = shapes(llm)
    sizes = {key: torch.Size(shape).numel() for key, shape in by_key.items()}
    pool = torch.empty(max(sizes.values()) + 1000 * len(sizes), dtype=torch.bfloat16).normal_(0, 0.02)
    stretches = pool.view(torch.int16).numpy().data
    state: dict[str, Tensor] = {
        key: torch.frombuffer(stretches, dtype=torch.bfloat16, count=size, offset=2000 * i).view(by_key[key])
        for i, (key, size) in enumerate(sizes.items())
    }
    width = WhisperEncoderConfig().width
    state[ENCODER_POSITIONS] = sinusoids(WhisperEncoderConfig().max_frames, width)[None].bfloat16()
    state[ADAPTER_POSITIONS] = interleaved_sinusoids(OsumAdapterConfig().max_positions, width)[None].bfloat16()
    state |= {alias: state[LLM_PREFIXES[0] + name] for alias, name in ALIASES.items()}
    torch.save(state, path)


def digests(path: Path) -> dict[str, tuple[str, str, str]]:
    """Return shape, dtype and digest of the bytes of every tensor."""
    return {
        key: (str(tuple(t.shape)), str(t.dtype), hashlib.sha256(as_bytes(t).numpy().data).hexdigest())
        for key, t in read_torch_file(path).items()
    }


def settle(path: Path, *, forget: bool = False) -> None:
    """Wait until the disk has a file or folder; and let memory forget what it holds of it."""
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        if forget:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(command: list[str], written: Path) -> tuple[float, int]:
    """Return the seconds of a command with the settling of what it wrote, and its largest RssAnon in bytes."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        line = next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
        peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.02)
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    settle(written)
    return time.perf_counter() - began, peak


def main() -> None:
    """Measure, and print a line for each part."""
    parser = argparse.ArgumentParser(description="Convert a full-size OSUM checkpoint there and back.")
    parser.add_argument("folder", type=Path, help="where there is room for two files of 17 GB")
    parser.add_argument("--layers", type=int, default=28, help="of the LLM (default: %(default)s)")
    args = parser.parse_args()
    config = {**QWEN2_7B, "num_hidden_layers": args.layers}
    needed = 2.2 * 2 * sum(torch.Size(shape).numel() for shape in shapes(config).values())
    free = shutil.disk_usage(args.folder).free
    if free < needed:
        sys.exit(f"{args.folder} has room for {free / 1e9:.0f} GB: wanted {needed / 1e9:.0f}")
    print(f"{platform.machine()}, torch {torch.__version__}, Qwen2-7B with {args.layers} layers")
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        source, model, again = (Path(place) / name for name in ("infer.pt", "model", "again.pt"))
        llm = Path(place) / "llm"
        AutoConfig.for_model(**config).save_pretrained(llm)
        train_tokenizer(["hello world"], [], 300).save_pretrained(llm)
        make_checkpoint(source, config)
        size = source.stat().st_size
        settle(source, forget=True)
        print(f"checkpoint        {size / 1e9:6.2f} GB")

        copy = Path(place) / "copy.pt"
        seconds, _ = measure(["cp", str(source), str(copy)], copy)
        copy.unlink()
        settle(source, forget=True)
        print(f"cp + sync         {seconds:6.1f} s")

        command = [sys.executable, "-m", "osum_npu", "convert", "osum"]
        before = digests(source)
        settle(source, forget=True)
        there, peak = measure([*command, str(source), str(model), "--llm", str(llm)], model)
        print(f"convert           {there:6.1f} s = {there / seconds:.2f} cp, RssAnon at most {peak / 1e9:.2f} GB")
        source.unlink()
        settle(model, forget=True)
        back, peak = measure([*command, "--to-reference", str(model), str(again)], again)
        print(f"--to-reference    {back:6.1f} s = {back / seconds:.2f} cp, RssAnon at most {peak / 1e9:.2f} GB")

        after = digests(again)
        equal = sum(after.get(key) == digest for key, digest in before.items())
        keys = "as they were" if list(after) == list(before) else "CHANGED"
        print(f"bit for bit       {equal} of {len(before)} tensors, keys {keys}")


if __name__ == "__main__":
    main()
