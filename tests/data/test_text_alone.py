"""Rows about text alone, from the manifest to a batch."""

import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.audio.tar_member import TarMember
from osum_npu.data.collate import Collator
from osum_npu.data.manifest import read_manifest, write_manifest
from osum_npu.data.pack import pack
from osum_npu.data.plan import Example, WeightedSource, plan_epoch, servable
from osum_npu.data.row import parse_row
from osum_npu.data.sources import read_source
from osum_npu.data.statistics import measure
from osum_npu.data.unpack import unpack
from osum_npu.models.tokenizer import train_tokenizer
from osum_npu.tasks import Utterance, get_task
from osum_npu.tasks.form import get_form
from osum_npu.tasks.utterance import TEXT_BYTES_PER_SECOND, TEXT_SECONDS

QUESTION = {"key": "q", "prompt": "who are you?", "reply": "a small model"}
INTENT = {"key": "i", "prompt": "how old is she?", "intent": "SAP-ONLY"}


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def mixed(tmp_path):
    """A manifest of two sounds and three texts."""
    rng = np.random.default_rng(0)
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(16000), 16000)
    return write_lines(
        tmp_path / "mixed.jsonl",
        {"key": "a", "wav": "a.wav", "txt": "hello", "reply": "world", "thought": "a greeting"},
        QUESTION,
        {"key": "b", "wav": "b.wav", "txt": "hello", "age": "old"},
        {**QUESTION, "key": "你", "thought": "why?", "lang": "zh"},
        INTENT,
    )


def test_rows_are_read_and_written_back(mixed, tmp_path):
    read = read_manifest(mixed, check_audio=True)
    assert read.faults == []
    sound, question, _, _, intent = read.utterances
    assert question == Utterance(key="q", wav=None, prompt="who are you?", reply="a small model")
    assert intent == Utterance(key="i", wav=None, prompt="how old is she?", intent="age-only")
    assert (sound.thought, sound.duration) == ("a greeting", 1.0)
    write_manifest(tmp_path / "again.jsonl", read.utterances)
    assert read_manifest(tmp_path / "again.jsonl").utterances == read.utterances


FAULTS = {
    "nothing": ({"prompt": None}, "no wav; a row about text alone has a prompt instead"),
    "empty prompt": ({"prompt": " "}, "prompt is empty"),
    "empty thought": ({"thought": ""}, "thought is empty"),
    "words": ({"txt": "a", "words": [["a", 0, 1]]}, "words speaks of a sound, and the row has no wav"),
    "span": ({"start": 1, "end": 2}, "start, end speaks of a sound"),
    "duration": ({"duration": 2}, "duration speaks of a sound"),
    "label": ({"age": "old"}, "age speaks of a sound"),
    "thought no text": ({"thought": 3}, "thought must be text"),
    "unknown intent": ({"intent": "height"}, "intent: there is no task 'height'"),
}


@pytest.mark.parametrize(("change", "reason"), FAULTS.values(), ids=FAULTS)
def test_faults(change, reason, tmp_path):
    read = read_manifest(write_lines(tmp_path / "m.jsonl", QUESTION, {**QUESTION, "key": "bad", **change}, INTENT))
    assert [utterance.key for utterance in read.utterances] == ["q", "i"]
    assert [fault.key for fault in read.faults] == ["bad"] * len(read.faults)
    assert any(reason in fault.reason for fault in read.faults)


def test_the_original_s_raw_rows_hold_instruction_and_thought_in_extra():
    extra = {"question": "how old?", "think_str": "she sounds young", "dataset": "x"}
    row = {"key": "a", "wav": "a.wav", "task": "<TRANSCRIBE> <AGE>", "txt": "hi<child>", "extra": extra}
    utterance, faults = parse_row(row, "")
    assert faults == []
    assert (utterance.prompt, utterance.thought, utterance.text) == ("how old?", "she sounds young", "hi")
    own, _ = parse_row({**row, "prompt": "mine", "extra": {"question": " ", "think_str": 3}}, "")
    assert (own.prompt, own.thought) == ("mine", None)
    plain, _ = parse_row({"key": "a", "wav": "a.wav", "extra": extra}, "")
    assert plain.prompt is None
    text, faults = parse_row({"key": "a", "task": "<TEXT2TEXT>", "extra": extra}, "")
    assert (text.wav, text.prompt, faults) == (None, "how old?", [])


