"""Tars: the same members as by tarfile, and all that is wrong named."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.data.tar import BLOCK, Damage, File, scan

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=60).map(
    lambda name: f"x{name}"
)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def build(path, members, kind="gnu"):
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def damages(path):
    return [found for found in scan(str(path)) if isinstance(found, Damage)]


def files(path):
    return [found for found in scan(str(path)) if isinstance(found, File)]


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.tuples(NAMES, st.integers(0, 3)), max_size=6, unique=True),
    kind=st.sampled_from(["gnu", "pax"]),
    sizes=st.lists(st.sampled_from([0, 1, 511, 512, 513, 3000]), min_size=6, max_size=6),
)
def test_members_are_those_of_tarfile(names, kind, sizes, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    members = [(name * (1 + 3 * times), bytes(size)) for (name, times), size in zip(names, sizes)]
    build(path, members, kind)
    with tarfile.open(path) as tar:
        wanted = [(member.name, member.offset_data, member.size) for member in tar]
    assert [tuple(found) for found in scan(str(path))] == wanted


def test_ustar_splits_long_names(tmp_path):
    name = "/".join(["folder" * 5] * 4) + "/file.wav"
    path = build(tmp_path / "a.tar", [(name, b"abc")], "ustar")
    assert [(found.name, found.length) for found in scan(str(path))] == [(name, 3)]


def test_nothing_is_followed_and_no_name_leads_out(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, link in [
            (tarfile.SYMTYPE, "/etc/passwd"),
            (tarfile.LNKTYPE, "good.wav"),
            (tarfile.CHRTYPE, ""),
            (tarfile.BLKTYPE, ""),
            (tarfile.FIFOTYPE, ""),
        ]:
            header = tarfile.TarInfo(f"bad{kind.decode()}.wav")
            header.type, header.linkname = kind, link
            tar.addfile(header)
        header = tarfile.TarInfo("folder")
        header.type = tarfile.DIRTYPE
        tar.addfile(header)
        for name in ("/etc/a.wav", "../b.wav", "c/../../d.wav", "good.wav", "./also.good.wav", "..fine.wav"):
            header = tarfile.TarInfo(name)
            header.size = 2
            tar.addfile(header, io.BytesIO(b"ab"))
    assert [found.name for found in files(path)] == ["good.wav", "also.good.wav", "..fine.wav"]
    assert [(found.name, found.reason.split(";")[0]) for found in damages(path)] == [
        ("bad2.wav", "it is a symbolic link"),
        ("bad1.wav", "it is a hard link"),
        ("bad3.wav", "it is a device"),
        ("bad4.wav", "it is a device"),
        ("bad6.wav", "it is a pipe"),
        *((name, "its name leads out of the folder") for name in ("/etc/a.wav", "../b.wav", "c/../../d.wav")),
    ]


@pytest.fixture
def three(tmp_path):
    rng = np.random.default_rng(0)
    return build(tmp_path / "a.tar", [(f"{name}.wav", rng.bytes(700)) for name in "abc"])


def test_a_damaged_header_costs_its_member_alone(three):
    data = bytearray(three.read_bytes())
    data[3 * BLOCK + 20] ^= 1  # within the name of b
    three.write_bytes(data)
    assert [found.name for found in files(three)] == ["a.wav", "c.wav"]
    assert [str(found.reason) for found in damages(three)] == [
        "the header at byte 1536 is damaged; 1536 bytes are passed over"
    ]


def test_zeros_in_place_of_a_header_do_not_end_the_reading(three):
    data = bytearray(three.read_bytes())
    data[3 * BLOCK : 4 * BLOCK] = bytes(BLOCK)
    three.write_bytes(data)
    assert [found.name for found in files(three)] == ["a.wav", "c.wav"]
    assert "zeros stand where a header should be, from byte 1536 to 2048" in damages(three)[0].reason


@pytest.mark.parametrize(
    ("length", "kept", "reason"),
    [
        (9 * BLOCK, "abc", "end mark is missing"),
        (9 * BLOCK - 600, "ab", "424 of 700 bytes are there"),
        (6 * BLOCK + 100, "ab", "header at byte 3072 is damaged; 100 bytes"),
        (6 * BLOCK, "ab", "end mark is missing"),
        (10, "", "it is no tar"),
        (0, "", "it is empty"),
    ],
)
def test_a_cut_tar_is_named(three, length, kept, reason):
    three.write_bytes(three.read_bytes()[:length])
    assert [found.name for found in files(three)] == [f"{name}.wav" for name in kept]
    assert any(reason in found.reason for found in damages(three))


def test_what_is_no_tar(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"hello" * 400)
    assert [found.reason for found in damages(path)] == ["it is no tar"]
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    assert "compressed (gzip)" in damages(path)[0].reason
    build(path, [])
    assert list(scan(str(path))) == []
    with pytest.raises(OSError, match="No such file"):
        list(scan(str(tmp_path / "nowhere.tar")))


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10239), st.binary(min_size=1, max_size=8)), min_size=1, max_size=5))
def test_any_damage_gives_members_within_the_file(changes, tmp_path_factory):
    path = build(tmp_path_factory.mktemp("tar") / "a.tar", [(f"{name}.wav", bytes(700)) for name in "abc"], "pax")
    data = bytearray(path.read_bytes())
    for place, change in changes:
        data[place : place + len(change)] = change
    path.write_bytes(data)
    for found in files(path):
        assert 0 <= found.offset <= found.offset + found.length <= len(data)
