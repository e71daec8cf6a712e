"""Kaldi's data folders."""

import pytest
import soundfile
from shard_tools import noise

from osum_npu.data.manifest import read_manifest
from osum_npu.tasks import Utterance


@pytest.fixture
def folder(tmp_path):
    soundfile.write(tmp_path / "r1.wav", noise(1.0), 16000)
    soundfile.write(tmp_path / "r2.flac", noise(0.5, 1), 16000)
    return tmp_path


def write(folder, **tables):
    for name, text in tables.items():
        (folder / name.replace("wav_scp", "wav.scp")).write_text(text, "utf-8")


def read(folder, **options):
    manifest = read_manifest(folder, **options)
    return manifest.utterances, [str(fault) for fault in manifest.faults]


def test_recordings(folder):
    write(
        folder,
        wav_scp=f"r1 r1.wav\nr2   {folder / 'r2.flac'}\n",
        text="r1 Hello  WORLD\nr2\n",
        utt2spk="r1 s1\nr2 s2\n",
        spk2gender="s1 m\ns2 F\n",
        utt2dur="r1 1.0\n",
        utt2lang="r1 en\n",
    )
    utterances, faults = read(folder, check_audio=True)
    assert faults == []
    assert utterances == [
        Utterance(
            key="r1",
            wav=str(folder / "r1.wav"),
            duration=1.0,
            text="hello  world",
            lang="en",
            speaker="s1",
            labels={"gender": "male"},
        ),
        Utterance(key="r2", wav=str(folder / "r2.flac"), duration=0.5, speaker="s2", labels={"gender": "female"}),
    ]


def test_segments(folder):
    write(
        folder,
        wav_scp="r1 r1.wav\n",
        segments="u1 r1 0.10 0.60\nu2 r1 0.5 -1\nu3 r9 0 1\nu4 r1 0\nu5 r1 x 1\nu6 r1 0.5 0.2\nu7 r1 0.5 5\n",
        text="u1 one\nu2 two\nu9 nine\n",
        utt2gender="u1 female\n",
    )
    utterances, faults = read(folder, check_audio=True)
    wav = str(folder / "r1.wav")
    assert utterances == [
        Utterance(key="u1", wav=wav, start=0.1, end=0.6, duration=0.5, text="one", labels={"gender": "female"}),
        Utterance(key="u2", wav=wav, start=0.5, duration=0.5, text="two"),
    ]
    segments = folder / "segments"
    assert faults == [
        f"{segments}:3: u3: its recording r9 is not in wav.scp",
        f"{segments}:4: u4: a segment is <recording> <start> <end>, not 'r1 0'",
        f"{segments}:5: u5: a segment is <recording> <start> <end>, not 'r1 x 1'",
        f"{segments}:6: u6: end must lie after start (0.5 s), not at 0.2 s",
        f"{segments}:7: u7: cannot read {wav}: end 5 s lies outside the sound, which lasts 1.000 s",
        f"{folder / 'text'}:3: u9: it has a transcript and no sound",
    ]


def test_commands_are_refused_and_never_run(folder):
    trace = folder / "trace"
    write(
        folder,
        wav_scp=f"bad1 touch {trace} |\nbad2 | touch {trace}\nbad3 wav.ark:17\ngood r1.wav\n",
        segments="u1 bad1 0 1\nu2 good 0 0.5\n",
    )
    utterances, faults = read(folder, check_audio=True)
    assert [u.key for u in utterances] == ["u2"]
    scp = folder / "wav.scp"
    assert [fault.split(";")[0] for fault in faults] == [
        f"{scp}:1: bad1: it is a command, and commands are not run",
        f"{scp}:2: bad2: it is a command, and commands are not run",
        f"{scp}:3: bad3: it lies in a Kaldi archive, which is not read",
        f"{folder / 'segments'}:1: u1: its recording bad1 cannot be used",
    ]
    assert not trace.exists()


def test_faulty_tables(folder):
    write(folder, wav_scp="r1 r1.wav\nr1 r2.flac\nr2\n", utt2dur="r1 long\n")
    (folder / "text").write_bytes(b"r1 hello\nr\xff x\nr2 a\0b\n")
    utterances, faults = read(folder)
    assert utterances == []
    assert [fault.removeprefix(str(folder)) for fault in faults] == [
        "/wav.scp:2: r1: it occurs already in line 1",
        "/wav.scp:3: r2: nothing follows the name",
        "/text:2: byte 2 of the line (0xff) is no UTF-8",
        "/text:3: the line holds null bytes; the file is damaged or no text",
        "/wav.scp:1: r1: duration must be a number, not text: 'long'",
    ]
    write(folder, wav_scp="")
    assert "holds no rows" in read(folder)[1][-1] or read(folder)[1]
