"""A shard: a tar of utterances, each a few members ``<key>.<field>``, as OSUM packs them.

The sound is a member ``wav``, ``flac``, ``mp3``, ``m4a``, ``ogg``, ``opus`` or ``wma``, which a row about text alone
does not have; the other fields are small texts. The key is the name up to its last dot.
Source: ASLP-lab/OSUM, OSUM-EChat/wenet/dataset/process/processor.py
(``tar_file_and_group_full_data``) and the writer beside its example data (``do_make_shard_from_raw.py``).

What OSUM's writer leaves behind is taken for what it means: ``none`` in place of a missing field, a duration of 0 for
an unknown one, and fields cut inside a character, which cost that field alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from osum_npu.audio.read import AudioError, probe
from osum_npu.audio.tar_member import TarMember
from osum_npu.data.tar import Damage, scan

SOUND_FIELDS = ("wav", "flac", "mp3", "m4a", "ogg", "opus", "wma")
"""Members that hold the sound."""

TEXT_FIELDS = ("txt", "task", "lang", "speaker", "emotion", "gender", "duration", "extra", "speech_token")
"""Members that hold text in UTF-8; ``extra`` is a JSON object, and ``speech_token`` is known and not read."""

OWN_FIELDS = "osum_npu"
"""Entry of ``extra`` under which :mod:`osum_npu.data.pack` keeps the fields that OSUM's shards have no member for."""

PANGU_FIELDS = ("question", "think_str")
"""Entries of ``extra`` in which OSUM-Pangu's lists hold instruction and thought."""

_NEEDED = ("txt", "task")
"""Fields without which a row would mean something else."""
_LONGEST_TEXT = 1 << 20
_LONGEST_STEM = 200  # bytes; a file name has 255, with its ending and the letters of a temporary one
_NOT_IN_NAMES = re.compile(r"[/\\%\x00-\x1f\x7f]")

NONE = ("", "none", "<none>")
"""Values that mean: not labelled."""


@dataclass(frozen=True)
class Shard:
    """What a tar holds."""

    rows: list[tuple[dict[str, Any], TarMember | None]]
    """Fields of a manifest row, ``wav`` being the member's name, and where the sound lies, if there is one."""
    faults: list[Damage]
    """What is wrong, by name of the member."""


def read_shard(path: str) -> Shard:
    """Go through a tar from end to end.

    The length of a sound without ``duration`` is taken from its header. Members of an utterance may lie apart.

    Raises:
        OSError: the tar cannot be opened or read.
    """
    members: dict[str, dict[str, TarMember]] = {}
    faults: list[Damage] = []
    for found in scan(path):
        if isinstance(found, Damage):
            faults.append(found)
            continue
        key, dot, field = found.name.rpartition(".")
        field = field.lower()
        fields = members.setdefault(key, {})
        if not dot or not key or field not in SOUND_FIELDS + TEXT_FIELDS:
            known = ", ".join(SOUND_FIELDS + TEXT_FIELDS)
            faults.append(Damage(found.name, f"it is none of the members <key>.<field> of a shard: {known}"))
        elif field in fields:
            faults.append(Damage(found.name, "the member occurs already; the first one counts"))
        else:
            fields[field] = TarMember(path, found.name, found.offset, found.length)
    rows = [row for key, fields in members.items() if fields and (row := _row(key, fields, faults))]
    return Shard(rows, faults)


def file_stem(key: str) -> str:
    """Return a name for the files of an utterance that stays inside a folder; the key itself, where it does."""
    stem = _NOT_IN_NAMES.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), key)
    if len(stem.encode()) <= _LONGEST_STEM:
        return stem
    return f"{stem[:40]}%{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"


def _row(
    key: str, fields: dict[str, TarMember], faults: list[Damage]
) -> tuple[dict[str, Any], TarMember | None] | None:
    """Read the fields of one utterance; ``None`` where it cannot be used."""
    sounds = [fields[field] for field in SOUND_FIELDS if field in fields]
    if len(sounds) > 1:
        faults.append(Damage(key, f"it has two sounds: {' and '.join(sound.name for sound in sounds)}"))
        return None
    row: dict[str, Any] = {"key": key}
    own: dict[str, Any] = {}
    for field, member in fields.items():
        if field in SOUND_FIELDS or field == "speech_token":
            continue
        try:
            text = _text(member)
            if field == "extra":
                extra = _extra(text)
                own = extra.get(OWN_FIELDS, {})
                if known := {name: extra[name] for name in PANGU_FIELDS if name in extra}:
                    row[field] = known
            elif field == "txt":
                row[field] = text or None
            elif text.lower() not in NONE:
                row[field] = _duration(text) if field == "duration" else text
        except ValueError as error:
            faults.append(Damage(member.name, str(error)))
            if field in _NEEDED:
                return None
    row |= own | {"wav": sounds[0].name if sounds else None}
    if not sounds:
        if not row.get("prompt") and not row.get("extra", {}).get("question"):
            faults.append(Damage(key, "it has no sound"))
            return None
        return row, None
    if not row.get("duration"):
        try:
            row["duration"] = probe(sounds[0]).seconds
        except AudioError as error:
            faults.append(Damage(sounds[0].name, str(error)))
            return None
    return row, sounds[0]


def _text(member: TarMember) -> str:
    if member.length > _LONGEST_TEXT:
        raise ValueError(f"its {member.length} bytes are no text of an utterance")
    data = member.read()
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} (0x{data[error.start]:02x}) is no UTF-8") from error


def _duration(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"it is no number: {text!r:.60}") from None


def _extra(text: str) -> dict[str, Any]:
    try:
        extra = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    own = extra.get(OWN_FIELDS, {}) if isinstance(extra, dict) else None
    if not isinstance(own, dict):
        raise ValueError(f"it must be a JSON object, and so must its {OWN_FIELDS}: {text!r:.60}")
    return extra  # type: ignore[no-any-return]
