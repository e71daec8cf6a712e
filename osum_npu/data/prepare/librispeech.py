"""LibriSpeech: English audio books (openslr.org/12).

Layout: ``train-clean-100/103/1240/103-1240-0000.flac`` with the texts of a chapter in ``103-1240.trans.txt`` beside
its sound files, and the readers' sex in ``SPEAKERS.TXT``.
"""

from __future__ import annotations

from pathlib import Path

from osum_npu.data.prepare.parts import GENDERS, Skipped, Summary, read_table, transcript, wanted, write_parts
from osum_npu.tasks import Utterance


def prepare_librispeech(source: Path, out: Path) -> Summary:
    """Write one manifest for each split that is there, such as ``train-clean-100.jsonl``.

    ``source`` is the folder ``LibriSpeech``, or the one that holds it.

    Raises:
        ValueError: ``SPEAKERS.TXT`` or all splits are missing, or nothing can be used.
    """
    root = source / "LibriSpeech" if (source / "LibriSpeech").is_dir() else source
    speakers = wanted(root / "SPEAKERS.TXT", "LibriSpeech has it beside its splits")
    genders = {}
    for line in speakers.read_text("utf-8").splitlines():
        if not line.startswith(";") and line.count("|") >= 2:
            reader, sex, *_ = (cell.strip() for cell in line.split("|"))
            genders[reader] = GENDERS.get(sex.lower())
    splits = sorted(path for path in root.iterdir() if path.name.startswith(("train-", "dev-", "test-")))
    return write_parts(out, {split.name: _read(split, genders) for split in splits if split.is_dir()})


def _read(split: Path, genders: dict[str, str | None]) -> list[Utterance | Skipped]:
    found: list[Utterance | Skipped] = []
    for chapter in sorted(path for path in split.glob("*/*") if path.is_dir()):
        reader = chapter.parent.name
        table = chapter / f"{reader}-{chapter.name}.trans.txt"
        texts = read_table(table) if table.exists() else {}
        for flac in (chapter / f"{stem}.flac" for stem in sorted({*texts, *(p.stem for p in chapter.glob("*.flac"))})):
            if (text := transcript(texts.get(flac.stem))) is None:
                found.append(Skipped(flac, f"{table.name} has no transcript of it"))
                continue
            gender = genders.get(reader)
            found.append(
                Utterance(
                    key=f"ls_{flac.stem}",
                    wav=str(flac),
                    text=text,
                    lang="en",
                    speaker=f"ls_{reader}",
                    labels={"gender": gender} if gender else {},
                )
            )
    return found
