"""Shards back to files: a JSONL manifest and one sound file an utterance."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from osum_npu.audio.tar_member import TarMember
from osum_npu.data.manifest import read_manifest, write_manifest
from osum_npu.data.shard import file_stem
from osum_npu.files import replaced
from osum_npu.tasks import Utterance

MANIFEST = "manifest.jsonl"


def unpack(source: str | os.PathLike[str], out: Path) -> tuple[int, list[str]]:
    """Write ``out/manifest.jsonl`` and the sounds as ``out/audio/<number of the tar>/<key>.<format>``.

    Whatever a key looks like, its file lies in that folder: what could lead out of it is written as ``%2F``. Only
    sounds are written; what else a tar holds stays in it.

    Args:
        source: a list of shards, a shard, or a list of combined ones.
        out: folder; made if it is not there.

    Returns:
        (rows written, what was left out, a line each).

    Raises:
        ValueError: the source cannot be opened, or holds nothing to unpack.
    """
    read = read_manifest(source)
    faults = [str(fault) for fault in read.faults]
    if all(isinstance(utterance.wav, str) for utterance in read.utterances):
        raise ValueError("\n".join([f"{os.fspath(source)}: there is nothing to unpack", *faults]))
    tars = {u.wav.tar: "" for u in read.utterances if isinstance(u.wav, TarMember)}
    for number, tar in enumerate(tars):
        tars[tar] = str(out / "audio" / f"{number:06d}")
        os.makedirs(tars[tar], exist_ok=True)

    def write(utterance: Utterance) -> Utterance | str:
        member = utterance.wav
        if not isinstance(member, TarMember):
            return utterance
        ending = member.name.rpartition(".")[2].lower()
        path = Path(tars[member.tar], f"{file_stem(utterance.key)}.{ending}")
        try:
            content = member.read()
            if len(content) < member.length:
                return f"{member}: {len(content)} of {member.length} bytes are there"
            with replaced(path) as draft:
                draft.write_bytes(content)
        except OSError as error:
            return f"{member}: {error.strerror or error}"
        return replace(utterance, wav=str(path))

    rows = []
    bar = tqdm(total=len(read.utterances), desc="unpacking", unit="row")
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for written in pool.map(write, read.utterances):
            bar.update()
            if isinstance(written, Utterance):
                rows.append(written)
            else:
                faults.append(written)
    return write_manifest(out / MANIFEST, rows), faults
