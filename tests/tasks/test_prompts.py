"""Instructions: the project's own, those of a file, and which one is asked."""

import random
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.tasks import (
    HAN,
    LISTED,
    TASKS,
    Utterance,
    combine,
    draw_prompt,
    first_prompt,
    get_task,
    prompt_fault,
    prompts,
    read_prompts,
    wordings_of,
)
from osum_npu.tasks.prompts import PROMPT_CHARACTERS

EVERY = list(LISTED.values())
PLAIN = Utterance(key="k", wav="k.wav")


def written(tmp_path, content):
    path = tmp_path / "prompts.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_task_is_asked_for_in_both_languages_and_in_words_of_its_own():
    assert list(prompts()) == [task.name for task in EVERY]
    for wordings in prompts().values():
        chinese = [bool(re.search(f"[{HAN}]", wording)) for wording in wordings]
        assert any(chinese)
        assert not all(chinese)
        assert all(wording == wording.strip() and "<" not in wording for wording in wordings)
    everything = [wording.lower() for wordings in prompts().values() for wording in wordings]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_training_draws_from_all_wordings_by_the_generator_alone_and_inference_takes_the_first(task):
    rng = random.Random(5)
    drawn = [draw_prompt(PLAIN, task, prompts(), rng) for _ in range(200)]
    assert {wording.rstrip(":") for wording in drawn} == set(prompts()[task.name])
    rng = random.Random(5)
    assert drawn == [draw_prompt(PLAIN, task, prompts(), rng) for _ in range(200)]
    assert first_prompt(PLAIN, task, prompts()) == prompts()[task.name][0]


def test_the_instruction_of_a_row_goes_before_and_no_prompt_is_none_at_all():
    asr, rng = TASKS["asr"], random.Random(0)
    for own, asked in (("what is it?", "what is it?"), ("<no_prompt>", "")):
        row = Utterance(key="k", wav="k.wav", prompt=own)
        assert first_prompt(row, asr, prompts()) == draw_prompt(row, asr, prompts(), rng) == asked
    none = {"asr": ("<no_prompt>",)}
    assert first_prompt(PLAIN, asr, none) == draw_prompt(PLAIN, asr, none, rng) == ""


def test_a_file_replaces_the_wordings_of_its_tags_and_names_the_tags_of_no_task(tmp_path):
    told = {
        "<TRANSCRIBE>": ["听写。", "写下来。"],
        "<TRANSCRIBE><GENDER>": ["听写，并标出性别。"],
        "<AGE> <GENDER>": ["年龄和性别？"],
        "<TRANSCRIBE> <STYLE> <AGE> <GENDER>": ["<no_prompt>"],
        "<S2S>": ["聊天。"],
        "<TRANSCRIBE> <LANGUAGE>": ["a"],
    }
    path = written(tmp_path, yaml.safe_dump(told, allow_unicode=True))
    wordings, ignored = read_prompts(path)
    assert ignored == f"{path}: ignored, as of no task here: <S2S>, <TRANSCRIBE> <LANGUAGE>"
    replaced = {get_task(tag).name: tuple(said) for tag, said in list(told.items())[:4]}
    assert replaced.keys() == {"asr", "gender", "age+gender-only", "style+age+gender"}
    assert wordings == {**prompts(), **replaced}
    assert read_prompts(None) == (prompts(), "")
    assert read_prompts(written(tmp_path, "<TRANSCRIBE>: [a]"))[1] == ""


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "wanted tags, each with a list of sentences"),
        ("- a\n- b", "wanted tags, each with a list of sentences"),
        ("<TRANSCRIBE>: say it", "wanted a list of sentences for each tag, got <TRANSCRIBE>: 'say it'"),
        ("<TRANSCRIBE>: []", "got <TRANSCRIBE>: []"),
        ("<TRANSCRIBE>: [a, ' ']", "got <TRANSCRIBE>: ['a', ' ']"),
        ("<TRANSCRIBE>: [a, 3]\n<ALIGN>: {a: b}", "got <TRANSCRIBE>: ['a', 3]; <ALIGN>: {'a': 'b'}"),
        ("3: [a]", "got 3: ['a']"),
        ("<TRANSCRIBE>: [a\nb: [", "no YAML in UTF-8: while parsing a flow sequence"),
        (b"<TRANSCRIBE>: [\xff\xff]", "no YAML in UTF-8"),
    ],
)
def test_a_file_of_another_form_is_one_error_with_its_name(content, fault, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_prompts(path)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "gone.yaml", tmp_path):
        with pytest.raises(ValueError, match="the prompts cannot be read: ") as caught:
            read_prompts(path)
        assert str(path) in str(caught.value)


LABELLED = [task for task in TASKS.values() if task.labels]


@given(st.lists(st.sampled_from(LABELLED), min_size=2, unique=True), st.booleans())
def test_every_combination_is_asked_for_in_words_that_name_its_labels_in_order(parts, transcript):
    task = combine(tuple(parts), transcript)
    wordings = wordings_of(task, prompts())
    assert wordings == wordings_of(task, {})
    assert first_prompt(PLAIN, task, prompts()) == wordings[0]
    assert len(set(wordings)) == len(wordings) == 5
    for wording in wordings:
        words = NAMES["zh" if re.search(f"[{HAN}]", wording) else "en"]
        places = [wording.index(words[part.name]) for part in parts]
        assert places == sorted(places)
        assert sum(word in wording for word in words.values()) == len(parts)
    assert wordings_of(task, {task.name: ("a",)}) == ("a",)


NAMES = {
    "zh": {"event": "声音事件", "emotion": "情感", "style": "说话风格", "gender": "性别", "age": "年龄段"},
    "en": {"event": "sound event", "emotion": "emotion", "style": "style", "gender": "gender", "age": "age group"},
}


def test_the_wishes_of_an_intent_row_stand_behind_a_question_about_them():
    row = Utterance(key="k", wav="", prompt="how old?", intent="age-only")
    intent, rng = LISTED["intent"], random.Random(0)
    assert first_prompt(row, intent, prompts()) == f"{prompts()['intent'][0]}:how old?"
    assert draw_prompt(row, intent, prompts(), rng).endswith(":how old?")
    assert first_prompt(row, intent, {"intent": ("<no_prompt>",)}) == "how old?"


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u3000"])
def test_a_blank_instruction_is_the_task_s_own_wording(blank):
    row = Utterance(key="k", wav="k.wav", prompt=blank)
    for task in EVERY[:8]:
        assert first_prompt(row, task, prompts()) == prompts()[task.name][0]


def test_an_instruction_has_a_longest_length_that_is_told():
    assert prompt_fault(None) == prompt_fault("a" * PROMPT_CHARACTERS) == ""
    fault = prompt_fault("字" * 10000)
    assert "10000 characters" in fault
    assert str(PROMPT_CHARACTERS) in fault
