import numpy as np
import pytest
import soundfile

from osum_npu.data.manifest import read_manifest
from osum_npu.data.prepare import PREPARE


def sound(path, seconds=0.5, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(0).normal(size=round(seconds * rate))
    soundfile.write(path, samples, rate, format="FLAC" if path.suffix == ".flac" else "WAV")


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def rows(path):
    manifest = read_manifest(path, check_audio=True)
    assert [str(fault) for fault in manifest.faults] == []
    return {utterance.key: utterance for utterance in manifest.utterances}


def skipped(summary):
    return {path.name: reason for path, reason in summary.skipped}


def test_fsdd(tmp_path):
    source, out = tmp_path / "fsdd", tmp_path / "out"
    for name in ("7_george_0", "7_george_4", "0_theo_5", "0_theo_8", "9_jackson_9", "9_jackson_49", "3_newcomer_10"):
        sound(source / "recordings" / f"{name}.wav", 0.4, 8000)
    sound(source / "recordings" / "seven.wav")
    (source / "recordings" / "1_lucas_20.wav").write_bytes(b"broken")
    summary = PREPARE["fsdd"](source, out)
    assert {path.name: count for path, count in summary.rows.items()} == {
        "train.jsonl": 3,
        "dev.jsonl": 2,
        "test.jsonl": 2,
    }
    assert set(rows(out / "test.jsonl")) == {"fsdd_7_george_0", "fsdd_7_george_4"}
    assert set(rows(out / "dev.jsonl")) == {"fsdd_0_theo_5", "fsdd_0_theo_8"}
    train = rows(out / "train.jsonl")
    nine = train["fsdd_9_jackson_49"]
    assert (nine.text, nine.lang, nine.speaker, nine.duration) == ("nine", "en", "fsdd_jackson", 0.4)
    assert nine.labels == {"gender": "male"}
    assert train["fsdd_3_newcomer_10"].labels == {}
    assert rows(out / "dev.jsonl")["fsdd_0_theo_5"].labels == {}
    reasons = skipped(summary)
    assert set(reasons) == {"seven.wav", "1_lucas_20.wav"}
    assert "{digit}_{speaker}_{take}" in reasons["seven.wav"]
    assert "no known format" in reasons["1_lucas_20.wav"]
    assert "seven.wav: its name" in str(summary)


@pytest.mark.parametrize("prefix", ["", "SPEAKER"])
def test_speechocean762(tmp_path, prefix):
    source, out = tmp_path / "speechocean762", tmp_path / "out"
    for speaker in ("0001", "0003", "0094"):
        for number in "12":
            sound(source / "WAVE" / f"SPEAKER{speaker}" / f"{speaker}0{number}.WAV", 0.75)
    (source / "WAVE" / "SPEAKER0003" / "000302.WAV").unlink()
    place = "WAVE/SPEAKER{0}/{0}0{1}.WAV".format
    text(
        source / "train" / "wav.scp",
        *(f"{speaker}0{number}\t{place(speaker, number)}" for speaker in ("0001", "0003") for number in "12"),
    )
    text(source / "train" / "text", "000101\tWE CALL IT BEAR", "000102", "000301\tI'M FINE", "000302\tGONE")
    text(source / "train" / "spk2age", f"{prefix}0001\t14", f"{prefix}0003\t15")
    text(source / "train" / "spk2gender", f"{prefix}0001\tm", f"{prefix}0003\tf")
    text(source / "test" / "wav.scp", *(f"00940{number}\t{place('0094', number)}" for number in "12"))
    text(source / "test" / "text", "009401\tONE", "009402\tTWO")
    text(source / "test" / "spk2age", f"{prefix}0094\tunknown")
    text(source / "test" / "spk2gender")
    summary = PREPARE["speechocean762"](source, out)
    train = rows(out / "train.jsonl")
    assert set(train) == {"so762_000101", "so762_000301"}
    first, second = train.values()
    assert (first.text, first.speaker, first.lang, first.duration) == ("we call it bear", "so762_0001", "en", 0.75)
    assert first.labels == {"gender": "male", "age": "child"}
    assert second.labels == {"gender": "female", "age": "adult"}
    assert [utterance.labels for utterance in rows(out / "test.jsonl").values()] == [{}, {}]
    reasons = skipped(summary)
    assert set(reasons) == {"000102.WAV", "000302.WAV"}
    assert "no transcript of 000102" in reasons["000102.WAV"]
    assert "No such file" in reasons["000302.WAV"]


@pytest.mark.parametrize("inside", [True, False])
def test_librispeech(tmp_path, inside):
    root, out = tmp_path / "LibriSpeech", tmp_path / "out"
    for name in ("103-1240-0000", "103-1240-0001", "103-1240-0002"):
        sound(root / "train-clean-100" / "103" / "1240" / f"{name}.flac")
    text(
        root / "train-clean-100" / "103" / "1240" / "103-1240.trans.txt",
        "103-1240-0000 CHAPTER ONE",
        "103-1240-0001 MISSUS RACHEL LYNDE'S",
        "103-1240-0003 NEVER RECORDED",
    )
    sound(root / "dev-clean" / "84" / "121123" / "84-121123-0000.flac")
    text(root / "dev-clean" / "84" / "121123" / "84-121123.trans.txt", "84-121123-0000 GO DO YOU HEAR")
    sound(root / "dev-clean" / "84" / "121550" / "84-121550-0000.flac")
    text(
        root / "SPEAKERS.TXT",
        "; a comment | with | bars",
        ";ID  |SEX| SUBSET           |MINUTES| NAME",
        "84   | M | dev-clean        |  8.02 | Christie Nowak",
        "103  | F | train-clean-100  | 25.05 | Karen | Savage",
    )
    text(root / "README.TXT", "nothing")
    summary = PREPARE["librispeech"](tmp_path if inside else root, out)
    train = rows(out / "train-clean-100.jsonl")
    assert {key: utterance.text for key, utterance in train.items()} == {
        "ls_103-1240-0000": "chapter one",
        "ls_103-1240-0001": "missus rachel lynde's",
    }
    assert train["ls_103-1240-0000"].labels == {"gender": "female"}
    assert train["ls_103-1240-0000"].speaker == "ls_103"
    assert [utterance.labels for utterance in rows(out / "dev-clean.jsonl").values()] == [{"gender": "male"}]
    reasons = skipped(summary)
    assert set(reasons) == {"103-1240-0002.flac", "103-1240-0003.flac", "84-121550-0000.flac"}
    assert "no transcript" in reasons["103-1240-0002.flac"]
    assert "No such file" in reasons["103-1240-0003.flac"]
    assert "84-121550.trans.txt" in reasons["84-121550-0000.flac"]


def aishell(root):
    wav = root / "data_aishell" / "wav"
    for part, name in (("train", "S0002"), ("dev", "S0724"), ("test", "S0764")):
        for number in ("0121", "0122"):
            sound(wav / part / name / f"BAC009{name}W{number}.wav")
    text(
        root / "data_aishell" / "transcript" / "aishell_transcript_v0.8.txt",
        "BAC009S0002W0121 甚至 出现 交易 几乎 停滞 的 情况",
        "BAC009S0002W0122 一二 线 城市",
        "BAC009S0724W0121 广州市 Ｔ 恤",
        "BAC009S0724W0122 好",
        "BAC009S0764W0121 甚至",
    )
    text(root / "resource_aishell" / "speaker.info", "0002 F", "0724 M")
    return wav


def test_aishell1(tmp_path):
    wav, out = aishell(tmp_path), tmp_path / "out"
    (wav / "dev" / "S0724" / "BAC009S0724W0122.wav").write_bytes(b"")
    summary = PREPARE["aishell1"](tmp_path, out)
    train = rows(out / "train.jsonl")
    assert train["aishell_BAC009S0002W0121"].text == "甚至出现交易几乎停滞的情况"
    assert train["aishell_BAC009S0002W0122"].labels == {"gender": "female"}
    assert train["aishell_BAC009S0002W0122"].lang == "zh"
    assert [utterance.labels for utterance in rows(out / "dev.jsonl").values()] == [{"gender": "male"}]
    assert [utterance.labels for utterance in rows(out / "test.jsonl").values()] == [{}]
    reasons = skipped(summary)
    assert set(reasons) == {"BAC009S0724W0122.wav", "BAC009S0764W0122.wav"}
    assert "empty" in reasons["BAC009S0724W0122.wav"]
    assert "no transcript" in reasons["BAC009S0764W0122.wav"]


def test_aishell1_still_packed(tmp_path):
    wav = aishell(tmp_path)
    (wav / "S0003.tar.gz").touch()
    with pytest.raises(ValueError, match=r"S0003\.tar\.gz .*unpack"):
        PREPARE["aishell1"](tmp_path, tmp_path / "out")


@pytest.mark.parametrize("corpus", PREPARE)
def test_a_folder_that_is_not_the_corpus(corpus, tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        PREPARE[corpus](tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_usable(tmp_path):
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "0_theo_0.wav").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1 were skipped\n.*0_theo_0\.wav"):
        PREPARE["fsdd"](tmp_path, tmp_path / "out")
