"""Make connected digits from single ones.

    python recipes/digits/make_data.py FSDD_DIR OUT [--train 4000] [--seed 0]

``FSDD_DIR`` holds ``train.jsonl`` and ``dev.jsonl`` with one spoken digit a row. A string joins clips of one speaker
with gaps of 50 to 200 ms, silent or with low noise, and records where each word lies. ``OUT/dev.jsonl`` is always the
same 300 strings of one to four digits, made of dev clips alone, so that results compare whatever ``--seed`` is;
``OUT/train.jsonl`` holds strings of train clips, a tenth of them longer. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from osum_npu.audio.read import SAMPLE_RATE, AudioError, read_audio
from osum_npu.data.manifest import read_manifest, write_manifest
from osum_npu.tasks import Utterance, Word

DEV_STRINGS = 300
DEV_SEED = 762
LONGER_SHARE = 0.1
GAP_SECONDS = (0.05, 0.2)
NOISY_SHARE = 0.5
NOISE_DECIBELS = (-70.0, -50.0)

ClipsByWord = dict[str, list[tuple[Utterance, NDArray[np.float32]]]]


def main() -> None:
    """Read the command line and make both lists."""
    parser = argparse.ArgumentParser(description="Make connected digits from single ones.")
    parser.add_argument("source", type=Path, metavar="FSDD_DIR", help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for audio, train.jsonl and dev.jsonl")
    parser.add_argument("--train", type=int, default=4000, help="number of training strings")
    parser.add_argument("--seed", type=int, default=0, help="choice of training strings")
    arguments = parser.parse_args()
    make_data(arguments.source, arguments.out, train=arguments.train, seed=arguments.seed)


def make_data(source: Path, out: Path, *, train: int = 4000, seed: int = 0) -> None:
    """Write ``out/dev.jsonl``, ``out/train.jsonl`` and their sound files.

    Raises:
        ValueError: a manifest of ``source`` is missing or has no usable clip.
    """
    _make_part("dev", DEV_STRINGS, source, out, DEV_SEED, _short)
    _make_part("train", train, source, out, seed, _short_or_longer)


def load_clips(manifest: Path) -> dict[str, ClipsByWord]:
    """Read, by speaker, all clips that have a speaker and a transcript; what cannot be read is named and left out."""
    clips: dict[str, ClipsByWord] = defaultdict(lambda: defaultdict(list))
    read = read_manifest(manifest)
    for fault in read.faults:
        print(fault)
    for utterance in read.utterances:
        if not utterance.speaker or not utterance.text:
            print(f"{manifest}: {utterance.key}: left out, it lacks a speaker or a transcript")
            continue
        try:
            audio = read_audio(utterance.wav, utterance.start, utterance.end)
        except AudioError as error:
            print(f"{manifest}: {utterance.key}: {error}")
            continue
        clips[utterance.speaker][utterance.text].append((utterance, audio))
    if not clips:
        raise ValueError(f"{manifest} has no usable clip")
    return clips


def _short(random: np.random.RandomState) -> int:
    return int(random.randint(1, 5))


def _short_or_longer(random: np.random.RandomState) -> int:
    return int(random.randint(5, 9)) if random.uniform() < LONGER_SHARE else _short(random)


def _make_part(
    part: str, count: int, source: Path, out: Path, seed: int, length: Callable[[np.random.RandomState], int]
) -> None:
    clips = load_clips(source / f"{part}.jsonl")
    speakers = sorted(clips)
    (out / "audio" / part).mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)  # NumPy keeps its stream the same in all versions, that of default_rng not
    strings = (
        _make_string(f"{part}/{number:05d}", out, clips[speakers[number % len(speakers)]], random, length(random))
        for number in range(count)
    )
    write_manifest(out / f"{part}.jsonl", strings)


def _make_string(name: str, out: Path, clips: ClipsByWord, random: np.random.RandomState, length: int) -> Utterance:
    """Draw the words and clips of one string, and write its sound."""
    vocabulary = sorted(clips)
    drawn = [clips[vocabulary[random.randint(len(vocabulary))]] for _ in range(length)]
    chosen = [takes[random.randint(len(takes))] for takes in drawn]
    noise = 10 ** (random.uniform(*NOISE_DECIBELS) / 20) if random.uniform() < NOISY_SHARE else 0.0
    pieces, words = [_make_gap(random, noise)], []
    position = len(pieces[0])
    for clip, audio in chosen:
        end = position + len(audio)
        words.append(Word(clip.text or "", position / SAMPLE_RATE, end / SAMPLE_RATE))
        pieces += [audio, _make_gap(random, noise)]
        position = end + len(pieces[-1])
    sound = np.concatenate(pieces)
    wav = out / "audio" / f"{name}.flac"
    soundfile.write(wav, np.rint(sound * 32767).astype(np.int16), SAMPLE_RATE)
    clip = chosen[0][0]
    return Utterance(
        key=f"digits_{name.replace('/', '_')}",
        wav=str(wav),
        duration=len(sound) / SAMPLE_RATE,
        text=" ".join(word.text for word in words),
        lang=clip.lang,
        speaker=clip.speaker,
        words=tuple(words),
        labels=clip.labels,
    )


def _make_gap(random: np.random.RandomState, noise: float) -> NDArray[np.float32]:
    length = int(random.uniform(*GAP_SECONDS) * SAMPLE_RATE)
    return (noise * random.standard_normal(length)).astype(np.float32)


if __name__ == "__main__":
    main()
