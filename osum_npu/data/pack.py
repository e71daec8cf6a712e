"""Writing shards: the utterances of any manifest in tars of about a thousand, as :mod:`osum_npu.data.shard` reads them.

A whole sound file goes into the tar as it is. A span of a file becomes a wav of its own with the same samples, and so
does a file in a format that shards have no name for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray
from tqdm import tqdm

from osum_npu.audio.read import AudioError, probe, read_samples
from osum_npu.audio.tar_member import TarMember
from osum_npu.data.manifest import read_manifest
from osum_npu.data.shard import NONE, OWN_FIELDS, TEXT_FIELDS, file_stem
from osum_npu.data.shard_index import indexed_shard
from osum_npu.files import replaced, write_text
from osum_npu.tasks import Utterance

SHARDS_LIST = "shards_list.txt"
"""The list of the shards, which is the manifest."""
RECORD = "pack.json"
"""What the shards of a folder are made from, so that packing can go on after an interruption."""

_FIELDS = {"WAV": "wav", "WAVEX": "wav", "FLAC": "flac", "MP3": "mp3", "OGG VORBIS": "ogg", "OGG OPUS": "opus"}
"""Member for a sound by its container, or container and coding, in the words of :func:`osum_npu.audio.read.probe`."""


@dataclass(frozen=True)
class Packed:
    """What was written and what was not."""

    shards: list[Path]
    rows: int
    faults: list[str]
    """What was left out, a line each."""


def pack(manifest: str | os.PathLike[str], out: Path, *, per_tar: int = 1000) -> Packed:
    """Write shards, and ``shards_list.txt``, which names them relative to itself.

    The same call goes on where an interrupted one stopped: tars appear whole or not at all, and those that are there
    stay.

    Args:
        manifest: of any form.
        out: folder; made if it is not there.
        per_tar: utterances a tar.

    Raises:
        ValueError: the manifest cannot be opened or holds nothing to pack, or ``out`` holds shards of another one.
    """
    read = read_manifest(manifest)
    faults = [str(fault) for fault in read.faults]
    if not read.utterances:
        raise ValueError("\n".join([f"{os.fspath(manifest)}: there is nothing to pack", *faults]))
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, os.fspath(manifest), read.utterances, per_tar)
    groups = [read.utterances[start : start + per_tar] for start in range(0, len(read.utterances), per_tar)]
    paths = [out / f"shard_{number:06d}.tar" for number in range(len(groups))]
    shards, rows = [], 0
    bar = tqdm(total=len(read.utterances), desc="packing", unit="row")
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for path, group, left_out in zip(paths, groups, pool.map(_shard, paths, groups)):
            bar.update(len(group))
            faults += left_out
            rows += len(group) - len(left_out)
            if len(left_out) < len(group):
                shards.append(path)
    write_text(out / SHARDS_LIST, "".join(f"{path.name}\n" for path in shards))
    return Packed(shards, rows, faults)


def _claim(out: Path, manifest: str, utterances: Sequence[Utterance], per_tar: int) -> None:
    """Note what the folder is for, or compare with what is noted there."""
    digest = hashlib.sha256("\n".join(map(repr, utterances)).encode("utf-8", "surrogatepass")).hexdigest()
    record = {"per_tar": per_tar, "rows": len(utterances), "sha256": digest}
    path = out / RECORD
    if not path.exists():
        if any(out.glob("*.tar")):
            raise ValueError(f"{out} holds tars that were not written by osum-npu data pack; choose another folder")
        write_text(path, json.dumps({"manifest": manifest, **record}, indent=1) + "\n")
        return
    try:
        noted = json.loads(path.read_text("utf-8"))
        same = {name: noted.get(name) for name in record} == record
    except (ValueError, AttributeError):
        same = False
    if not same:
        raise ValueError(
            f"{out} holds shards of other rows, or with another --per-tar, than {manifest} has now ({path}); choose "
            "another folder, or remove that one"
        )
    for stale in out.glob(".shard_*.tar.*"):  # of a process that was killed
        stale.unlink()


def _shard(path: Path, utterances: Sequence[Utterance]) -> list[str]:
    """Write one tar, unless it is there; return what was left out, a line each."""
    if path.exists():
        there = {row["key"] for row, _ in indexed_shard(str(path)).rows}
        reason = f"an earlier run could not read it; remove {path} to try again"
        return [f"{u.key}: {reason}" for u in utterances if u.key not in there]
    left_out = []
    with replaced(path) as draft, tarfile.open(draft, "w", format=tarfile.GNU_FORMAT) as tar:
        for utterance in utterances:
            try:
                members = list(_members(utterance))
            except AudioError as error:
                left_out.append(f"{utterance.key}: {error}")
                continue
            for field, content in members:
                header = tarfile.TarInfo(f"{file_stem(utterance.key)}.{field}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    if len(left_out) == len(utterances):
        path.unlink()
    return left_out


def _members(utterance: Utterance) -> Iterator[tuple[str, bytes]]:
    """Give the members of an utterance by field, the transcript first.

    Raises:
        AudioError: the sound cannot be read.
    """
    sound = None if utterance.wav is None else _sound(utterance, utterance.wav)
    plain = {"lang": utterance.lang, "speaker": utterance.speaker, **utterance.labels}
    own: dict[str, Any] = {
        "words": utterance.words,
        "reply": utterance.reply,
        "prompt": utterance.prompt,
        "thought": utterance.thought,
        "intent": utterance.intent,
        "key": utterance.key if utterance.key != file_stem(utterance.key) else None,
    }
    members = {}
    for name, value in plain.items():
        if value is None:
            continue
        if name in TEXT_FIELDS and value == value.strip() and value.lower() not in NONE:
            members[name] = value
        else:  # no member of OSUM's shards, or one that would be read as something else
            own[name] = value
    own = {name: value for name, value in own.items() if value is not None}
    if utterance.text is not None:
        yield "txt", utterance.text.encode()
    if sound is not None:
        yield sound.field, sound.content
    for name, value in members.items():
        yield name, value.encode()
    if sound is not None:
        yield "duration", repr(utterance.duration if utterance.duration is not None else sound.seconds).encode()
    if own:
        yield "extra", json.dumps({OWN_FIELDS: own}, ensure_ascii=False).encode()


class _Sound(NamedTuple):
    field: str
    content: bytes
    seconds: float


def _sound(utterance: Utterance, source: str | TarMember) -> _Sound:
    if not utterance.start and utterance.end is None:
        content = _content(source)
        try:
            info = probe(content)
        except AudioError as error:
            raise AudioError(str(error).replace("the given bytes", str(source), 1)) from error
        if field := _FIELDS.get(info.format, _FIELDS.get(info.format.split()[0], "")):
            return _Sound(field, content, info.seconds)
    samples, rate = read_samples(source, utterance.start, utterance.end)
    return _Sound("wav", _wav(samples, rate), len(samples) / rate)


def _content(source: str | TarMember) -> bytes:
    try:
        return source.read() if isinstance(source, TarMember) else Path(source).read_bytes()
    except (OSError, ValueError) as error:
        raise AudioError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from error


def _wav(samples: NDArray[np.float32], rate: int) -> bytes:
    """Write samples as a wav that is read back as the same samples: 16-bit where they are 16-bit, else float."""
    integers = np.rint(samples * 32768)
    exact = bool((integers == samples * 32768).all() and integers.min() >= -32768 and integers.max() <= 32767)
    stream = io.BytesIO()
    data = integers.astype(np.int16) if exact else samples
    soundfile.write(stream, data, rate, format="WAV", subtype="PCM_16" if exact else "FLOAT")
    return stream.getvalue()
