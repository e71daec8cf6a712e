"""Gather six packs of real recordings for one training.

    python recipes/small_real/make_data.py PACKS OUT

``PACKS`` holds the unpacked packs side by side, each with ``train.jsonl`` and ``dev.jsonl`` in this project's row
form; ``timestamps`` holds recipes instead, which its own ``render.py`` turns into sound. Every clip is decoded once, to
16-bit wav: Opus takes as long to decode as a small model takes to learn from it. ``OUT/train`` and ``OUT/dev`` then
hold a manifest for each source of the recipe: one a pack, and the events by class, so that the recipe can weigh them;
and one of windows, for a pack of few, long clips.

A row keeps only what can be learned from its pack (``KEPT``): one voice teaches no gender, a style that is always the
same teaches no style, and the gender of infants cannot be heard.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray
from tqdm import tqdm

from osum_npu.audio.read import SAMPLE_RATE, AudioError, read_audio
from osum_npu.data.manifest import read_manifest, write_manifest
from osum_npu.data.row import parse_row
from osum_npu.files import replaced
from osum_npu.tasks import Utterance

KEPT: dict[str, tuple[str, ...]] = {
    "fsdd": (),
    "zh_hsk": (),
    "speechocean762": ("gender", "age"),
    "librispeech_mini": ("gender",),
    "events": ("event",),
    "timestamps": (),
}
"""The labels that each pack serves; transcripts and word times always stay."""
PARTS = ("train", "dev")
TIMES = "timestamps"
"""The pack whose sound is made of clips of the others."""
EVENTS = "events"
WINDOWED = {"librispeech_mini": 4.0}
"""Packs of long clips whose labels hold throughout, and the seconds of the windows that train them, too."""


class Clip(NamedTuple):
    """A row, and how to get its samples (float32, 16 kHz)."""

    utterance: Utterance
    read: Callable[[], NDArray[np.float32]]


def main() -> None:
    """Read the command line and make all manifests."""
    parser = argparse.ArgumentParser(description="Gather the packs of real recordings for one training.")
    parser.add_argument("packs", type=Path, metavar="PACKS", help="folder with the unpacked packs")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for sound and manifests")
    arguments = parser.parse_args()
    make_data(arguments.packs, arguments.out)


def make_data(packs: Path, out: Path) -> None:
    """Write ``out/audio`` and the manifests ``out/train/*.jsonl`` and ``out/dev/*.jsonl``; sound that lies there stays.

    Raises:
        ValueError: a pack or a file of it is missing.
    """
    needed = [f"{pack}/{'recipes_' if pack == TIMES else ''}{part}.jsonl" for pack in KEPT for part in PARTS]
    if absent := [name for name in (*needed, f"{TIMES}/render.py") if not (packs / name).is_file()]:
        raise ValueError(f"{packs} lacks {', '.join(absent)}; unpack all of {', '.join(KEPT)} side by side")
    for part in PARTS:
        for pack in KEPT:
            rows = _write(f"{pack} {part}", read_clips(packs, pack, part), out / "audio" / pack)
            for source, chosen in _sources(pack, rows):
                write_manifest(out / part / f"{source}.jsonl", chosen)
            if part == "train" and pack in WINDOWED:
                write_manifest(out / part / f"windows_{pack}.jsonl", list(windows(rows, WINDOWED[pack])))


def read_clips(packs: Path, pack: str, part: str) -> list[Clip]:
    """List the clips of a part of a pack, with the labels that it serves; faulty rows are named and left out."""
    clips = _recipes(packs, part) if pack == TIMES else _recordings(packs / pack / f"{part}.jsonl")
    kept = [Clip(_keep(clip.utterance, KEPT[pack]), clip.read) for clip in clips]
    if pack != EVENTS:
        return kept
    for clip in kept:
        if not clip.utterance.labels:
            print(f"{pack} {part}: {clip.utterance.key}: no event")
    return [clip for clip in kept if clip.utterance.labels]


def _keep(utterance: Utterance, labels: tuple[str, ...]) -> Utterance:
    return replace(utterance, labels={name: label for name, label in utterance.labels.items() if name in labels})


def _recordings(path: Path) -> Iterator[Clip]:
    manifest = read_manifest(path)
    for fault in manifest.faults:
        print(fault)
    for utterance in manifest.utterances:
        yield Clip(utterance, partial(read_audio, utterance.wav, utterance.start, utterance.end))


def _recipes(packs: Path, part: str) -> Iterator[Clip]:
    """Read the recipes of word times; the program that comes with them renders their sound."""
    program = packs / TIMES / "render.py"
    spec = importlib.util.spec_from_file_location("timestamps_render", program)
    assert spec is not None
    assert spec.loader is not None
    render: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for row in render.rows(part):
        utterance, faults = parse_row({name: value for name, value in row.items() if name != "items"}, str(packs))
        if utterance is None:
            print(f"{program.parent}: {row['key']}: {'; '.join(faults)}")
        else:
            yield Clip(utterance, partial(render.render, row))


def _sources(pack: str, rows: list[Utterance]) -> Iterator[tuple[str, list[Utterance]]]:
    """Name the manifests of a pack: the events one by one, for the rare ones are to be drawn more often."""
    if pack != EVENTS:
        yield pack, rows
        return
    for event in sorted({row.labels["event"] for row in rows}):
        yield f"{pack}_{event}", [row for row in rows if row.labels["event"] == event]


def windows(rows: list[Utterance], seconds: float) -> Iterator[Utterance]:
    """Cut clips into windows, one behind the other; what is left at the end is in none."""
    for row in rows:
        for number in range(int(soundfile.info(row.wav).duration // seconds)):
            start = number * seconds
            yield replace(row, key=f"{row.key}_{number}", start=start, end=start + seconds, duration=seconds)


def _write(name: str, clips: list[Clip], folder: Path) -> list[Utterance]:
    """Write the clips' sound on all cores; what cannot be read is named and left out."""

    def write(clip: Clip) -> Utterance | None:
        target = folder / f"{clip.utterance.key}.wav"
        if not target.exists():
            try:
                samples = clip.read()
            except AudioError as error:
                print(f"{clip.utterance.key}: {error}")
                return None
            with replaced(target) as draft:
                pcm = np.rint(samples.clip(-1, 1) * 32767).astype(np.int16)
                soundfile.write(draft, pcm, SAMPLE_RATE, format="WAV")
        return replace(clip.utterance, wav=str(target), start=0.0, end=None)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = tqdm(pool.map(write, clips), name, len(clips), unit="clip", leave=False)
        return [utterance for utterance in written if utterance is not None]


if __name__ == "__main__":
    main()
