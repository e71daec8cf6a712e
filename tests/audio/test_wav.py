"""The plainest wav files, which numpy decodes: the same samples and the same refusals as by libsndfile."""

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.audio import wav
from osum_npu.audio.read import AudioError, probe, read_audio
from osum_npu.audio.tar_member import TarMember

CHANNELS = st.integers(1, 3)
FRAMES = st.integers(201, 900)
NOTES = st.lists(
    st.tuples(
        st.sampled_from([b"ISFT", b"INAM", b"ICMT", b"IXYZ"]),
        st.sampled_from([b"Lavf60.16.100\0", b"odd", b"\xff\0\xfe\0", b"LISTdata"]),
    ),
    max_size=3,
)


def samples(frames, channels, seed=0):
    return np.random.default_rng(seed).integers(-32768, 32768, (frames, channels)).astype(np.int16)


def content(integers, rate=16000, notes=()):
    """A wav by hand, with a list of notes in front of the samples if there are any."""
    chunk = b"".join(name + struct.pack("<I", len(text)) + text + b"\0" * (len(text) % 2) for name, text in notes)
    chunk = b"INFO" + chunk if notes else b""
    data, channels = integers.astype("<i2").tobytes(), integers.shape[1]
    head = b"fmt " + struct.pack("<IHHIIHH", 16, 1, channels, rate, 2 * channels * rate, 2 * channels, 16)
    if chunk:
        head += b"LIST" + struct.pack("<I", len(chunk)) + chunk
    body = b"WAVE" + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def result(data, monkeypatch=None, **span):
    """What is read, or that it cannot be; with monkeypatch by libsndfile alone."""
    with pytest.MonkeyPatch.context() as patch:
        if monkeypatch:
            patch.setattr(wav, "plain_wav", lambda head, size: None)
        try:
            return read_audio(data, **span)
        except AudioError:
            return None


@settings(max_examples=60, deadline=None)
@given(
    frames=FRAMES,
    channels=CHANNELS,
    rate=st.sampled_from([8000, 16000, 22050, 44100]),
    notes=NOTES,
    first=st.integers(0, 300),
    last=st.integers(450, 900),
)
def test_samples_are_those_of_libsndfile_to_the_bit(frames, channels, rate, notes, first, last):
    data = content(samples(frames, channels), rate, notes)
    assert wav.plain_wav(data[: wav.HEAD], len(data)) is not None
    reference, found_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    decoded = wav.decode(data[-2 * channels * frames :], channels)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, reference)
    assert probe(data).sample_rate == found_rate
    for span in ({}, {"start": min(first, frames - 201) / rate}, {"start": 0.0, "end": min(last, frames) / rate}):
        ours, theirs = result(data, **span), result(data, True, **span)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)


PLACES = {4: "<I", 16: "<I", 20: "<H", 22: "<H", 24: "<I", 28: "<I", 32: "<H", 34: "<H", "data": "<I"}
"""Where the numbers of a header stand."""


@settings(max_examples=300, deadline=None)
@given(
    channels=CHANNELS,
    notes=NOTES,
    numbers=st.lists(
        st.tuples(
            st.sampled_from([*PLACES, "data", "data", 4]),
            st.one_of(st.integers(-8, 8), st.sampled_from([-200, 100, 160, 200, 65535])),
        ),
        max_size=2,
    ),
    changes=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=2),
    cut=st.one_of(st.none(), st.none(), st.integers(0, 1300)),
    more=st.one_of(st.just(b""), st.binary(max_size=40)),
)
def test_a_damaged_header_is_judged_as_by_libsndfile(channels, notes, numbers, changes, cut, more):
    """The short way is taken only for files that both ways read alike."""
    integers = samples(400, channels)
    data = bytearray(content(integers, notes=notes))
    for place, difference in numbers:
        form = PLACES[place]
        start = len(data) - 2 * integers.size - 4 if place == "data" else place
        [number] = struct.unpack_from(form, data, start)
        struct.pack_into(form, data, start, (number + difference) % 256 ** struct.calcsize(form))
    for place, value in changes:
        data[place] = value
    data = bytes(data)[:cut] + more
    ours, theirs = result(data), result(data, True)
    assert (ours is None) == (theirs is None)
    if ours is not None:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["PCM_24", "FLOAT", "ULAW", "PCM_U8"])
def test_other_codings_are_left_to_libsndfile(kind):
    stream = io.BytesIO()
    soundfile.write(stream, samples(500, 1) / 32768, 16000, format="WAV", subtype=kind)
    data = stream.getvalue()
    assert wav.plain_wav(data[: wav.HEAD], len(data)) is None
    assert len(read_audio(data)) == 500


def test_a_member_of_a_tar_is_read_in_place(tmp_path):
    data = content(samples(700, 1))
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 512 + data + b"y" * 512)
    member = TarMember(str(path), "k.wav", 512, len(data))
    np.testing.assert_array_equal(read_audio(member), read_audio(data))
    np.testing.assert_array_equal(read_audio(member, 0.01, 0.03), read_audio(data, 0.01, 0.03))
    assert probe(member) == probe(data)
    assert member.read(4, 4) == data[4:8]
    assert member.read(len(data) - 3, 50) == data[-3:]
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(AudioError, match=rf"cannot read {path}:k\.wav: .* samples are there: the file is cut off"):
        read_audio(member)
    with pytest.raises(AudioError, match=r"nowhere\.tar:k\.wav: No such file"):
        read_audio(member._replace(tar=str(tmp_path / "nowhere.tar")))
