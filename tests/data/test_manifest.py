import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.data.manifest import read_manifest, write_manifest
from osum_npu.data.row import STYLE_NAMES
from osum_npu.tasks import TASKS, Utterance, Word, normalize_text

GOOD = {"key": "a", "wav": "a.wav", "txt": "hello world", "duration": 2.0}
ABSENT = object()


def write_lines(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read_one(tmp_path, **fields):
    manifest = read_manifest(write_lines(tmp_path / "m.jsonl", {"key": "a", "wav": "a.wav", **fields}))
    assert [str(fault) for fault in manifest.faults] == []
    return manifest.utterances[0]


def test_a_full_row(tmp_path):
    row = {
        "key": "u1",
        "wav": "audio/u1.flac",
        "txt": "Hello 你 好",
        "lang": "en",
        "speaker": "s",
        "gender": "male",
        "age": "child",
        "age_years": 6,
        "emotion": "happy",
        "event": "throat clearing",
        "style": "audiobook",
        "translation": "x",
        "duration": 2,
        "start": 1,
        "end": 3.0,
        "reply": "Yes.",
        "prompt": "Write it down.",
        "words": [["Hello", 0, 0.5], ["你", 0.5, 0.7], ["好", 0.7, 1.0]],
    }
    [utterance] = read_manifest(write_lines(tmp_path / "m.jsonl", row)).utterances
    assert utterance == Utterance(
        key="u1",
        wav=str(tmp_path / "audio/u1.flac"),
        text="hello你好",
        lang="en",
        speaker="s",
        duration=2.0,
        start=1.0,
        end=3.0,
        words=(Word("hello", 0, 0.5), Word("你", 0.5, 0.7), Word("好", 0.7, 1.0)),
        labels={
            "gender": "male",
            "age": "child",
            "emotion": "happy",
            "event": "throat clearing",
            "style": "有声书",
        },
        reply="Yes.",
        prompt="Write it down.",
    )


def test_null_means_not_labelled(tmp_path):
    fields = ("txt", "lang", "gender", "words", "duration", "reply", "start", "end", "task", "age_years")
    assert read_one(tmp_path, **dict.fromkeys(fields)) == Utterance(key="a", wav=str(tmp_path / "a.wav"))


def test_a_span_gives_the_duration(tmp_path):
    assert read_one(tmp_path, start=1.5, end=4.0).duration == 2.5


def test_absolute_paths_stay(tmp_path):
    assert read_one(tmp_path, wav="/somewhere/b.wav").wav == "/somewhere/b.wav"


# One faulty row between two good ones: what is changed in a good row, and what the fault must say.
FAULTS = {
    "long prompt": ({"prompt": "a" * 10000}, "the prompt has 10000 characters"),
    "unknown intent": ({"prompt": "a", "intent": "agee"}, "intent: there is no task 'agee'"),
    "intent of nothing": ({"intent": "age"}, "there is no prompt"),
    "no key": ({"key": ABSENT}, "no key"),
    "null key": ({"key": None}, "no key"),
    "empty key": ({"key": " "}, "key is empty"),
    "number as key": ({"key": 7}, "key must be text, not a number: 7"),
    "no wav": ({"wav": ABSENT}, "no wav"),
    "empty wav": ({"wav": ""}, "wav is empty"),
    "empty txt": ({"txt": ""}, "txt is empty; write null"),
    "blank txt": ({"txt": " \t"}, "txt is empty"),
    "blank reply": ({"reply": " "}, "reply is empty"),
    "mark in txt": ({"txt": "hello<male>"}, "<male>, which reads as a label"),
    "null byte in txt": ({"txt": "a\0b"}, "txt holds a null byte"),
    "half a surrogate": (b'{"key": "bad", "wav": "a.wav", "txt": "\\ud83d"}', "surrogate"),
    "list as txt": ({"txt": ["a"]}, "txt must be text, not a list"),
    "text as duration": ({"duration": "2.0"}, "duration must be a number, not text: '2.0'"),
    "boolean as duration": ({"duration": True}, "duration must be a number, not true or false"),
    "object as words": ({"words": {}}, "words must be a list, not an object"),
    "gender": ({"gender": "mael"}, "gender 'mael' is none of female, male; did you mean 'male'?"),
    "case of gender": ({"gender": "Female"}, "did you mean 'female'?"),
    "age": ({"age": "teen"}, "age 'teen' is none of child, adult, old"),
    "emotion": ({"emotion": "suprise"}, "did you mean 'surprise'?"),
    "event": ({"event": "throat-clearing"}, "did you mean 'throat clearing'?"),
    "style": ({"style": "audiobok"}, "did you mean 'audiobook'?"),
    "unknown field": ({"gendr": "male"}, "unknown field 'gendr'; did you mean 'gender'?"),
    "strange field": ({"zzzzzz": 1}, "unknown field 'zzzzzz'"),
    "language": ({"lang": "English (US)"}, "no language code"),
    "number as language": ({"lang": 1}, "lang must be text"),
    "negative duration": ({"duration": -1}, "duration must be more than 0 seconds, not -1"),
    "no duration": ({"duration": 0}, "more than 0"),
    "nan duration": ({"duration": math.nan}, "not nan"),
    "infinite duration": ({"duration": math.inf}, "not inf"),
    "huge duration": ({"duration": 10**400}, "not inf"),
    "negative start": ({"start": -0.5}, "start must be 0 or more"),
    "end before start": ({"start": 2, "end": 1}, "end must lie after start (2 s), not at 1 s"),
    "end at start": ({"end": 0}, "end must lie after start"),
    "nan end": ({"end": math.nan}, "not at nan s"),
    "duration and span": ({"start": 1, "end": 4}, "duration 2 s disagrees with the 3 s from start to end"),
    "no words": ({"words": []}, "words is an empty list"),
    "word of two": ({"words": [["hello", 0.1]]}, "word 1 must be [text, start, end]"),
    "word of wrong types": ({"words": [["hello", 0, 1], ["world", "1", 2]]}, "word 2 must be [text, start, end]"),
    "empty word": ({"words": [["", 0, 1]]}, "word 1 must be"),
    "word backwards": ({"words": [["hello", 1, 0.5], ["world", 1, 2]]}, "word 'hello' lasts from 1 to 0.5 s"),
    "negative word": ({"words": [["hello", -1, 0.5], ["world", 1, 2]]}, "word 'hello' lasts from -1"),
    "nan word": ({"words": [["hello", 0, math.nan], ["world", 1, 2]]}, "word 'hello' lasts from 0 to nan"),
    "words out of order": (
        {"words": [["hello", 1, 1.5], ["world", 0.2, 0.9]]},
        "word 'world' at 0.2 s follows 'hello' at 1 s",
    ),
    "words beyond the end": ({"words": [["hello", 0, 1], ["world", 1, 2.2]]}, "words end at 2.2 s, beyond"),
    "words not said": ({"words": [["hello", 0, 1], ["word", 1, 2]]}, "words say 'hello word', txt says 'hello world'"),
    "words without txt": ({"txt": None, "words": [["hello", 0, 1]]}, "txt says None"),
    "task": ({"task": "gendr"}, "there is no task 'gendr'"),
    "raw without label": ({"task": "<TRANSCRIBE> <GENDER>"}, "must hold <gender>"),
    "raw with a wrong label": ({"task": "SGC", "txt": "hello<mail>"}, "<mail> is no label of task 'gender'"),
    "raw left unlabelled": ({"task": "SER", "txt": "hello<NONE>"}, "<none> is no label of task 'emotion'"),
    "raw with two labels": ({"task": "SGC", "txt": "hello<male><child>"}, "must hold <gender> and no other mark"),
    "raw transcript with a label": ({"task": "ASR", "txt": "hello<male>"}, "task without labels holds marks"),
    "raw chat without reply": ({"task": "STTC"}, "txt: no <开始回答>"),
    "raw times": ({"task": "SRWT", "txt": "<0.10>hello<0.5>world"}, "stands outside <start>word<end>"),
    "raw contradiction": ({"task": "SGC", "txt": "hello<male>", "gender": "<FEMALE>"}, "gender says 'female'"),
    "no json": (b'{"key": "b"', "no JSON"),
    "no object": (b"[1, 2]", "the line holds a list; a row is a JSON object"),
    "null": (b"null", "the line holds null"),
    "deep nesting": (b"[" * 100_000, "no JSON"),
    "long number": (b'{"key": 1' + b"0" * 5000 + b"}", "no JSON"),
    "not UTF-8": ('{"key": "é"}'.encode("latin-1"), "byte 10 of the line (0xe9) is no UTF-8"),
    "null bytes": (b"\0" * 20, "20 null bytes"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_and_good_rows_survive(name, tmp_path):
    change, reason = FAULTS[name]
    bad = change
    if isinstance(change, dict):
        bad = {name: value for name, value in {**GOOD, "key": "bad", **change}.items() if value is not ABSENT}
    path = write_lines(tmp_path / "m.jsonl", GOOD, bad, {**GOOD, "key": "c"})
    manifest = read_manifest(path)
    assert [utterance.key for utterance in manifest.utterances] == ["a", "c"]
    [fault] = manifest.faults
    assert fault.line == 2
    assert reason in fault.reason
    key = bad.get("key") if isinstance(bad, dict) else "bad" if b'"bad"' in bad else ""
    assert fault.key == (key if isinstance(key, str) else "")
    assert str(fault).startswith(f"{path}:2: ")
    assert str(fault).endswith(fault.reason)


def test_all_faults_of_a_file_in_order_of_lines(tmp_path):
    rows = [
        {"key": "a", "wav": "", "gender": "x", "lenght": 1},
        GOOD,
        b"",
        b"{",
        {**GOOD, "duration": -1},
        {**GOOD, "key": "d", "lang": "English", "start": -1},
    ]
    manifest = read_manifest(write_lines(tmp_path / "m.jsonl", *rows))
    assert [fault.line for fault in manifest.faults] == [1, 1, 1, 2, 4, 5, 5, 6, 6]
    assert [fault.reason for fault in manifest.faults if "occurs" in fault.reason] == [
        "the key occurs already in line 1"
    ] * 2
    assert manifest.utterances == []


def test_a_repeated_key_leaves_the_first_row(tmp_path):
    manifest = read_manifest(write_lines(tmp_path / "m.jsonl", GOOD, {**GOOD, "txt": "other"}))
    assert [utterance.text for utterance in manifest.utterances] == ["hello world"]
    assert str(manifest.faults[0]) == f"{tmp_path / 'm.jsonl'}:2: a: the key occurs already in line 1"


def test_byte_order_marks(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    manifest = read_manifest(path)
    assert [utterance.key for utterance in manifest.utterances] == ["a"]
    assert "byte-order mark" in manifest.faults[0].reason
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    assert [(fault.line, "UTF-16" in fault.reason) for fault in read_manifest(path).faults] == [(1, True)]


def test_windows_line_ends_and_a_missing_last_one(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps({**GOOD, "key": "b"}).encode())
    manifest = read_manifest(path)
    assert [utterance.key for utterance in manifest.utterances] == ["a", "b"]
    assert manifest.faults == []


def test_missing_and_empty_manifests(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the manifest .*m\.jsonl: No such file"):
        read_manifest(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="directory"):
        read_manifest(tmp_path)
    (tmp_path / "m.jsonl").write_bytes(b"\n")
    assert "no rows" in read_manifest(tmp_path / "m.jsonl").faults[0].reason


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"task": "<TRANSCRIBE> <GENDER>", "txt": "Hello <MALE>"}, {"text": "hello", "labels": {"gender": "male"}}),
        ({"task": "<TRANSCRIBE><EMOTION>", "txt": "<happy>"}, {"labels": {"emotion": "happy"}}),
        ({"task": "<EMOTION><AGE>", "txt": "<ANGRY><MIDDLE_AGE>"}, {"labels": {"emotion": "anger", "age": "adult"}}),
        ({"task": "<TRANSCRIBE>", "txt": "hi", "age": "<YOUTH>"}, {"text": "hi", "labels": {"age": "adult"}}),
        ({"task": "age-only", "txt": "<OLD>"}, {"labels": {"age": "old"}}),
        ({"task": "<S2TCHAT>", "txt": "Fine."}, {"reply": "fine."}),
        ({"task": "VED", "txt": "你 好<Throat Clearing>"}, {"text": "你好", "labels": {"event": "throat clearing"}}),
        ({"task": "<TRANSCRIBE> <STYLE>", "txt": "从前<小说>"}, {"text": "从前", "labels": {"style": "有声书"}}),
        (
            {"task": "<TRANSCRIBE> <AGE> <GENDER>", "txt": "hi<ADULT><FEMALE>"},
            {"text": "hi", "labels": {"age": "adult", "gender": "female"}},
        ),
        (
            {"task": "<STYLE> <AGE> <GENDER>", "txt": "<客服><old><male>"},
            {"labels": {"style": "客服", "age": "old", "gender": "male"}},
        ),
        (
            {"task": "<TRANSCRIBE> <S2TCHAT>", "txt": "who are you<开始回答>a model"},
            {"text": "who are you", "reply": "a model"},
        ),
        (
            {"task": "<TRANSCRIBE> <ALIGN>", "txt": "<0.1>你<0.3><0.35>hi<0.8>"},
            {"text": "你hi", "words": (Word("你", 0.1, 0.3), Word("hi", 0.35, 0.8))},
        ),
        (
            {
                "task": "<TRANSCRIBE>",
                "txt": "HI",
                "lang": "<CN>",
                "speaker": "<NONE>",
                "gender": "<FEMALE>",
                "emotion": "<NONE>",
                "extra": {"dataset": "x", "speech_token": [1]},
            },
            {"text": "hi", "lang": "zh", "labels": {"gender": "female"}},
        ),
    ],
)
def test_raw_rows_become_plain_ones(row, wanted, tmp_path):
    assert read_one(tmp_path, **row) == Utterance(key="a", wav=str(tmp_path / "a.wav"), **wanted)


def test_every_style_name_leads_to_a_style():
    assert set(STYLE_NAMES.values()) <= set(TASKS["style"].labels)


# Writing.

plain_text = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<>"), min_size=1)
    .map(lambda text: normalize_text(text).strip())
    .filter(lambda text: text and normalize_text(text).strip() == text)
)
name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
seconds = st.floats(0.01, 1000)