def test_each_row_serves_tasks_of_its_kind(mixed):
    tasks = ("asr", "age-only", "chat", "chat_think", "text2text", "intent")
    served = {u.key: [t.name for t in servable(u, dict.fromkeys(tasks, 1))] for u in read_manifest(mixed).utterances}
    assert served == {
        "a": ["asr", "chat", "chat_think"],
        "b": ["asr", "age-only"],
        "q": ["text2text"],
        "你": ["text2text"],
        "i": ["intent"],
    }


@given(st.text(max_size=300), st.text(max_size=300))
def test_a_text_counts_for_its_bytes(prompt, reply):
    row = Utterance(key="a", wav=None, prompt=prompt, reply=reply)
    size = len(prompt.encode()) + len(reply.encode())
    assert row.seconds == pytest.approx(TEXT_SECONDS + size / TEXT_BYTES_PER_SECOND)
    assert replace(row, wav="a.wav").seconds == 0.0
    assert replace(row, wav="a.wav", duration=2.5).seconds == 2.5


def test_sources_leave_long_texts_out_and_measure_none(mixed):
    long = {**QUESTION, "key": "long", "reply": "a" * 400}
    with mixed.open("a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    rows, skipped = read_source(mixed, 10.0)
    assert {u.key: u.duration for u in rows} == {"a": 1.0, "q": None, "b": 1.0, "你": None, "i": None}
    size = len(long["prompt"] + long["reply"])
    counts = f"{1 + size / 40:.2f} s that its text counts for"
    assert skipped == [f"{mixed}: long: {counts} is more than max_seconds, 10 s"]


def test_steps_hold_as_much_text_as_they_may(mixed):
    texts = [Utterance(key=f"t{i}", wav=None, prompt="a" * (20 + 4 * i), reply="b") for i in range(40)]
    sounds = [Utterance(key=f"s{i}", wav="a.wav", duration=1.0 + i / 20, text="a") for i in range(40)]
    tasks = {"asr": 1, "text2text": 1}
    sources = [WeightedSource(sounds), WeightedSource(texts, 1.5)]
    plan = plan_epoch(sources, tasks, batch_seconds=12.0, seed=0, epoch=0)
    assert sorted(e.utterance.key for step in plan for e in step if e.utterance.wav) == sorted(u.key for u in sounds)
    assert sum(e.utterance.wav is None for step in plan for e in step) == 60
    for step in plan:
        lengths = [e.utterance.seconds for e in step]
        assert sum(lengths) <= 12.0
        assert lengths == sorted(lengths, reverse=True)
    assert any(len({e.utterance.wav for e in step}) == 2 for step in plan)


@pytest.fixture(scope="module")
def tokenizer():
    form = get_form("osum_pangu")
    return train_tokenizer(["hello world who are you a small model", *form.texts], [], 700)


def collate(tokenizer, rows, names, **settings):
    examples = [Example(row, tuple(map(get_task, of))) for row, of in zip(rows, names)]
    settings = {"n_mels": 80, "seed": 0, "spec_augment": None, "max_seconds": 2.0, **settings}
    return Collator(tokenizer=tokenizer, **settings)(examples, 0)


def test_a_batch_of_sound_and_text(tokenizer, mixed):
    rows = read_manifest(mixed).utterances
    names = [("asr", "chat_think"), ("text2text",), ("age-only",), ("text2text",), ("intent",)]
    batch = collate(tokenizer, rows, names, form=get_form("osum_pangu"))
    assert batch.skipped == []
    assert batch.about == [0, 0, None, 1, None, None]
    assert batch.samples == [16000, 16000]
    assert batch.wave_BS.shape == (2, 16000)
    assert batch.spellings == ["hello", "hello<old>"]
    assert len(batch.examples) == 5
    assert batch.seconds == 2.0
    said = [tokenizer.decode(answer[:-1]).replace(" ", "") for answer in batch.answers]
    think = "<chat><think>agreeting<thinkend>world"
    assert said == ["<asr>hello", think, "asmallmodel", "<age><OLD>", "asmallmodel", "<age>"]
    alone = collate(tokenizer, rows[1:2], names[1:2], form=get_form("osum_pangu"))
    assert (alone.prompts, alone.after, alone.answers) == (batch.prompts[2:3], batch.after[2:3], batch.answers[2:3])
    assert (alone.samples, alone.wave_BS.shape, alone.about) == ([], torch.Size([0, 0]), [None])


def test_a_broken_sound_takes_no_text_with_it(tokenizer, mixed, tmp_path):
    rows = read_manifest(mixed).utterances
    (tmp_path / "a.wav").write_bytes(b"")
    batch = collate(tokenizer, rows, [("asr",), ("text2text",), ("asr",), ("text2text",), ("intent",)])
    assert [line.split(":")[0] for line in batch.skipped] == ["a"]
    assert batch.about == [None, 0, None, None]


def test_shards_there_and_back(mixed, tmp_path):
    rows = read_manifest(mixed, check_audio=True).utterances
    packed = pack(mixed, tmp_path / "shards", per_tar=3)
    assert (packed.rows, packed.faults) == (5, [])
    for _ in range(2):  # the second time from the index
        read = read_manifest(tmp_path / "shards" / "shards_list.txt")
        assert read.faults == []
        assert [replace(u, wav=None) for u in read.utterances] == [replace(u, wav=None) for u in rows]
        assert [isinstance(u.wav, TarMember) for u in read.utterances] == [u.wav is not None for u in rows]
    with tarfile.open(tmp_path / "shards" / "shard_000000.tar") as tar:
        assert [name for name in tar.getnames() if name.startswith("q.")] == ["q.extra"]
    assert unpack(tmp_path / "shards" / "shards_list.txt", tmp_path / "files") == (5, [])
    back = read_manifest(tmp_path / "files" / "manifest.jsonl").utterances
    assert [replace(u, wav=None) for u in back] == [replace(u, wav=None) for u in rows]


def test_shards_of_text_alone(tmp_path):
    manifest = write_lines(tmp_path / "m.jsonl", QUESTION, INTENT)
    pack(manifest, tmp_path / "shards")
    want = read_manifest(manifest).utterances
    assert read_manifest(tmp_path / "shards" / "shard_000000.tar").utterances == want
    assert unpack(tmp_path / "shards" / "shards_list.txt", tmp_path / "files") == (2, [])
    assert read_manifest(tmp_path / "files" / "manifest.jsonl").utterances == want
    (tmp_path / "list.txt").write_text(f"{manifest}|shards/shard_000000.tar\n", "utf-8")
    assert read_manifest(tmp_path / "list.txt").utterances == want


def test_statistics_count_no_seconds_of_text(mixed, tmp_path):
    found = measure([mixed])
    assert (found.total.rows, found.total.seconds) == (5, 2.0)
    assert found.seconds["1"] == found.seconds["0"] == 1.0
    alone = measure([write_lines(tmp_path / "m.jsonl", QUESTION, INTENT)])
    assert (alone.total.rows, alone.total.hours, alone.seconds["mean"]) == (2, 0.0, 0.0)


def test_a_text_without_instruction_is_named_and_left_out(tokenizer):
    """Its answer would begin with what the sequence before it says."""
    row = Utterance(key="bare", wav=None, prompt="<no_prompt>", reply="world")
    other = Utterance(key="asked", wav=None, prompt="who are you", reply="a small model")
    batch = collate(tokenizer, [row, other], [("text2text",), ("text2text",)])
    assert [example.utterance.key for example in batch.examples] == ["asked"]
    assert batch.skipped == ["bare: text2text is about text alone, and its instruction is empty: give the row a prompt"]
    kept = collate(tokenizer, [row], [("text2text",)], form=get_form("osum_pangu"))
    assert kept.skipped == [], "a form that puts a text before it leaves something to answer"
