"""Tags, codes, label sets and text rules are those of OSUM."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.tasks import COMBINATIONS, DIALOGUES, HAN, LISTED, TASKS, combine, get_task, normalize_text

# OSUM's own table (ASLP-lab/OSUM, OSUM/README.md): code, tags, labels.
TABLE = {
    "asr": ("ASR", "<TRANSCRIBE>", ""),
    "timestamps": ("SRWT", "<TRANSCRIBE> <ALIGN>", ""),
    "event": ("VED", "<TRANSCRIBE> <CAPTION>", "laugh, cough, cry, screaming, sigh, throat clearing, sneeze, other"),
    "emotion": ("SER", "<TRANSCRIBE> <EMOTION>", "sad, anger, neutral, happy, surprise, fear, disgust, other"),
    "style": (
        "SSR",
        "<TRANSCRIBE> <STYLE>",
        "新闻科普, 恐怖故事, 童话故事, 客服, 诗歌散文, 有声书, 日常口语, 其他",
    ),
    "gender": ("SGC", "<TRANSCRIBE> <GENDER>", "female, male"),
    "age": ("SAP", "<TRANSCRIBE> <AGE>", "child, adult, old"),
    "chat": ("STTC", "<TRANSCRIBE> <S2TCHAT>", ""),
}
# One label alone is OSUM-Pangu's, the four others are OSUM's (ASLP-lab, their prompt configurations): tags, labels in
# the order of the answer.
COMBINED = {
    "event-only": ("<CAPTION>", "event"),
    "emotion-only": ("<EMOTION>", "emotion"),
    "style-only": ("<STYLE>", "style"),
    "gender-only": ("<GENDER>", "gender"),
    "age-only": ("<AGE>", "age"),
    "age+gender": ("<TRANSCRIBE> <AGE> <GENDER>", "age, gender"),
    "age+gender-only": ("<AGE> <GENDER>", "age, gender"),
    "style+age+gender": ("<TRANSCRIBE> <STYLE> <AGE> <GENDER>", "style, age, gender"),
    "style+age+gender-only": ("<STYLE> <AGE> <GENDER>", "style, age, gender"),
}
# OSUM-Pangu's prefixes by tag, and its output types (ASLP-lab/OSUM-Pangu, its data pipeline).
PREFIXES = {
    "TRANSCRIBE": "asr",
    "ALIGN": "align",
    "S2TCHAT": "chat",
    "EMOTION": "emotion",
    "STYLE": "style",
    "CAPTION": "caption",
    "AGE": "age",
    "GENDER": "gender",
}
DIALOGUE = {
    "chat-only": ("<S2TCHAT>", "chat", "<chat>"),
    "chat_think": ("<S2TCHAT> <THINKER>", "chat_think", "<chat>"),
    "text2text": ("<TEXT2TEXT>", "text2text", ""),
    "intent": ("<INTENT_CLASSIFICATION>", "intent", ""),
}
LABELLED = [task for task in TASKS.values() if task.labels]
GOLDEN = Path(__file__).parents[1] / "golden/osum_pangu.json"


def test_the_tasks_are_those_of_osum():
    assert {t.name: (t.code, t.tag, ", ".join(t.labels)) for t in TASKS.values()} == TABLE
    assert all(name == task.name for name, task in TASKS.items())


def test_the_combinations_are_those_of_osum():
    assert {t.name: (t.tag, ", ".join(part.name for part in t.parts)) for t in COMBINATIONS.values()} == COMBINED
    for name, task in COMBINATIONS.items():
        assert name == task.name
        assert task.transcript == ("<TRANSCRIBE>" in task.tag)
        assert task.choices == task.parts
        assert all(TASKS[part.name] is part for part in task.parts)
        assert "".join(task.tag.split()[task.transcript :]) == "".join(part.tag.split()[1] for part in task.parts)
    assert [task.choices for task in TASKS.values()] == [(task,) if task.labels else () for task in TASKS.values()]


def test_the_dialogues_are_those_of_osum_pangu():
    assert {t.name: (t.tag, t.kind, t.prefix) for t in DIALOGUES.values()} == DIALOGUE
    assert [t.name for t in LISTED.values() if not t.hears] == ["text2text", "intent"]
    assert {t.name for t in LISTED.values() if not t.transcript} >= set(DIALOGUE)


@given(st.lists(st.sampled_from(LABELLED), min_size=1, unique=True), st.booleans())
def test_labels_combine_in_any_order_to_one_task(parts, transcript):
    task = combine(tuple(parts), transcript)
    assert (task.choices, task.transcript, task.kind) == (tuple(parts), transcript, "text")
    only = "" if transcript else "-only"
    names, codes = ("+".join(words) + only for words in ([p.name for p in parts], [p.code for p in parts]))
    tags = ["<TRANSCRIBE>"] * transcript + [part.tag.split()[1] for part in parts]
    for word in (names, names.upper(), codes, codes.lower(), "".join(tags), " ".join(tags).lower()):
        assert get_task(word) is task
    assert (task.name, task.tag) == (names, " ".join(tags))
    assert task.prefix == "".join(f"<{PREFIXES[tag.strip('<>')]}>" for tag in tags)


@pytest.mark.parametrize("task", LISTED.values(), ids=lambda task: task.name)
def test_a_task_by_name_code_and_tag(task):
    for word in (task.name, task.code, task.code.lower(), task.tag, task.tag.replace(" ", ""), task.tag.lower()):
        assert get_task(word) is task


@pytest.mark.parametrize("name", [
        "", "ASR ASR", "<ALIGN>", "sing", "age+gender-", "age+age", "age+asr", "+", "-only", "age-only-only", "<>",
        "<TRANSCRIBE> <ALIGN> <AGE>", "<AGE> <TRANSCRIBE>", "<AGE>gender", "<AGE", "<",
    ])  # fmt: skip
def test_an_unknown_task_lists_the_known_ones(name):
    with pytest.raises(
        ValueError, match=f"no task {re.escape(repr(name))}; the tasks are asr, timestamps, .*chat, event-only"
    ):
        get_task(name)


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("<> 你A\t")))
def test_normalising_again_changes_nothing(text):
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert not re.search(rf"\s[{HAN}<>]|[{HAN}<>]\s", once)


def test_case_is_kept_but_in_pure_transcripts_as_osum_pangu_does():
    for text, tags, written in json.loads(GOLDEN.read_text("utf-8"))["non_model"]["process_text2"]:
        assert normalize_text(text, lower=tags == "<TRANSCRIBE>") == written
