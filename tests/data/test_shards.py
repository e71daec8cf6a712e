"""Shards: rows out of tars, lists of them, their index, and rows that stand in a JSONL beside them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from shard_tools import encoded, noise, shard, utterance, write_list, write_tar

from osum_npu.audio.read import read_audio
from osum_npu.audio.tar_member import TarMember
from osum_npu.config import missing_files
from osum_npu.data import shard_index
from osum_npu.data.manifest import is_manifest, read_manifest, write_manifest
from osum_npu.data.shard import file_stem
from osum_npu.data.sources import read_source
from osum_npu.tasks import Utterance, Word


def faults(manifest):
    return [str(fault) for fault in manifest.faults]


def row(utterance):
    """An utterance without the place of its sound."""
    return {name: value for name, value in vars(utterance).items() if name != "wav"}


def test_members_become_a_row(tmp_path):
    members = utterance(
        "spk/a.1",
        seed=7,
        txt=" Hello 你 好<happy> \n",
        task="<TRANSCRIBE> <EMOTION>",
        lang="<CN>",
        speaker="<S 7>",
        gender="<MALE>",
        emotion="<HAPPY>",
        duration="0.1",
        speech_token="[1, 2]",
        extra={"dataset": "x", "emotion": 3},
    )
    read = read_manifest(write_tar(tmp_path / "a.tar", members))
    assert faults(read) == []
    [found] = read.utterances
    assert isinstance(found.wav, TarMember)
    np.testing.assert_array_equal(read_audio(found.wav), noise(seed=7) / 32768)
    assert row(found) == row(
        Utterance(
            key="spk/a.1",
            wav="",
            duration=0.1,
            text="hello你好",
            lang="zh",
            speaker="S 7",
            labels={"emotion": "happy", "gender": "male"},
        )
    )


def test_fields_without_a_member_ride_in_extra(tmp_path):
    own = {
        "words": [["hello", 0.01, 0.05]],
        "reply": "Yes.",
        "prompt": "say",
        "style": "有声书",
        "key": "../x",
        "wav": "/etc/x",
    }
    read = read_manifest(
        write_tar(tmp_path / "a.tar", utterance("k", txt="hello", extra={"osum_npu": own, "style": "y"}))
    )
    assert faults(read) == []
    [found] = read.utterances
    assert isinstance(found.wav, TarMember)
    assert (found.key, found.reply, found.prompt) == ("../x", "Yes.", "say")
    assert found.words == (Word("hello", 0.01, 0.05),)
    assert found.labels == {"style": "有声书"}


def test_what_osums_writer_leaves_behind(tmp_path):
    """``none`` for what is missing, 0 for an unknown duration, and lengths counted in characters."""
    speaker = "说话人".encode()
    members = utterance("k", lang="none", emotion="none", gender="None", duration="0", task="<TRANSCRIBE>", extra={})
    members += [("k.speaker", speaker[:3]), *utterance("cut", seed=1, speaker=None), ("cut.speaker", speaker[:2])]
    read = read_manifest(write_tar(tmp_path / "a.tar", members))
    assert [(u.key, u.speaker, u.lang, u.duration, u.labels) for u in read.utterances] == [
        ("k", "说", None, 0.1, {}),
        ("cut", None, None, 0.1, {}),
    ]
    assert faults(read) == [f"{tmp_path / 'a.tar'}: cut.speaker: byte 1 (0xe8) is no UTF-8"]


@pytest.mark.parametrize("kind", [("flac", "FLAC", "PCM_16"), ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS")])
def test_other_sounds(kind, tmp_path):
    field, container, coding = kind
    sound = encoded(noise(0.5), container=container, coding=coding)
    read = read_manifest(write_tar(tmp_path / "a.tar", utterance("k", sound=(field.upper(), sound))), check_audio=True)
    assert faults(read) == []
    np.testing.assert_array_equal(read_audio(read.utterances[0].wav), read_audio(sound))
    assert read.utterances[0].duration == pytest.approx(0.5)


FAULTS = {
    "no sound": (utterance("bad", sound=None), "bad: it has no sound"),
    "two sounds": (utterance("bad") + [("bad.flac", b"x")], "bad: it has two sounds: bad.wav and bad.flac"),
    "member twice": (utterance("bad") + [("bad.txt", "again")], "bad.txt: the member occurs already"),
    "unknown member": (utterance("bad") + [("bad.pdf", b"x")], "bad.pdf: it is none of the members"),
    "no field": (utterance("bad") + [("README", b"x")], "README: it is none of the members"),
    "no key": (utterance("bad") + [(".txt", b"x")], ".txt: it is none of the members"),
    "txt no UTF-8": (utterance("bad", txt=b"a\xff"), "bad.txt: byte 2 (0xff) is no UTF-8"),
    "task no UTF-8": (utterance("bad", task=b"\xff"), "bad.task: byte 1 (0xff) is no UTF-8"),
    "duration": (utterance("bad", duration="long"), "bad.duration: it is no number: 'long'"),
    "negative duration": (utterance("bad", duration="-1"), "bad: duration must be more than 0 seconds, not -1"),
    "nan duration": (utterance("bad", duration="nan"), "bad: duration must be more than 0 seconds, not nan"),
    "extra": (utterance("bad", extra="{"), "bad.extra: no JSON"),
    "extra a list": (utterance("bad", extra="[]"), "bad.extra: it must be a JSON object"),
    "extra of ours": (utterance("bad", extra={"osum_npu": 3}), "bad.extra: it must be a JSON object, and so must"),
    "unknown field": (utterance("bad", extra={"osum_npu": {"wrods": 1}}), "bad: unknown field 'wrods'; did you mean"),
    "label": (utterance("bad", gender="mael"), "bad: gender 'mael' is none of female, male; did you mean 'male'?"),
    "NONE": (utterance("bad", task="<TRANSCRIBE>", txt="a<NONE>"), "bad: txt of a task without labels holds marks"),
    "sound no sound": (utterance("bad", sound=("wav", b"no sound")), "bad.wav: cannot read"),
    "key twice": (utterance("other", extra={"osum_npu": {"key": "good"}}), "good: the key occurs already in this file"),
}
STAY = ("member twice", "unknown member", "no field", "no key", "duration", "extra", "extra a list", "extra of ours")


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_and_good_rows_survive(name, tmp_path):
    members, reason = FAULTS[name]
    path = write_tar(tmp_path / "a.tar", [*utterance("good"), *members, *utterance("last", seed=5)])
    read = read_manifest(path)
    assert [u.key for u in read.utterances] == ["good", *(["bad"] if name in STAY else []), "last"]
    [fault] = faults(read)
    assert fault.startswith(f"{path}: {reason}")
    assert faults(read_manifest(path)) == [fault]  # also from the index


def test_members_may_lie_apart_and_the_last_one_counts(tmp_path):
    one, two = utterance("a", 1), utterance("b", 2, gender="mael")
    path = write_tar(tmp_path / "a.tar", [m for pair in zip(one, two) for m in pair] + two[2:])
    read = read_manifest(path)
    assert [u.key for u in read.utterances] == ["a"]
    assert faults(read)[0].startswith(f"{path}: b: gender 'mael'")


def test_a_list_of_shards(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    shard(tmp_path / "deep" / "0.tar", "ab")
    shard(tmp_path / "1.tar", "cd")
    (tmp_path / "2.tar").write_bytes(b"no tar" * 300)
    path = write_list(
        tmp_path / "shards_list.txt",
        "deep/0.tar",
        "",
        tmp_path / "1.tar",
        "missing.tar",
        "2.tar",
        "http://x/y.tar",
        "1.tar",
        shard(tmp_path / "3.tar", "a"),
    )
    read = read_manifest(path)
    assert [u.key for u in read.utterances] == ["a", "b", "c", "d"]
    assert faults(read) == [
        f"{path}:6: 'http://x/y.tar' is an address; only files of this machine are read",
        f"{path}:4: cannot read the shard {tmp_path / 'missing.tar'}: No such file or directory",
        f"{tmp_path / '2.tar'}: it is no tar",
        f"{tmp_path / '1.tar'}: c: the key occurs already in this file",
        f"{tmp_path / '1.tar'}: d: the key occurs already in this file",
        f"{tmp_path / '3.tar'}: a: the key occurs already in {tmp_path / 'deep' / '0.tar'}",
    ]
    # as OSUM's own script writes it: from the current folder
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [
        u.key for u in read_manifest(write_list(tmp_path / "lists" / "shards_list.txt", "deep/0.tar")).utterances
    ] == ["a", "b"]


def test_sources_of_any_form_serve_a_recipe(tmp_path):
    path = write_list(tmp_path / "shards_list.txt", shard(tmp_path / "0.tar", "abc").name)
    utterances, skipped = read_source(path, 30)
    assert [(u.key, u.duration) for u in utterances] == [("a", 0.1), ("b", 0.1), ("c", 0.1)]
    assert skipped == []
    assert len(read_source(path, 30)[0]) == 3
    with pytest.raises(ValueError, match=r"none of its rows can be used; first: .*longer than max_seconds"):
        read_source(path, 0.05)


def test_what_is_a_manifest(tmp_path):
    (tmp_path / "sound.wav").write_bytes(encoded(noise()))
    (tmp_path / "kaldi").mkdir()
    (tmp_path / "kaldi" / "wav.scp").touch()
    named = {
        "m.jsonl": "x",
        "data.list": '{"key": "a"}\n',
        "shards_list.txt": "\n\n0.tar\n",
        "combines_list.txt": "0.jsonl\n",
        "pairs": "-|0.tar\n",
    }
    for name, text in named.items():
        (tmp_path / name).write_text(text)
    shard(tmp_path / "0.tar", "a")
    shard(tmp_path / "sound", "a")
    manifests = [*named, "0.tar", "sound", "kaldi"]
    assert [name for name in manifests if not is_manifest(tmp_path / name)] == []
    (tmp_path / "notes.txt").write_text("hello")
    assert [name for name in ("sound.wav", "", "missing", "notes.txt") if is_manifest(tmp_path / name)] == []


def test_a_jsonl_cannot_name_a_place_in_a_tar(tmp_path):
    [found] = read_manifest(shard(tmp_path / "0.tar", "a")).utterances
    with pytest.raises(ValueError, match=r"a lies in .*osum-npu data unpack"):
        write_manifest(tmp_path / "m.jsonl", [found])


# The index.


@pytest.fixture
def scans(monkeypatch):
    """Count how often a tar is gone through."""
    seen, scan = [], shard_index.read_shard

    def counted(path):
        seen.append(Path(path).name)
        return scan(path)

    monkeypatch.setattr(shard_index, "read_shard", counted)
    return seen


def test_a_tar_is_gone_through_once(tmp_path, scans):
    path = shard(tmp_path / "a.tar", "abc", speaker="说话人")
    first = read_manifest(path)
    assert read_manifest(path) == first
    assert len(first.utterances) == 3
    assert scans == ["a.tar"]
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index"]


def test_a_changed_tar_is_gone_through_again(tmp_path, scans):
    path = shard(tmp_path / "a.tar", "abc")
    read_manifest(path)
    shard(path, "abcd")
    assert len(read_manifest(path).utterances) == 4
    state = os.stat(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    read_manifest(path)
    assert scans == ["a.tar"] * 3


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[1]\n", b"null\n", b"\xff\xfe", b"{", b'{"version": 1, "size": 0, "mtime_ns": 0}\n']
)
def test_a_damaged_index_is_made_anew(damage, tmp_path, scans):
    path = shard(tmp_path / "a.tar", "abc")
    index = tmp_path / "a.tar.index"
    read_manifest(path)
    whole = index.read_bytes()
    index.write_bytes(damage)
    assert len(read_manifest(path).utterances) == 3
    lines = whole.splitlines(keepends=True)
    forged = b"".join(b'[{}, "%s", %s, 9]\n' % pair for pair in [(b"a./../b", b"1"), (b"a.wav", b'"1"'), (b"a", b"1")])
    for part in (b"".join(lines[:-1]), whole[:-9], lines[0] + b"[1, 2]\n" * 3, lines[0] + forged):
        index.write_bytes(part)
        assert len(read_manifest(path).utterances) == 3
        assert index.read_bytes() == whole
    assert len(scans) == 6


def test_where_the_folder_cannot_be_written(tmp_path, scans, monkeypatch):
    """The test runs as root as well, whom no mode of a folder stops: a folder stands where the index would."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    path = shard(tmp_path / "a.tar", "abc")
    (tmp_path / "a.tar.index").mkdir()
    for _ in range(2):
        assert len(read_manifest(path).utterances) == 3
    assert scans == ["a.tar"]
    [cached] = (home / ".cache").rglob("*.index")
    cached.unlink()
    cached.mkdir()
    for _ in range(2):
        assert len(read_manifest(path).utterances) == 3
    assert scans == ["a.tar"] * 3


