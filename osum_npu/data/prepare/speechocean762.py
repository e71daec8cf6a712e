"""speechocean762: English read by Mandarin speakers, half of them children (openslr.org/101).

Layout: ``WAVE/SPEAKER0001/000010011.WAV``, and in ``train`` and ``test`` the Kaldi tables ``wav.scp``, ``text``,
``spk2age`` and ``spk2gender``.
"""

from __future__ import annotations

from pathlib import Path

from osum_npu.data.prepare.parts import GENDERS, Skipped, Summary, read_table, transcript, wanted, write_parts
from osum_npu.tasks import Utterance

ADULT_AGE = 15
"""Speakers up to 14 years are children; the oldest speaker is 43, so nobody is old."""


def prepare_speechocean762(source: Path, out: Path) -> Summary:
    """Write train and test, the official parts.

    Raises:
        ValueError: a folder or table is missing, or nothing can be used.
    """
    return write_parts(out, {part: _read(source, part) for part in ("train", "test")})


def _read(source: Path, part: str) -> list[Utterance | Skipped]:
    tables = {
        name: read_table(wanted(source / part / name, "speechocean762 has it in train and in test"))
        for name in ("wav.scp", "text", "spk2age", "spk2gender")
    }
    # Early copies of the corpus call a speaker SPEAKER0001 in the tables, later ones 0001.
    ages, genders = (
        {speaker.removeprefix("SPEAKER"): value for speaker, value in tables[name].items()}
        for name in ("spk2age", "spk2gender")
    )
    found: list[Utterance | Skipped] = []
    for key, place in tables["wav.scp"].items():
        wav = source / place
        speaker = wav.parent.name.removeprefix("SPEAKER")
        if (text := transcript(tables["text"].get(key))) is None:
            found.append(Skipped(wav, f"{part}/text has no transcript of {key}"))
            continue
        labels = {}
        if speaker in genders and (gender := GENDERS.get(genders[speaker].lower())):
            labels["gender"] = gender
        if ages.get(speaker, "").isdecimal():
            labels["age"] = "child" if int(ages[speaker]) < ADULT_AGE else "adult"
        found.append(
            Utterance(key=f"so762_{key}", wav=str(wav), text=text, lang="en", speaker=f"so762_{speaker}", labels=labels)
        )
    return found
