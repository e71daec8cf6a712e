"""500 damaged files from seeds: none ends the reading, each is named, and nothing is written where it should not be.

200 tars of three utterances (25 of each kind in TARS), 150 manifests of three rows (15 of each kind in LINES), 150
sounds (25 of each kind in SOUNDS). Every kind of damage can be seen; what cannot, such as other samples in a wav, is no
fault to find. The first utterance of a tar, the first row and a sound beside it stay whole, and must come through.
"""

import json
import os
import random
import tarfile

import pytest
from shard_tools import encoded, noise, utterance, write_tar

from osum_npu.data.manifest import read_manifest
from osum_npu.data.unpack import unpack

BLOCK = 512
SECONDS = 0.05


def tar_members(**fields):
    return [
        *utterance("good", seed=1, seconds=SECONDS, txt="很好"),
        *utterance("hit", seed=2, seconds=SECONDS, **{"txt": "今天天气", "gender": "male", **fields}),
        *utterance("last", seed=3, seconds=SECONDS, txt="再见"),
    ]


def headers(path):
    """Where the header of each member lies."""
    with tarfile.open(path) as tar:
        return {member.name: member.offset for member in tar}


def edited(path, change):
    data = bytearray(path.read_bytes())
    change(data, headers(path))
    path.write_bytes(data)


def checked(data, place):
    """Correct the checksum of a header."""
    data[place + 148 : place + 156] = b" " * 8
    data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + BLOCK])


def cut(path, rng):
    write_tar(path, tar_members())
    at = headers(path)
    os.truncate(path, rng.randrange(at["hit.wav"], at["last.txt"] + BLOCK + 6))


def torn_header(path, rng):
    def change(data, at):
        place = at[rng.choice(["hit.wav", "hit.txt"])] + rng.randrange(0, 156)
        data[place] ^= rng.randrange(1, 256)

    edited(write_tar(path, tar_members()), change)


def zeros(path, rng):
    def change(data, at):
        start = at["hit.wav"] + BLOCK * rng.randrange(0, 2)
        data[start : start + BLOCK * rng.randrange(1, 3)] = bytes(BLOCK)

    edited(write_tar(path, tar_members()), change)


def wrong_length(path, rng):
    """A length that the checksum vouches for: counted in characters, or past the next header, or past the end."""

    def change(data, at):
        name, length = rng.choice(
            [("hit.txt", rng.choice([4, 7, 10])), ("hit.wav", rng.choice([40, 500, 10**5, 10**6, 8**11 - 1]))]
        )
        data[at[name] + 124 : at[name] + 136] = b"%011o\0" % length
        checked(data, at[name])

    edited(write_tar(path, tar_members()), change)


def no_utf8(path, rng):
    field = rng.choice(["txt", "gender", "lang", "extra", "duration", "task"])
    write_tar(path, tar_members(**{field: rng.choice([b"\xff", b"ab\xc3", b"\xe4\xbd", b"\x80\x80"])}))


def link(path, rng):
    header = tarfile.TarInfo(rng.choice(["hit.wav", "hit.txt", "audio", "../files"]))
    header.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
    header.linkname = rng.choice(["/etc/passwd", "../../outside", "good.wav", ".."])
    members = tar_members()
    members.insert(rng.randrange(2, 5), header)
    write_tar(path, members)


def leading_out(path, rng):
    key = rng.choice(["../hit", "/tmp/osum-npu-hit", "a/../../hit", "../../../../hit", "/", "..//hit"])
    members = [(name.replace("hit", key, 1), content) for name, content in tar_members()]
    write_tar(path, members)


def garbage(path, rng):
    """Bytes in place of members: of the sound, of a JSON, of a number."""
    damage = {
        "sound": {"sound": ("wav", rng.randbytes(rng.randrange(0, 900)))},
        "extra": {"extra": rng.choice(["{", "[]", '{"osum_npu": []}', "nul", '{"osum_npu": {"words": [[1]]}}'])},
        "duration": {"duration": rng.choice(["x", "-3", "nan", "1e999", "7.5"])},
        "key": {"extra": '{"osum_npu": {"key": "good"}}'},
    }
    write_tar(path, tar_members(**damage[rng.choice(list(damage))]))


TARS = (cut, torn_header, zeros, wrong_length, no_utf8, link, leading_out, garbage)


def whole_row(key):
    return {"key": key, "wav": "good.wav", "txt": "很好", "gender": "male", "duration": SECONDS}


