"""Answers that begin with the tags of their task, as OSUM-Pangu's do."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from osum_npu.tasks import (
    CHAT_SEPARATOR,
    LISTED,
    TASKS,
    Answer,
    Utterance,
    Word,
    combine,
    get_task,
    missing,
    normalize_text,
    read,
    read_prefixed,
    split_words,
    write,
)
from osum_npu.tasks.answer import marks
from osum_npu.tasks.task import PREFIXES

LABELLED = [task for task in TASKS.values() if task.labels]
COMBINED = st.builds(combine, st.lists(st.sampled_from(LABELLED), min_size=1, unique=True).map(tuple), st.booleans())
HEARD = st.sampled_from([task for task in LISTED.values() if task.hears]) | COMBINED
TEXT = st.from_regex(r"[A-Za-z0-9]+( [A-Za-z0-9]+)?|[你好天气]{1,4}", fullmatch=True)


@st.composite
def utterances(draw):
    text = draw(TEXT)
    units = split_words(text)
    words = tuple(Word(unit, i, i + 0.5) for i, unit in enumerate(units))
    labels = {task.name: draw(st.sampled_from(task.labels)) for task in LABELLED}
    return Utterance(key="k", wav="k.wav", text=text, words=words, labels=labels, reply=draw(TEXT), thought=draw(TEXT))


@given(utterances(), HEARD)
def test_what_is_written_is_read_by_its_prefix_alone(utterance, task):
    text = write(task, utterance, prefix=True)
    assert text.startswith(task.prefix)
    assert read(task, text).intent == task.name
    found, answer = read_prefixed(text)
    assert found is (task if task.name != "chat_think" else LISTED["chat-only"])  # their tags are the same
    answer = read(task, text)
    said = utterance.text.lower() if task.name == "asr" else utterance.text
    assert (answer.fault, answer.text) == (None, said if task.transcript else None)
    assert answer.label == (utterance.labels[task.name] if task.labels else None)
    assert answer.labels == ({part.name: utterance.labels[part.name] for part in task.parts} or None)
    assert answer.reply == (utterance.reply if task.kind != "text" else None)
    assert answer.thought == (utterance.thought if task.kind == "chat_think" else None)
    assert answer.words == (utterance.words if task.name == "timestamps" else None)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("asr", "<asr>hello你好"),
        ("timestamps", "<asr><align><0.10>Hello<0.46><0.52>你<0.70><0.70>好<0.98>"),
        ("event", "<asr><caption>Hello你好<THROAT CLEARING>"),
        ("style-only", "<style><新闻科普>"),
        ("age", "<asr><age>Hello你好<ADULT>"),
        ("gender+age", "<asr><gender><age>Hello你好<MALE><ADULT>"),
        ("age+style+gender-only", "<age><style><gender><ADULT><新闻科普><MALE>"),
        ("chat", "<asr><chat>Hello你好<开始回答>I am fine"),
        ("chat-only", "<chat>I am fine"),
        ("chat_think", "<chat><think>A greeting.\nFriendly.<think end>I am fine"),
    ],
)
def test_how_an_answer_looks(task, text):
    utterance = Utterance(
        key="k",
        wav="k.wav",
        text="Hello 你 好",
        words=(Word("Hello", 0.104, 0.4551), Word("你", 0.52, 0.7), Word("好", 0.7, 0.98)),
        labels={"event": "throat clearing", "style": "新闻科普", "gender": "male", "age": "adult"},
        reply="I am fine",
        thought="A greeting.\nFriendly.",
    )
    assert write(get_task(task), utterance, prefix=True) == text
    plain = write(get_task(task), utterance)
    assert not plain.startswith(get_task(task).prefix)
    assert plain == plain.lower() or get_task(task).kind != "text"


def test_a_written_instruction_is_answered_by_the_tags_of_its_task():
    intent = LISTED["intent"]
    for name, tags in (("age", "<asr><age>"), ("style+age+gender-only", "<style><age><gender>"), ("asr", "<asr>")):
        row = Utterance(key="k", wav="", prompt="how old?", intent=name)
        assert write(intent, row) == write(intent, row, prefix=True) == tags
        assert read(intent, f" {tags.upper()} ") == Answer(intent=name)
    assert read(intent, "<asr>hello") == Answer(intent="asr", fault="'hello' stands behind the tags")
    for said in ("", "age", "<adult>", "<align>", "<asr><asr>", "<asr><chat><age>"):
        answer = read(intent, said)
        assert answer.intent is None
        assert answer.fault.startswith("no tags of a task")


def test_a_written_question_is_answered_as_it_stands():
    row = Utterance(key="k", wav="", prompt="2+2?", reply="It is <b>Four</b>.")
    task = LISTED["text2text"]
    assert read(task, write(task, row, prefix=True)) == Answer(reply="It is <b>Four</b>.")


@pytest.mark.parametrize(
    ("task", "fields", "lack"),
    [
        ("age-only", {"wav": "", "labels": {"age": "old"}}, "no sound"),
        ("age", {"wav": "a", "text": "a", "labels": {"age": "old"}, "intent": "gender"}, "asks for gender"),
        ("chat-only", {"wav": "a"}, "no reply"),
        ("chat_think", {"wav": "a", "reply": "a"}, "no thought"),
        ("intent", {"wav": "a", "prompt": "a", "intent": "age"}, "about text alone"),
        ("intent", {"wav": "", "prompt": "a"}, "no intent"),
        ("intent", {"wav": "", "intent": "age"}, "no prompt"),
        ("text2text", {"wav": "", "prompt": "a"}, "no reply"),
        ("text2text", {"wav": "", "prompt": "a", "reply": "b", "intent": "age"}, "asks for age"),
    ],
)
def test_what_an_utterance_lacks(task, fields, lack):
    assert lack in missing(get_task(task), Utterance(key="k", **fields))


@pytest.mark.parametrize(
    ("task", "said", "label"),
    [
        ("age", "<asr><age>hi<YOUTH>", "adult"),
        ("age", "<asr><age>hi<MIDDLE_AGE>", "adult"),
        ("age-only", "<age><middle>", "adult"),
        ("emotion", "<asr><emotion>hi<ANGRY>", "anger"),
        ("emotion", "<asr><emotion>hi<ANGER>", "anger"),
        ("emotion", "hi<ANGRY>", None),  # no other names without a prefix, as in OSUM
    ],
)
def test_other_names_of_labels(task, said, label):
    answer = read(get_task(task), said)
    assert (answer.label or (answer.labels or {}).get("age")) == label
    assert (answer.fault is None) == (label is not None)


def test_the_wrong_tags_are_told_and_the_rest_is_read():
    answer = read(TASKS["age"], "<asr><gender>Hello<MALE>")
    assert (answer.intent, answer.text, answer.label) == ("gender", "Hello", None)
    assert answer.fault.startswith("its tags <asr><gender> are not those of task 'age': <asr><age>; <MALE> is no label")
    assert read_prefixed("<asr><gender>Hello<MALE>") == (
        TASKS["gender"], Answer(text="Hello", label="male", intent="gender"),
    )  # fmt: skip
    assert read_prefixed("Hello<MALE>") == (
        None, Answer(text="Hello", fault="no tags of a task at the beginning of 'Hello<MALE>'"),
    )  # fmt: skip
    assert read(TASKS["asr"], "<asr><asr>a").intent is None


@given(utterances(), HEARD, st.booleans())
def test_all_marks_of_an_answer_are_listed(utterance, task, prefix):
    known = {*marks(prefix=prefix), *marks()[-1:]}
    found = re.findall(r"<[^<>\d][^<>]*>", write(task, utterance, prefix=prefix))
    assert set(found) <= known | ({"<think>", "<think end>"} if task.kind == "chat_think" else set())


PIECES = st.sampled_from(
    [f"<{prefix}>" for prefix in PREFIXES.values()]
    + ["<ASR>", "< age >", "<a\u017fr>", "<adult>", "<MIDDLE>", "<think>", "<think end>", "<1.5>", CHAT_SEPARATOR]
    + ["a", "你", "<", ">", "<>", " ", "\0", "<|im_end|>", "[unused10]", "\u0130"]
)
SAID = st.text() | st.lists(PIECES, max_size=12).map("".join)


@given(SAID, st.sampled_from(list(LISTED.values())) | COMBINED)
@example("<asr><asr>", TASKS["asr"])
@example("<a\u017fr>", LISTED["intent"])
def test_anything_is_read_without_raising(said, task):
    found, answer = read_prefixed(said)
    assert (found is None) == (answer.intent is None)
    assert found is not None or answer.fault
    assert found is None or normalize_text(said).strip().startswith(found.prefix)
    answer = read(task, said)
    assert answer.intent is None or LISTED.get(answer.intent) or get_task(answer.intent)
    if answer.intent not in (None, task.name) and task.kind != "intent":
        assert answer.fault
