"""How fast shards are read: by offset and numpy against tarfile and soundfile, and all the way to packed batches.

    python benchmarks/shards.py [--utterances 600] [--rounds 7]

Makes noisy tones of 3 to 12 s as 16-bit wav files, packs them and reads them in one process with one thread. Both
ways give the same samples, which is checked. What is counted is CPU time, in hours of sound a second; the numbers are
medians over rounds, in which the two ways take turns. The project wants at least 3 times the speed for reading and
decoding, and at least 0.8 hours a second to packed batches: sound read and decoded, instruction and answer tokenized,
padded, log-mel features with SpecAugment, and the layout of the LLM's sequence.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import torch

from osum_npu import backend
from osum_npu.audio.augment import SpecAugmentConfig, apply
from osum_npu.audio.mel import frame_count, log_mel
from osum_npu.audio.read import SAMPLE_RATE, read_audio
from osum_npu.data.collate import Batch, Collator
from osum_npu.data.loader import steps
from osum_npu.data.manifest import write_manifest
from osum_npu.data.pack import pack
from osum_npu.data.plan import WeightedSource, plan_epoch
from osum_npu.data.sources import read_source
from osum_npu.models.layout import lay_out
from osum_npu.models.tokenizer import train_tokenizer
from osum_npu.tasks import Utterance, prompts

WANTED_RATIO, WANTED_HOURS = 3.0, 0.8
BATCH_SECONDS, MICRO_BATCH_SECONDS = 240.0, 60.0
SEED = 0
TASKS = {"asr": 1.0, "gender": 1.0}
FRAMES_A_SPEECH_EMBEDDING = 8


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description="Measure how fast shards are read.")
    parser.add_argument("--utterances", type=int, default=600, help="to be made (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each way (default: %(default)s)")
    args = parser.parse_args()
    backend.load("cpu").activate()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards_list, hours = make(Path(folder), args.utterances)
        began = time.process_time()
        read_source(shards_list, 30.0)
        first = time.process_time() - began
        began = time.process_time()
        utterances, _ = read_source(shards_list, 30.0)
        again = time.process_time() - began
        tars = list(dict.fromkeys(u.wav.tar for u in utterances if not isinstance(u.wav, str)))
        print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, one thread")
        print(f"{len(utterances)} utterances, {hours:.2f} h, in {len(tars)} tars; median of {args.rounds} rounds")
        per_row = 1e6 / len(utterances)
        print(f"index made {first * per_row:.0f} µs a row, read again {again * per_row:.0f} µs a row")
        same(utterances, tars)
        usual, ours, batches = [], [], []
        for _ in range(args.rounds):
            usual.append(hours / seconds(lambda: by_tarfile(tars)))
            ours.append(hours / seconds(lambda: by_offset(utterances)))
        for _ in range(args.rounds):
            batches.append(hours / seconds(lambda: to_batches(utterances)))
    ratio = statistics.median(ours) / statistics.median(usual)
    print(f"{'tarfile and soundfile':<28}{statistics.median(usual):>8.2f} h a CPU second")
    print(f"{'index and numpy':<28}{statistics.median(ours):>8.2f} h a CPU second")
    print(f"{'ratio':<28}{ratio:>8.2f}     wanted: {WANTED_RATIO:g}")
    print(f"{'to packed batches':<28}{statistics.median(batches):>8.2f} h a CPU second, wanted: {WANTED_HOURS:g}")


def make(folder: Path, count: int) -> tuple[Path, float]:
    """Write and pack the sounds; return the list of shards, and the hours of sound."""
    rng = np.random.default_rng(SEED)
    rows, total = [], 0
    for i in range(count):
        samples = int(rng.uniform(3, 12) * SAMPLE_RATE)
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 900) * np.arange(samples) / SAMPLE_RATE)
        path = folder / f"{i:05d}.wav"
        soundfile.write(path, tone + 0.05 * rng.standard_normal(samples), SAMPLE_RATE, subtype="PCM_16")
        text = " ".join(rng.choice(["do", "re", "mi", "fa", "so", "la"], samples // SAMPLE_RATE * 2))
        labels = {"gender": str(rng.choice(["female", "male"]))}
        rows.append(Utterance(key=path.stem, wav=str(path), text=text, labels=labels, lang="en", speaker="s"))
        total += samples
    write_manifest(folder / "rows.jsonl", rows)
    packed = pack(folder / "rows.jsonl", folder / "shards", per_tar=200)
    assert not packed.faults
    return folder / "shards" / "shards_list.txt", total / SAMPLE_RATE / 3600


def by_tarfile(tars: Sequence[str]) -> int:
    """Go through the tars as OSUM's loader does: all members in order, the sound decoded by soundfile."""
    samples = 0
    for path in tars:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                content = file.read()
                if member.name.endswith(".wav"):
                    wave, _ = soundfile.read(io.BytesIO(content), dtype="float32")
                    samples += len(wave)
    return samples


def by_offset(utterances: Sequence[Utterance]) -> int:
    """Read the same sounds as training does."""
    return sum(len(read_audio(u.wav, u.start, u.end, max_seconds=30.0)) for u in utterances)


def same(utterances: Sequence[Utterance], tars: Sequence[str]) -> None:
    """Assert that both ways give the same samples."""
    waves = {str(u.wav): read_audio(u.wav) for u in utterances}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".wav"):
                    file = tar.extractfile(member)
                    assert file is not None
                    wave, _ = soundfile.read(file, dtype="float32")
                    assert np.array_equal(wave, waves[f"{path}:{member.name}"])


def to_batches(utterances: Sequence[Utterance]) -> int:
    """Make all batches of an epoch, as the loader and the training loop do."""
    sources = [WeightedSource(utterances)]
    count = len(plan_epoch(sources, TASKS, batch_seconds=BATCH_SECONDS, seed=SEED, epoch=0))
    feed = steps(sources, TASKS, COLLATE, batch_seconds=BATCH_SECONDS, micro_batch_seconds=MICRO_BATCH_SECONDS)
    return sum(features(batch) for step in islice(feed, count) for batch in step.batches)


def features(batch: Batch) -> int:
    """Do what the training loop does with a batch before the model."""
    mel = log_mel(batch.wave_BS, batch.samples)
    assert batch.drawn is not None
    mel = apply(mel, batch.drawn)
    lengths = [frame_count(samples) // FRAMES_A_SPEECH_EMBEDDING for samples in batch.samples]
    return mel.shape[1] + len(lay_out(batch.prompts, lengths, batch.answers).tokens)


def seconds(call: Callable[[], int]) -> float:
    """Return the CPU time of one call."""
    began = time.process_time()
    call()
    return time.process_time() - began


COLLATE = Collator(
    tokenizer=train_tokenizer(
        [wording for each in prompts().values() for wording in each], ["<male>", "<female>"], 400
    ),
    n_mels=80,
    seed=SEED,
    spec_augment=SpecAugmentConfig(),
    max_seconds=30.0,
)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
