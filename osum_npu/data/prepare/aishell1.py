"""AISHELL-1: read Mandarin (openslr.org/33).

Layout: ``data_aishell/wav/{train,dev,test}/S0002/BAC009S0002W0122.wav``, all texts in
``data_aishell/transcript/aishell_transcript_v0.8.txt``, genders in ``resource_aishell/speaker.info``.
"""

from __future__ import annotations

from pathlib import Path

from osum_npu.data.prepare.parts import GENDERS, Skipped, Summary, read_table, transcript, wanted, write_parts
from osum_npu.tasks import Utterance


def prepare_aishell1(source: Path, out: Path) -> Summary:
    """Write train, dev and test. A few hundred recordings have no transcript in the corpus and are skipped.

    Raises:
        ValueError: a folder or table is missing, the speakers' archives were not unpacked, or nothing can be used.
    """
    root = wanted(source / "data_aishell", "unpack data_aishell.tgz there")
    texts = read_table(wanted(root / "transcript" / "aishell_transcript_v0.8.txt", "AISHELL-1 has its texts there"))
    speakers = read_table(wanted(source / "resource_aishell" / "speaker.info", "unpack resource_aishell.tgz there"))
    genders = {f"S{speaker.removeprefix('S')}": GENDERS.get(value.lower()) for speaker, value in speakers.items()}
    folder = wanted(root / "wav", "AISHELL-1 has its recordings there")
    if packed := sorted(folder.glob("*.tar.gz")):
        raise ValueError(f"{packed[0]} and {len(packed) - 1} more speakers are still packed: unpack them in {folder}")
    parts: dict[str, list[Utterance | Skipped]] = {}
    for part in ("train", "dev", "test"):
        found = parts.setdefault(part, [])
        for wav in sorted((folder / part).glob("S*/*.wav")):
            if (text := transcript(texts.get(wav.stem))) is None:
                found.append(Skipped(wav, "aishell_transcript_v0.8.txt has no transcript of it"))
                continue
            speaker = wav.parent.name
            gender = genders.get(speaker)
            found.append(
                Utterance(
                    key=f"aishell_{wav.stem}",
                    wav=str(wav),
                    text=text,
                    lang="zh",
                    speaker=f"aishell_{speaker}",
                    labels={"gender": gender} if gender else {},
                )
            )
    return write_parts(out, parts)
