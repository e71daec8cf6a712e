"""Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset): English digits by six speakers.

Layout: ``recordings/{digit}_{speaker}_{take}.wav``.
"""

from __future__ import annotations

import re
from pathlib import Path

from osum_npu.data.prepare.parts import Skipped, Summary, wanted, write_parts
from osum_npu.tasks import Utterance

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

MALE = ("george", "jackson", "lucas", "nicolas", "yweweler")
"""The corpus calls all six speakers male; theo's pitch of 240 Hz makes that doubtful, so he stays unlabelled."""

_NAME = re.compile(r"(\d)_([^_]+)_(\d+)")


def prepare_fsdd(source: Path, out: Path) -> Summary:
    """Write train, dev and test: the official test takes are 0 to 4; takes 5 to 8 are held out of the rest as dev.

    Raises:
        ValueError: ``source`` has no folder ``recordings``, or nothing in it can be used.
    """
    folder = wanted(source / "recordings", "the Free Spoken Digit Dataset keeps its wav files there")
    parts: dict[str, list[Utterance | Skipped]] = {"train": [], "dev": [], "test": []}
    for wav in sorted(folder.glob("*.wav")):
        match = _NAME.fullmatch(wav.stem)
        if match is None:
            parts["train"].append(Skipped(wav, "its name is not {digit}_{speaker}_{take}.wav"))
            continue
        digit, speaker, take = int(match[1]), match[2], int(match[3])
        part = "test" if take < 5 else "dev" if take < 9 else "train"
        parts[part].append(
            Utterance(
                key=f"fsdd_{wav.stem}",
                wav=str(wav),
                text=DIGITS[digit],
                lang="en",
                speaker=f"fsdd_{speaker}",
                labels={"gender": "male"} if speaker in MALE else {},
            )
        )
    return write_parts(out, parts)
