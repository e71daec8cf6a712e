"""Tags, codes, label sets and text rules are those of OSUM."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.tasks import COMBINATIONS, HAN, TASKS, get_task, normalize_text

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


@pytest.mark.parametrize("task", [*TASKS.values(), *COMBINATIONS.values()], ids=lambda task: task.name)
def test_a_task_by_name_code_and_tag(task):
    for word in (task.name, task.code, task.code.lower(), task.tag, task.tag.replace(" ", ""), task.tag.lower()):
        assert get_task(word) is task


@pytest.mark.parametrize("name", ["", "ASR ASR", "<ALIGN>", "sing", "<TRANSCRIBE> <GENDER> <AGE>", "age+gender-"])
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