LINES = {
    "cut": lambda rng, line: line[: rng.randrange(1, len(line) - 1)],
    "no UTF-8": lambda rng, line: line.replace("很".encode(), rng.choice([b"\xff", b"\xe5\xbe", b"\xc3\x28"])),
    "null bytes": lambda rng, line: line[: rng.randrange(20)] + bytes(rng.randrange(1, 30)) + line[20:],
    "wrong type": lambda rng, line: changed(line, rng.choice(["key", "wav", "txt", "gender"]), rng.choice([3, [], {}])),
    "wrong number": lambda rng, line: changed(
        line, rng.choice(["start", "duration", "end"]), rng.choice([-1, float("nan"), 1e300, "1"])
    ),
    "wrong label": lambda rng, line: changed(line, "gender", rng.choice(["mael", "", "none", "MALE"])),
    "unknown field": lambda rng, line: changed(line, f"x{rng.randrange(99)}", 1),
    "no sound": lambda rng, line: changed(line, "wav", rng.choice(["gone.wav", "..", "/", "a\0b", "/dev/null"])),
    "no object": lambda rng, line: rng.choice([b"[]", b"3", b"null", b'"x"', b"[" * 9999]),
    "key twice": lambda rng, line: changed(line, "key", rng.choice(["good", "last"])),
}


def changed(line, name, value):
    return json.dumps({**json.loads(line), name: value}).encode()


def sound(rng):
    kinds = [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("WAV", "FLOAT")]
    container, coding = rng.choice(kinds)
    return encoded(noise(0.3, rng.randrange(9)) / 32768, container=container, coding=coding)


def with_nan(rng):
    samples = noise(0.3) / 32768
    samples[rng.randrange(len(samples))] = rng.choice([float("nan"), float("inf"), 1e9])
    return encoded(samples, coding="FLOAT")


def wrong_wav_length(rng):
    data = bytearray(encoded(noise(0.3)))
    data[40:44] = rng.choice([3, 10**5, 2**30, len(data) + 900]).to_bytes(4, "little")
    return bytes(data)


def wrong_rate(rng):
    return encoded(noise(0.3), rate=rng.choice([1, 100, 4000, 7999]))


SOUNDS = {
    "cut": lambda rng: (data := sound(rng))[: rng.randrange(0, int(0.9 * len(data)))],
    "zeros in front": lambda rng: (data := sound(rng)) and bytes(64) + data[64:],
    "no sound": lambda rng: rng.randbytes(rng.randrange(1, 3000)),
    "not finite": with_nan,
    "wrong length": wrong_wav_length,
    "wrong rate": wrong_rate,
}


@pytest.fixture
def watched(tmp_path):
    """A folder to work in; nothing may appear beside it, nor where the damaged names point."""
    work = tmp_path / "a" / "b" / "work"
    work.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    yield work
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "outside"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["work"]
    assert outside.read_text() == "untouched"
    assert not os.path.lexists("/tmp/osum-npu-hit.wav")


@pytest.mark.parametrize("damage", TARS, ids=lambda damage: damage.__name__)
def test_damaged_tars(damage, watched):
    for seed in range(25):
        path, out = watched / f"{seed}.tar", watched / f"out{seed}"
        damage(path, random.Random(f"{damage.__name__}/{seed}"))
        read = read_manifest(path, check_audio=True)
        assert read.faults, seed
        assert all(str(fault).startswith(f"{path}: ") for fault in read.faults), seed
        assert "good" in {u.key for u in read.utterances}, seed
        count, faults = unpack(path, out)
        assert count >= len(read.utterances)
        assert faults or damage is garbage, seed
        written = [file for file in out.rglob("*") if not file.is_dir()]
        assert {file.parent for file in written} == {out, out / "audio" / "000000"}
        assert not any(file.is_symlink() for file in written)


@pytest.mark.parametrize("kind", LINES)
def test_damaged_lines(kind, watched):
    (watched / "good.wav").write_bytes(encoded(noise(SECONDS)))
    good, hit, last = (json.dumps(whole_row(key), ensure_ascii=False).encode() for key in ("good", "hit", "last"))
    for seed in range(15):
        path = watched / f"{seed}.jsonl"
        path.write_bytes(b"\n".join([good, LINES[kind](random.Random(f"{kind}/{seed}"), hit), last]))
        read = read_manifest(path, check_audio=True)
        assert {fault.line for fault in read.faults} in ({2}, {3} if kind == "key twice" else {2}), seed
        assert {u.key for u in read.utterances} >= {"good"} | (set() if kind == "key twice" else {"last"}), seed


@pytest.mark.parametrize("kind", SOUNDS)
def test_damaged_sounds(kind, watched):
    (watched / "good.wav").write_bytes(encoded(noise(SECONDS)))
    rows = [whole_row("good")]
    for seed in range(25):
        (watched / f"{seed}.wav").write_bytes(SOUNDS[kind](random.Random(f"{kind}/{seed}")))
        rows.append({"key": str(seed), "wav": f"{seed}.wav"})
    path = watched / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read = read_manifest(path, check_audio=True)
    assert [u.key for u in read.utterances] == ["good"]
    assert [fault.key for fault in read.faults] == [str(seed) for seed in range(25)]
    assert all(f"{watched / fault.key}.wav: " in fault.reason for fault in read.faults)