@st.composite
def utterances(draw):
    start = draw(st.floats(0, 100))
    end = draw(st.one_of(st.none(), seconds.map(lambda length: start + length)))
    times = sorted(draw(st.lists(st.floats(0, 5), min_size=2, max_size=2)))
    text = draw(st.one_of(st.none(), plain_text))
    return Utterance(
        key=draw(name),
        wav=draw(st.sampled_from(["FOLDER/audio/x.wav", "FOLDER/ü 1.flac", "/elsewhere/y.mp3"])),
        start=start,
        end=end,
        duration=draw(st.one_of(st.none(), seconds)) if end is None else end - start,
        text=text,
        lang=draw(st.sampled_from([None, "en", "zh", "zh-CN"])),
        speaker=draw(st.one_of(st.none(), name)),
        words=None,
        labels=draw(
            st.fixed_dictionaries(
                {}, optional={task.name: st.sampled_from(task.labels) for task in TASKS.values() if task.labels}
            )
        ),
        reply=draw(st.one_of(st.none(), name)),
        **draw(st.sampled_from([{}, {"prompt": "How old?"}, {"prompt": "How old?", "intent": "emotion+age-only"}])),
    ), Word(text or "", *times)


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(utterances(), min_size=1, max_size=4, unique_by=lambda pair: pair[0].key))
def test_what_is_written_is_read_back(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifests")
    written = []
    for utterance, word in drawn:
        fits = utterance.text and (utterance.duration or math.inf) > word.end
        words = (word,) if fits else None
        written.append(replace(utterance, wav=utterance.wav.replace("FOLDER", str(folder)), words=words))
    assert write_manifest(folder / "m.jsonl", written) == len(written)
    manifest = read_manifest(folder / "m.jsonl")
    assert [str(fault) for fault in manifest.faults] == []
    assert manifest.utterances == written


def test_a_folder_can_be_moved_with_its_manifest(tmp_path):
    old = tmp_path / "old"
    write_manifest(
        old / "m.jsonl", [Utterance(key="a", wav=str(old / "audio" / "a.wav")), Utterance(key="b", wav="/b.wav")]
    )
    old.rename(tmp_path / "new")
    assert [utterance.wav for utterance in read_manifest(tmp_path / "new" / "m.jsonl").utterances] == [
        str(tmp_path / "new" / "audio" / "a.wav"),
        "/b.wav",
    ]


def test_relative_sounds_are_found_from_where_the_manifest_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_manifest("lists/m.jsonl", [Utterance(key="a", wav="lists/a.wav"), Utterance(key="b", wav="b.wav")])
    wavs = [utterance.wav for utterance in read_manifest(tmp_path / "lists" / "m.jsonl").utterances]
    assert wavs == [str(tmp_path / "lists" / "a.wav"), str(tmp_path / "b.wav")]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, [Utterance(key="a", wav="a.wav")])
    before = path.read_bytes()

    def failing():
        yield Utterance(key="b", wav="b.wav")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_manifest(path, failing())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.jsonl"]


