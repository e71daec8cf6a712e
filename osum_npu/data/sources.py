"""Manifests made ready for a plan: every utterance with its length, and what was left out named."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from osum_npu.audio.read import AudioError, probe
from osum_npu.data.manifest import read_manifest
from osum_npu.tasks import Utterance


def read_source(path: str | Path, max_seconds: float) -> tuple[list[Utterance], list[str]]:
    """Read a manifest.

    Args:
        path: a manifest of any form.
        max_seconds: longer utterances are left out, and texts that count for more (:attr:`Utterance.seconds`).

    Returns:
        (utterances with a ``duration``, if they have a sound, what was left out and why, a line each).

    Raises:
        ValueError: the manifest cannot be opened, or nothing in it can be used.
    """
    manifest = read_manifest(path)
    skipped = [str(fault) for fault in manifest.faults]
    usable: list[Utterance] = []
    for known in with_durations(manifest.utterances):
        if isinstance(known, str):
            skipped.append(f"{path}: {known}")
        elif known.seconds > max_seconds:
            what = "is longer" if known.wav is not None else "that its text counts for is more"
            skipped.append(f"{path}: {known.key}: {known.seconds:.2f} s {what} than max_seconds, {max_seconds:g} s")
        else:
            usable.append(known)
    if not usable:
        first = f"; first: {skipped[0]}" if skipped else ""
        raise ValueError(f"{path}: none of its rows can be used{first}")
    return usable, skipped


def with_durations(utterances: Sequence[Utterance]) -> list[Utterance | str]:
    """Fill in missing durations from the files' headers; an unreadable file becomes a line that says why."""
    if all(utterance.wav is None or utterance.duration is not None for utterance in utterances):
        return list(utterances)
    with ThreadPoolExecutor() as pool:  # headers wait for the disk
        return list(pool.map(_measured, utterances))


def _measured(utterance: Utterance) -> Utterance | str:
    if utterance.wav is None or utterance.duration is not None:
        return utterance
    try:
        seconds = probe(utterance.wav).seconds
    except AudioError as error:
        return f"{utterance.key}: {error}"
    if utterance.start >= seconds:
        return f"{utterance.key}: start {utterance.start:g} s lies outside {utterance.wav}, which lasts {seconds:.3f} s"
    return replace(utterance, duration=seconds - utterance.start)
