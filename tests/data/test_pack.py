"""Packing and unpacking: every field comes back, a kill loses nothing, and no key leads out of a folder."""

import os
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_tools import encoded, noise, shard, utterance, write_list, write_tar

from osum_npu.audio.read import read_audio
from osum_npu.cli.main import main
from osum_npu.data.manifest import read_manifest, write_manifest
from osum_npu.data.pack import pack
from osum_npu.data.unpack import unpack
from osum_npu.tasks import TASKS, Utterance, Word, normalize_text

SOUNDS = {
    "plain.wav": (noise(0.2, 1), 16000, "WAV", "PCM_16"),
    "stereo.wav": (np.stack([noise(0.2, 2), noise(0.2, 3)], 1), 22050, "WAV", "PCM_16"),
    "float.wav": (1.1 * np.sin(np.arange(4000) / 9), 16000, "WAV", "FLOAT"),
    "a.flac": (noise(0.2, 4), 16000, "FLAC", "PCM_16"),
    "deep.flac": (noise(0.2, 5) / 40000, 16000, "FLAC", "PCM_24"),
    "a.ogg": (noise(0.3, 6), 16000, "OGG", "VORBIS"),
    "a.opus": (noise(0.3, 7), 16000, "OGG", "OPUS"),
    "a.mp3": (noise(0.3, 8), 16000, "MP3", "MPEG_LAYER_III"),
    "a.aiff": (noise(0.2, 9), 16000, "AIFF", "PCM_16"),
}
ENDINGS = {"a.aiff": "wav"}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    for name, (samples, rate, container, coding) in SOUNDS.items():
        soundfile.write(folder / name, samples, rate, format=container, subtype=coding)
    return folder


def there_and_back(utterances, folder, per_tar=3):
    """Pack and unpack; the rows of both, which the shards must hold without fault."""
    write_manifest(folder / "m.jsonl", utterances)
    packed = pack(folder / "m.jsonl", folder / "shards", per_tar=per_tar)
    assert packed.faults == []
    shards = read_manifest(folder / "shards" / "shards_list.txt", check_audio=True)
    assert shards.faults == []
    count, faults = unpack(folder / "shards" / "shards_list.txt", folder / "files")
    assert (count, faults) == (len(utterances), [])
    files = read_manifest(folder / "files" / "manifest.jsonl")
    assert files.faults == []
    return shards.utterances, files.utterances


TEXT = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<>"), min_size=1, max_size=20)
    .map(lambda text: normalize_text(text).strip())
    .filter(lambda text: text and normalize_text(text).strip() == text)
)
NAME = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(
    str.strip
)
HOSTILE = st.sampled_from(
    ["../../evil", "/etc/evil", "a/../b", "..", ".", "a\\b", "%2F", "x.wav", "c" * 300, "none", " a ", "a\nb", "键"]
)


@st.composite
def rows(draw):
    text = draw(st.none() | TEXT)
    return Utterance(
        key=draw(NAME | HOSTILE),
        wav=draw(st.sampled_from(list(SOUNDS))),
        duration=None,
        text=text,
        lang=draw(st.sampled_from([None, "en", "zh-CN"])),
        speaker=draw(st.none() | NAME | HOSTILE),
        words=(Word(text, 0.0, 0.15),) if text and draw(st.booleans()) else None,
        labels=draw(
            st.fixed_dictionaries({}, optional={t.name: st.sampled_from(t.labels) for t in TASKS.values() if t.labels})
        ),
        reply=draw(st.none() | NAME),
        prompt=draw(st.none() | NAME),
    )


