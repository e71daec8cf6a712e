"""m4a and wma by PyAV, the extra ``codecs``."""

import io
import sys

import numpy as np
import pytest

from osum_npu.audio.read import AudioError, probe, read_audio

RATE = 16000


def tone(seconds=1.5, frequency=440):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(RATE * seconds)) / RATE)).astype(np.float32)


def encode(samples, container, codec):
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'osum-npu[codecs]'")
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        track = out.add_stream(codec, rate=RATE, layout="mono", bit_rate=64000)
        resampler = av.AudioResampler(format=track.codec_context.format, layout="mono", rate=RATE, frame_size=1024)
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(track.encode(part))
        out.mux(track.encode(None))
    return stream.getvalue()


KINDS = {"m4a": ("mp4", "aac"), "wma": ("asf", "wmav2")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_sound_comes_back(kind):
    data = encode(tone(), *KINDS[kind])
    audio = read_audio(data)
    assert audio.dtype == np.float32
    assert abs(len(audio) / RATE - 1.5) < 0.15  # encoders pad with silence
    spectrum = np.abs(np.fft.rfft(audio[4000:20000]))
    assert np.argmax(spectrum) == 440
    assert 0.4 < np.abs(audio[4000:20000]).max() < 0.6
    assert probe(data).sample_rate == RATE
    assert len(read_audio(data, 0.25, 0.75)) == 8000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.4, 0.8])
def test_a_cut_file_is_named(kind, share, tmp_path):
    data = encode(tone(4.0), *KINDS[kind])
    path = tmp_path / "sound.bin"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(AudioError, match=r"cannot read .*sound\.bin: .*(cut off|broken|no sound)"):
        read_audio(path)


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"m4a and wma need the extra codecs: pip install 'osum-npu\[codecs\]'"):
        read_audio(b"\0\0\0\x20ftypM4A " + bytes(500))