# Rows beside the tars.


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def combined(tmp_path):
    (tmp_path / "tars").mkdir()
    (tmp_path / "rows").mkdir()
    shard(tmp_path / "tars" / "part0.tar", "abc", txt="from the tar", gender="male", lang="en")
    shard(tmp_path / "tars" / "part1.tar", "def")
    write_jsonl(
        tmp_path / "rows" / "part0.jsonl",
        {"key": "b", "txt": "你好<happy>", "task": "<TRANSCRIBE> <EMOTION>", "extra": {"x": 1}, "gender": None},
        {"key": "z", "txt": "x", "task": "<TRANSCRIBE>", "extra": {}},
        {"key": "a", "wav": "/elsewhere.wav", "lang": "zh"},
    )
    write_jsonl(tmp_path / "rows" / "part1.jsonl", {"key": "d", "start": 0.02, "end": 0.06})
    return tmp_path


def combined_rows(path):
    read = read_manifest(path)
    assert all(isinstance(u.wav, TarMember) for u in read.utterances)
    return {u.key: (u.text, u.lang, u.labels, u.duration) for u in read.utterances}, faults(read)


WANTED = {
    "b": ("你好", "en", {"gender": "male", "emotion": "happy"}, 0.1),
    "a": ("from the tar", "zh", {"gender": "male"}, 0.1),
}