@settings(max_examples=25, deadline=None)
@given(drawn=st.lists(rows(), min_size=1, max_size=5, unique_by=lambda row: row.key))
def test_every_field_comes_back(drawn, sounds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    given = [replace(row, wav=str(sounds / row.wav)) for row in drawn]
    before = set(folder.parent.iterdir())
    for found in there_and_back(given, folder):
        for row, wanted in zip(found, given, strict=True):
            assert row == replace(wanted, wav=row.wav, duration=row.duration)
            assert row.duration == pytest.approx(len(read_audio(wanted.wav)) / 16000, abs=0.01)
            np.testing.assert_array_equal(read_audio(row.wav), read_audio(wanted.wav))
    assert set(folder.parent.iterdir()) == before
    assert {path.parent.parent for path in (folder / "files" / "audio").rglob("*.*")} == {folder / "files" / "audio"}


def test_a_whole_file_is_kept_as_it_is_and_named_after_what_it_is(sounds, tmp_path):
    (tmp_path / "misnamed.mp3").write_bytes((sounds / "a.flac").read_bytes())
    paths = [*(sounds / name for name in SOUNDS), tmp_path / "misnamed.mp3"]
    given = [Utterance(key=path.name, wav=str(path)) for path in paths]
    for packed, path in zip(there_and_back(given, tmp_path)[0], paths, strict=True):
        ending = "flac" if path.name == "misnamed.mp3" else ENDINGS.get(path.name, path.suffix[1:])
        assert packed.wav.name == f"{path.name}.{ending}"
        assert (packed.wav.read() == path.read_bytes()) == (path.name not in ENDINGS)


def test_a_span_becomes_a_file_with_the_same_samples(sounds, tmp_path):
    given = [
        Utterance(key=f"{name}-{end}", wav=str(sounds / name), start=0.04, end=end, duration=end and end - 0.04)
        for name in SOUNDS
        for end in (None, 0.12)
    ]
    for found in there_and_back(given, tmp_path):
        for row, wanted in zip(found, given, strict=True):
            assert (row.start, row.end) == (0.0, None)
            np.testing.assert_array_equal(read_audio(row.wav), read_audio(wanted.wav, wanted.start, wanted.end))
    sizes = [os.path.getsize(row.wav) for row in found if row.key.startswith(("plain", "float"))]
    assert sizes[0] == 44 + 2 * round(0.16 * 16000)  # 16-bit stays 16-bit
    assert sizes[2] > 4 * round(0.16 * 16000)


def test_lengths_are_counted_in_bytes(sounds, tmp_path):
    """Counted in characters, as the original did, non-ASCII text would be cut."""
    text, speaker = "今天天气很好", "说话人"
    write_manifest(
        tmp_path / "m.jsonl", [Utterance(key="键", wav=str(sounds / "plain.wav"), text=text, speaker=speaker)]
    )
    pack(tmp_path / "m.jsonl", tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard_000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert members["键.txt"].decode() == text
    assert members["键.speaker"].decode() == speaker
    assert [name.rpartition(".")[2] for name in members] == ["txt", "wav", "speaker", "duration"]


def test_broken_sounds_are_left_out_and_named(sounds, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    names = ["plain.wav", str(tmp_path / "text.wav"), "gone.wav", "a.flac"]
    write_manifest(
        tmp_path / "m.jsonl", [Utterance(key=f"k{i}", wav=str(sounds / name)) for i, name in enumerate(names)]
    )
    packed = pack(tmp_path / "m.jsonl", tmp_path / "out", per_tar=2)
    assert packed.rows == 2
    assert [fault.split(": ")[:2] for fault in packed.faults] == [
        ["k1", f"cannot read {tmp_path / 'text.wav'}"],
        ["k2", f"cannot read {sounds / 'gone.wav'}"],
    ]
    again = pack(tmp_path / "m.jsonl", tmp_path / "out", per_tar=2)
    assert [fault.split(":")[0] for fault in again.faults] == ["k1", "k2"]
    assert [u.key for u in read_manifest(tmp_path / "out" / "shards_list.txt").utterances] == ["k0", "k3"]
    write_manifest(tmp_path / "bad.jsonl", [Utterance(key="k", wav="gone.wav")])
    assert pack(tmp_path / "bad.jsonl", tmp_path / "none").shards == []
    assert not list((tmp_path / "none").glob("*.tar"))


def test_a_folder_belongs_to_its_manifest(sounds, tmp_path):
    given = [Utterance(key=f"k{i}", wav=str(sounds / "plain.wav")) for i in range(4)]
    write_manifest(tmp_path / "m.jsonl", given)
    pack(tmp_path / "m.jsonl", tmp_path / "out", per_tar=2)
    with pytest.raises(ValueError, match="holds shards of other rows, or with another --per-tar"):
        pack(tmp_path / "m.jsonl", tmp_path / "out", per_tar=3)
    write_manifest(tmp_path / "m.jsonl", given[:3])
    with pytest.raises(ValueError, match="holds shards of other rows"):
        pack(tmp_path / "m.jsonl", tmp_path / "out", per_tar=2)
    shard(tmp_path / "0.tar", "a")
    with pytest.raises(ValueError, match="holds tars that were not written by"):
        pack(tmp_path / "m.jsonl", tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"there is nothing to pack\n.*holds no rows"):
        pack(tmp_path / "empty.jsonl", tmp_path / "new")


def test_a_killed_packing_goes_on(sounds, tmp_path):
    count, per_tar = 3000, 50
    write_manifest(
        tmp_path / "m.jsonl",
        [Utterance(key=f"k{i:04d}", wav=str(sounds / "plain.wav"), text=f"word {i}") for i in range(count)],
    )
    out = tmp_path / "out"
    process = tiny.osum_npu("data", "pack", tmp_path / "m.jsonl", out, "--per-tar", per_tar, start=True)
    while process.poll() is None and len(list(out.glob("shard_*.tar"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = {path: path.stat().st_mtime_ns for path in out.glob("shard_*.tar")}
    assert 3 <= len(written) < count // per_tar
    assert not (out / "shards_list.txt").exists()
    for path in written:
        assert len(read_manifest(path).utterances) == per_tar
    (out / ".shard_000059.tar.0123abcd").write_bytes(b"left by a kill")
    assert main(["data", "pack", str(tmp_path / "m.jsonl"), str(out), "--per-tar", str(per_tar)]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert not list(out.glob(".shard*"))
    pack(tmp_path / "m.jsonl", tmp_path / "whole", per_tar=per_tar)
    for path in (tmp_path / "whole").glob("shard*"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert [u.key for u in read_manifest(out / "shards_list.txt").utterances] == [f"k{i:04d}" for i in range(count)]


def test_hostile_shards_write_nowhere_else(tmp_path):
    links = []
    for name, target in [("l.wav", "/etc/passwd"), ("files", str(tmp_path / "elsewhere"))]:
        header = tarfile.TarInfo(name)
        header.type, header.linkname = tarfile.SYMTYPE, target
        links.append(header)
    own = {"osum_npu": {"key": "../../../above"}}
    write_tar(
        tmp_path / "a.tar",
        [
            *links,
            *utterance("../up"),
            *utterance("/abs"),
            *utterance("files/in", seed=1),
            *utterance("ok", seed=2, extra=own),
        ],
    )
    out = tmp_path / "deep" / "out"
    count, faults = unpack(tmp_path / "a.tar", out)
    assert count == 2
    assert len(faults) == 6
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "audio/000000/..%2F..%2F..%2Fabove.wav",
        "audio/000000/files%2Fin.wav",
        "manifest.jsonl",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.index", "deep"]


def test_the_verbs(sounds, tmp_path, capsys):
    write_manifest(
        tmp_path / "m.jsonl", [Utterance(key=f"k{i}", wav=str(sounds / "plain.wav"), text="a") for i in range(5)]
    )
    shards = tmp_path / "shards"
    assert main(["data", "pack", str(tmp_path / "m.jsonl"), str(shards), "--per-tar", "2"]) == 0
    assert f"{shards / 'shards_list.txt'}: 5 rows in 3 tars; 0 faults" in capsys.readouterr().out
    assert main(["data", "check", str(shards / "shards_list.txt")]) == 0
    assert main(["data", "unpack", str(shards / "shards_list.txt"), str(tmp_path / "files")]) == 0
    assert main(["data", "check", str(tmp_path / "files" / "manifest.jsonl")]) == 0
    damaged = shards / "shard_000001.tar"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    assert main(["data", "check", str(shards / "shards_list.txt")]) == 1
    assert f"{damaged}: k2.wav: " in capsys.readouterr().out
    assert main(["data", "unpack", str(shards / "shards_list.txt"), str(tmp_path / "files")]) == 1
    assert main(["data", "unpack", str(tmp_path / "m.jsonl"), str(tmp_path / "files")]) == 2
    with pytest.raises(SystemExit):
        main(["data", "pack", "a", "b", "--per-tar", "0"])


def test_combined_lists_can_be_packed_anew(tmp_path):
    shard(tmp_path / "0.tar", "abc")
    (tmp_path / "0.jsonl").write_text('{"key": "b", "txt": "new<male>", "task": "<TRANSCRIBE> <GENDER>"}\n')
    packed = pack(write_list(tmp_path / "pairs.txt", "0.jsonl|0.tar"), tmp_path / "out")
    [found] = read_manifest(packed.shards[0]).utterances
    assert (found.key, found.text, found.labels) == ("b", "new", {"gender": "male"})
    assert encoded(noise(0.1, sum(map(ord, "0.tar")) + 1)) == found.wav.read()
    assert Path(found.wav.tar).parent == tmp_path / "out"