# Sound.


@pytest.fixture
def sounds(tmp_path):
    noise = 0.1 * np.random.default_rng(0).normal(size=32000)
    nan = noise.astype(np.float32)
    nan[5] = np.nan
    soundfile.write(tmp_path / "good.wav", noise, 16000)
    soundfile.write(tmp_path / "telephone.wav", noise[:16000], 8000)
    soundfile.write(tmp_path / "nan.wav", nan, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "one.wav", noise[:1], 16000)
    soundfile.write(tmp_path / "slow.wav", noise, 2000)
    soundfile.write(tmp_path / "silent.wav", 0 * noise, 16000)
    soundfile.write(tmp_path / "whole.flac", noise, 16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:20000])
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound")
    return tmp_path


def test_sound_is_checked_against_its_row(sounds):
    rows = [
        ({"wav": "good.wav", "duration": 2.0}, ""),
        ({"wav": "missing.wav"}, "missing.wav: No such file"),
        ({"wav": "empty.wav"}, "empty"),
        ({"wav": "text.wav"}, "no known format"),
        ({"wav": "cut.flac"}, "broken"),
        ({"wav": "nan.wav"}, "NaN"),
        ({"wav": "telephone.wav", "duration": 2.0}, ""),
        ({"wav": "one.wav"}, "too short"),
        ({"wav": "slow.wav"}, "2000 Hz"),
        ({"wav": "good.wav", "duration": 2.2}, "duration is given as 2.2 s, the sound lasts 2.000 s"),
        ({"wav": "good.wav", "duration": 2.09}, ""),
        ({"wav": "good.wav", "start": 0.5, "end": 1.5}, ""),
        ({"wav": "good.wav", "start": 1.5, "end": 2.5}, "end 2.5 s lies outside"),
        ({"wav": "good.wav", "start": 2.5}, "start 2.5 s lies outside"),
        ({"wav": "good.wav", "duration": -1}, "more than 0"),
        ({"wav": "silent.wav", "txt": "hi"}, "silent throughout"),
        ({"wav": "silent.wav"}, ""),
        ({"wav": "good.wav", "txt": "hi", "words": [["hi", 1, 2.5]]}, "word 'hi' ends at 2.5 s"),
        ({"wav": "good.wav", "start": 0.5}, ""),
    ]
    path = write_lines(sounds / "m.jsonl", *({"key": str(line), **row} for line, (row, _) in enumerate(rows, 1)))
    manifest = read_manifest(path, check_audio=True)
    wanted = {line: reason for line, (_, reason) in enumerate(rows, 1) if reason}
    assert [fault.line for fault in manifest.faults] == list(wanted)
    for fault in manifest.faults:
        assert wanted[fault.line] in fault.reason
        assert fault.key == str(fault.line)
    assert [utterance.key for utterance in manifest.utterances] == [
        str(line) for line, (_, reason) in enumerate(rows, 1) if not reason
    ]
    assert manifest.utterances[-1].duration == pytest.approx(1.5)
    assert len(read_manifest(path).faults) == 1


@pytest.mark.parametrize("pack", ["fsdd", "librispeech_mini"])
def test_public_recordings_have_no_faults(pack):
    folder = os.environ.get("OSUM_DATA_DIR")
    if folder is None or not (Path(folder) / pack).is_dir():
        pytest.skip(f"OSUM_DATA_DIR names no folder with {pack}")
    manifest = read_manifest(Path(folder) / pack / "dev.jsonl", check_audio=True)
    assert manifest.faults == []
    assert len(manifest.utterances) == {"fsdd": 240, "librispeech_mini": 20}[pack]
