"""Tags, codes, label sets, prompts and text rules are those of OSUM."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.tasks import HAN, TASKS, default_prompt, draw_prompt, get_task, normalize_text, prompts

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
VECTORS = json.loads(Path(__file__).with_name("process_text.json").read_text("utf-8"))["samples"]


def test_the_tasks_are_those_of_osum():
    assert {t.name: (t.code, t.tag, ", ".join(t.labels)) for t in TASKS.values()} == TABLE
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("name", TASKS)
def test_a_task_by_name_code_and_tag(name):
    task = TASKS[name]
    for word in (name, task.code, task.code.lower(), task.tag, task.tag.replace(" ", ""), task.tag.lower()):
        assert get_task(word) is task


@pytest.mark.parametrize("name", ["", "ASR ASR", "<ALIGN>", "sing", "<TRANSCRIBE> <AGE> <GENDER>"])
def test_an_unknown_task_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=f"no task {re.escape(repr(name))}; the tasks are asr, timestamps, .*chat"):
        get_task(name)


@pytest.mark.parametrize(("text", "written"), VECTORS)
def test_text_is_normalised_as_by_the_original(text, written):
    assert normalize_text(text) == written


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("<> 你A\t")))
def test_normalising_again_changes_nothing(text):
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert not re.search(rf"\s[{HAN}<>]|[{HAN}<>]\s", once)


# -- prompts


def test_every_task_is_asked_for_in_both_languages_and_in_words_of_its_own():
    assert list(prompts()) == list(TASKS)
    for wordings in prompts().values():
        chinese = [bool(re.search(f"[{HAN}]", wording)) for wording in wordings]
        assert any(chinese)
        assert not all(chinese)
        assert all(wording == wording.strip() and "<" not in wording for wording in wordings)
    everything = [wording.lower() for wordings in prompts().values() for wording in wordings]
    assert len(set(everything)) == len(everything)


def test_prompts_are_drawn_from_all_wordings_by_the_generator_alone():
    for task in TASKS.values():
        rng = random.Random(5)
        drawn = [draw_prompt(task, rng) for _ in range(200)]
        assert set(drawn) == set(prompts()[task.name])
        rng = random.Random(5)
        assert drawn == [draw_prompt(task, rng) for _ in range(200)]
        assert default_prompt(task) in prompts()[task.name]
