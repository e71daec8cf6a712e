import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.audio.read import MINIMUM_SECONDS, SAMPLE_RATE, AudioError, probe, read_audio

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def tone(frequency, rate, seconds=2.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def voice(seconds=2.0, rate=16000):
    """A rising harmonic sound with some noise: no two spans of it are alike."""
    t = np.arange(round(rate * seconds)) / rate
    phase = 2 * np.pi * (150 * t + 40 * t**2)
    noise = np.random.default_rng(0).normal(size=t.size)
    return 0.2 * np.sin(phase) + 0.1 * np.sin(3 * phase) + 0.003 * noise


def encode(samples, rate=16000, kind="wav"):
    buffer = io.BytesIO()
    container, coding = FORMATS[kind]
    soundfile.write(buffer, samples, rate, format=container, subtype=coding)
    return buffer.getvalue()


VOICE = {kind: encode(voice(), kind=kind) for kind in FORMATS}


def relative_error(got, wanted):
    return np.abs(got - wanted).max() / np.sqrt(np.mean(wanted**2))


def test_pcm_is_read_exactly():
    integers = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    audio = read_audio(encode(integers))
    assert audio.dtype == np.float32
    assert audio.shape == (5000,)
    np.testing.assert_array_equal(audio, integers / 32768)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("flac", 1e-3), ("aiff", 1e-3), ("ogg", 0.3), ("opus", 0.5), ("mp3", 0.3)]
)
def test_other_formats_hold_the_same_sound_at_the_same_place(kind, tolerance):
    audio = read_audio(VOICE[kind])
    assert audio.shape == (32000,)
    assert relative_error(audio[2000:-2000], voice()[2000:-2000]) < tolerance


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_a_tone(rate):
    audio = read_audio(encode(tone(440, rate), rate, "float.wav"))
    assert len(audio) == 2 * SAMPLE_RATE
    inside = slice(1600, -1600)
    assert relative_error(audio[inside], tone(440, SAMPLE_RATE)[inside]) < 1e-3


def test_resampling_lets_nothing_fold_back():
    audio = read_audio(encode(tone(11000, 48000), 48000, "float.wav"))
    assert np.abs(audio[1600:-1600]).max() < 1e-4


def test_channels_are_averaged():
    left, right = voice(), tone(300, 16000)
    np.testing.assert_allclose(
        read_audio(encode(np.stack([left, right], axis=1), kind="float.wav")), (left + right) / 2, atol=1e-7
    )


def test_path_bytes_and_stream_are_alike(tmp_path):
    path = tmp_path / "声音 1.raw"  # the name says nothing about the format
    path.write_bytes(VOICE["flac"])
    wanted = read_audio(VOICE["flac"])
    np.testing.assert_array_equal(read_audio(path), wanted)
    np.testing.assert_array_equal(read_audio(str(path)), wanted)
    np.testing.assert_array_equal(read_audio(io.BytesIO(VOICE["flac"])), wanted)
    with path.open("rb") as stream:
        np.testing.assert_array_equal(read_audio(stream), wanted)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(["wav", "flac", "ogg"]), first=st.integers(0, 31000), count=st.integers(201, 32000))
def test_a_span_is_a_slice(kind, first, count):
    stop = min(first + count, 32000)
    span = read_audio(VOICE[kind], first / 16000, stop / 16000)
    np.testing.assert_array_equal(span, read_audio(VOICE[kind])[first:stop])


@pytest.mark.parametrize("kind", ["opus", "mp3"])
def test_a_span_of_a_lossy_file_is_nearly_a_slice(kind):
    assert relative_error(read_audio(VOICE[kind], 0.75, 1.5), read_audio(VOICE[kind])[12000:24000]) < 0.02


def test_an_end_rounded_up_by_the_manifest_is_allowed():
    assert len(read_audio(VOICE["wav"], 1.0, 2.004)) == 16000


def test_silence_is_legitimate():
    np.testing.assert_array_equal(read_audio(encode(np.zeros(1000))), np.zeros(1000))


def test_overshoot_is_clipped():
    audio = read_audio(encode(3 * voice(), kind="float.wav"))
    np.testing.assert_allclose(audio, np.clip(3 * voice(), -1, 1), atol=1e-6)