def test_rows_beside_a_tar_override_it(combined):
    pairs = write_list(combined / "pairs.txt", "rows/part0.jsonl|tars/part0.tar", " - | tars/part1.tar")
    rows, named = combined_rows(pairs)
    assert {key: rows[key] for key in WANTED} == WANTED
    assert list(rows) == ["b", "a", "d", "e", "f"]
    tar, jsonl = combined / "tars" / "part0.tar", combined / "rows" / "part0.jsonl"
    assert named == [f"{jsonl}:2: z: {tar} holds no such key"]


def test_a_list_of_jsonl_files_and_the_folder_of_the_tars(combined):
    path = write_list(combined / "combines_list.txt", "rows/part0.jsonl", "rows/part1.jsonl", "rows/part2.jsonl")
    write_list(combined / "combines_tar_root.txt", "tars")
    rows, named = combined_rows(path)
    text = read_manifest(combined / "tars" / "part1.tar").utterances[0].text
    assert rows == WANTED | {"d": (text, None, {}, 0.06 - 0.02)}
    assert len(named) == 2
    assert f"{path}:3: cannot read the shard {combined / 'tars' / 'part2.tar'}" in named[0] + named[1]
    span = next(u for u in read_manifest(path).utterances if u.key == "d")
    assert len(read_audio(span.wav, span.start, span.end)) == 640
    (combined / "combines_tar_root.txt").unlink()
    with pytest.raises(ValueError, match=r"cannot read the manifest .*combines_list\.txt: .*combines_tar_root"):
        read_manifest(path)


