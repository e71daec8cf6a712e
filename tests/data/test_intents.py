"""Rows that teach which task an instruction asks for."""

import json
from collections import Counter

import pytest

from osum_npu.data.intents import write_intents
from osum_npu.data.manifest import read_manifest
from osum_npu.data.plan import servable
from osum_npu.tasks import LISTED, Utterance, get_task, missing, read, write
from osum_npu.tasks.instructions import can_be_asked

ASKED = [get_task(name) for name in ("asr", "age", "gender+age-only", "chat-only")]
COUNTS = {"train": 240, "dev": 40, "test": 80}


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_intents_are_rows_of_text_spread_evenly_and_never_twice(tmp_path):
    written = write_intents(tmp_path, COUNTS, ASKED, seed=3)
    assert written.rows == COUNTS
    found = {part: rows(tmp_path / f"{part}.jsonl") for part in COUNTS}
    assert all(row.keys() == {"key", "prompt", "intent", "lang"} for part in found.values() for row in part)
    every = [row["prompt"] for part in found.values() for row in part]
    assert len(set(every)) == len(every)
    for part in found.values():
        assert len(set(Counter((row["intent"], row["lang"]) for row in part).values())) == 1
    assert written.shared < 0.15  # wordings of test are its own
    utterances = read_manifest(tmp_path / "test.jsonl").utterances
    assert len(utterances) == COUNTS["test"]
    intent = LISTED["intent"]
    for utterance in utterances:
        assert servable(utterance, dict.fromkeys(LISTED, 1)) == [intent]
        assert read(intent, write(intent, utterance, prefix=True)).intent == utterance.intent


def test_languages_and_tasks_are_as_even_as_the_count_allows(tmp_path):
    write_intents(tmp_path, {"train": 5, "dev": 1, "test": 10}, ASKED, 0)
    found = {part: rows(tmp_path / f"{part}.jsonl") for part in COUNTS}
    for key in ("lang", "intent"):
        counts = Counter(row[key] for row in found["test"])
        assert max(counts.values()) - min(counts.values()) <= (0 if key == "lang" else 2)
    assert sorted(Counter(row["lang"] for row in found["train"]).values()) == [2, 3]


def test_the_seed_decides_all(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_intents(tmp_path / name, COUNTS, ASKED, seed)
    a, b, c = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_more_rows_than_instructions_is_an_error_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr("osum_npu.data.intents.draw_instruction", lambda *_: "the same")
    with pytest.raises(ValueError, match="too few different instructions for 240 rows of train"):
        write_intents(tmp_path, COUNTS, ASKED, 0)


def test_every_listed_task_about_a_recording_can_be_asked_for():
    assert [task.name for task in LISTED.values() if not can_be_asked(task)] == ["chat_think", "text2text", "intent"]
    assert missing(LISTED["chat_think"], Utterance(key="k", wav="a", reply="b")) == "no thought"