def test_the_shortest_sound_fills_a_reflected_window():
    audio = read_audio(encode(voice()[:201]))
    assert len(audio) == round(MINIMUM_SECONDS * SAMPLE_RATE)
    np.pad(audio, 200, mode="reflect")
    with pytest.raises(AudioError, match="too short"):
        read_audio(encode(voice()[:200]))


def test_probe_reads_the_header():
    info = probe(encode(np.zeros((4410, 2)), 44100))
    assert (info.seconds, info.sample_rate, info.channels, info.format) == (0.1, 44100, 2, "WAV PCM_16")
    assert probe(VOICE["opus"]).seconds == pytest.approx(2.0)


def test_wav_written_to_a_pipe_is_whole():
    content = bytearray(VOICE["wav"])
    content[4:8] = content[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert len(read_audio(bytes(content))) == 32000


# What is wrong, and what the message must say beside the path.


def with_value(value):
    samples = voice()
    samples[777] = value
    return encode(samples, kind="float.wav")


def flac_without_length():
    content = bytearray(VOICE["flac"])  # the last 36 bits before the checksum of STREAMINFO
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    return bytes(content)


def corrupted(kind):
    content = bytearray(VOICE[kind])
    middle = len(content) // 2
    content[middle : middle + 1500] = np.random.default_rng(0).bytes(1500)
    return bytes(content)


BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"hello world\n" * 100, "no known format"),
    "header alone": (VOICE["wav"][:44], "no samples"),
    "no samples": (encode(np.zeros(0)), "no samples"),
    "one sample": (encode(np.zeros(1)), "too short"),
    "nan": (with_value(np.nan), "1 samples are NaN"),
    "infinite": (with_value(-np.inf), "1 samples are NaN or infinite"),
    "not scaled": (encode(20000 * voice(), kind="float.wav"), "not scaled"),
    "wrong rate": (encode(voice(), 4000), "4000 Hz"),
    "no length": (flac_without_length(), "length"),
    "flac corrupted": (corrupted("flac"), "broken"),
    "mp3 corrupted": (corrupted("mp3"), "broken"),
    **{
        f"{kind} cut at {share}": (VOICE[kind][: int(share * len(VOICE[kind]))], "cut off|broken")
        for kind in FORMATS
        for share in (0.3, 0.97)
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name, tmp_path):
    content, reason = BROKEN[name]
    path = tmp_path / "sound.dat"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(AudioError, match=reason) as caught:
            read_audio(source)
        assert str(source if source is path else "the given bytes") in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(AudioError, match=r"missing\.wav.*No such file"):
        read_audio(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match="directory"):
        read_audio(tmp_path)
    with pytest.raises(AudioError, match="null byte"):
        read_audio("a\0b.wav")
    with pytest.raises(AudioError, match="No such file"):
        probe(tmp_path / "missing.wav")


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [
        (-0.1, None, "start -0.1 s lies outside"),
        (2.0, None, "start 2 s lies outside.*2.000 s"),
        (float("nan"), None, "start nan"),
        (0.0, 2.5, "end 2.5 s lies outside"),
        (0.0, float("nan"), "end nan"),
        (1.0, 1.0, "not lie after"),
        (1.0, 0.5, "not lie after"),
        (1.0, 1.01, "too short"),
    ],
)
def test_spans_outside(start, end, reason):
    with pytest.raises(AudioError, match=reason):
        read_audio(VOICE["wav"], start, end)


def test_a_long_span_is_refused_before_it_is_decoded():
    content = with_value(np.nan)  # decoding would find the NaN
    with pytest.raises(AudioError, match=r"2\.0 s is longer than the allowed 1\.5 s"):
        read_audio(content, max_seconds=1.5)
    assert len(read_audio(VOICE["wav"], 0.5, max_seconds=1.5)) == 24000


@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from(["wav", "float.wav", "flac", "opus"]), data=st.data())
def test_any_damage_gives_sound_or_an_audio_error(kind, data):
    content = bytearray(VOICE[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(content) - 1)))
        content[place] = data.draw(st.integers(0, 255))
    try:
        audio = read_audio(bytes(content), max_seconds=60)
    except AudioError:
        return
    assert len(audio) > 200
    assert np.abs(audio).max() <= 1