def test_a_missing_jsonl_and_rows_without_key(combined):
    (combined / "rows" / "part1.jsonl").write_text('{"txt": "a"}\n[1]\n{\n{"key": 3}\n')
    path = write_list(combined / "pairs.txt", "rows/none.jsonl|tars/part0.tar", "rows/part1.jsonl|tars/part1.tar")
    read = read_manifest(path)
    assert read.utterances == []
    jsonl = combined / "rows" / "part1.jsonl"
    beginnings = [
        f"{path}:1: cannot read {combined / 'rows' / 'none.jsonl'}: No such file",
        f"{jsonl}:1: no key",
        f"{jsonl}:2: the line holds a list",
        f"{jsonl}:3: no JSON",
        f"{jsonl}:4: no key",
    ]
    assert [line[: len(begin)] for line, begin in zip(faults(read), beginnings, strict=True)] == beginnings


@pytest.mark.parametrize(
    ("key", "stem"),
    [
        ("a.b-c_1", "a.b-c_1"),
        ("你好", "你好"),
        ("../../x", "..%2F..%2Fx"),
        ("a\\b%\n", "a%5Cb%25%0A"),
        ("k" * 300, None),
        ("你" * 100, None),
    ],
)
def test_file_stems_stay_in_their_folder(key, stem):
    found = file_stem(key)
    assert stem is None or found == stem
    assert len(found.encode()) <= 200
    assert not set(found) & set("/\\\0\n")
    assert file_stem(key + "x") != found


def test_a_recipe_may_name_folders_and_lists(tmp_path):
    """A source only has to be there; what it is is seen when it is read."""
    import tiny

    tiny.write_corpus(tmp_path / "train.jsonl", 2)
    tiny.write_corpus(tmp_path / "dev.jsonl", 2)
    (tmp_path / "kaldi").mkdir()
    found = tiny.recipe(tmp_path, tmp_path / "run", f"data.train.tones.path={tmp_path / 'kaldi'}")
    assert missing_files(found) == []
