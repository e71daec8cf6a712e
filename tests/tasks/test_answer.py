"""Answers are read back as they were written, and nothing that a model may say raises."""

import json
import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from osum_npu.tasks import (
    CHAT_SEPARATOR,
    COMBINATIONS,
    TASKS,
    Utterance,
    Word,
    join_words,
    missing,
    normalize_text,
    read,
    split_words,
    write,
)

LABELLED = [task for task in TASKS.values() if task.labels]
EVERY = {**TASKS, **COMBINATIONS}

# Words as they stand in transcripts: letters, digits and inner punctuation, or Han characters.
ENGLISH = st.from_regex(r"[a-z0-9]+(['.-][a-z0-9]+)?", fullmatch=True)
HAN = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=1, max_size=4)
SENTENCES = st.lists(ENGLISH | HAN, min_size=1, max_size=6).map(" ".join).map(normalize_text)
CHAT = st.text(min_size=1).filter(lambda text: text.strip())


@st.composite
def utterances(draw):
    text = draw(SENTENCES)
    units = split_words(text)
    edges = sorted(draw(st.lists(st.floats(0, 30), min_size=2 * len(units), max_size=2 * len(units))))
    return Utterance(
        key="k",
        wav="k.wav",
        text=text,
        words=tuple(Word(unit, *edges[2 * i : 2 * i + 2]) for i, unit in enumerate(units)),
        labels={task.name: draw(st.sampled_from(task.labels)) for task in LABELLED},
        reply=draw(CHAT),
    )


@given(utterances(), st.sampled_from(list(EVERY.values())), st.sampled_from([0.02, 0.1]))
def test_what_is_written_is_read(utterance, task, resolution):
    answer = read(task, write(task, utterance, resolution))
    assert answer.fault is None
    assert answer.text == (utterance.text if task.transcript else None)
    assert answer.label == (utterance.labels[task.name] if task.labels else None)
    assert answer.labels == ({part.name: utterance.labels[part.name] for part in task.parts} or None)
    assert answer.reply == (normalize_text(utterance.reply).strip() if task.name == "chat" else None)
    if task.name != "timestamps":
        assert answer.words is None
        return
    assert [word.text for word in answer.words] == [word.text for word in utterance.words]
    for said, word in zip(answer.words, utterance.words, strict=True):
        assert abs(said.start - word.start) <= resolution / 2 + 1e-9
        assert abs(said.end - word.end) <= resolution / 2 + 1e-9
        for time in (said.start, said.end):
            assert math.isclose(time / resolution, round(time / resolution), abs_tol=1e-6)


@given(utterances(), st.sampled_from(LABELLED))
def test_a_label_needs_no_transcript(utterance, task):
    bare = Utterance(key="k", wav="k.wav", labels=utterance.labels)
    answer = read(task, write(task, bare))
    assert (answer.text, answer.label, answer.fault) == ("", utterance.labels[task.name], None)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("asr", "hello 你好"),
        ("timestamps", "<0.10>hello<0.46><0.52>你<0.70><0.70>好<0.98>"),
        ("event", "hello 你好<throat clearing>".replace(" 你", "你")),
        ("style", "hello你好<新闻科普>"),
        ("chat", "hello你好<开始回答>i am fine"),
        ("age+gender", "hello你好<adult><male>"),
        ("age+gender-only", "<adult><male>"),
        ("style+age+gender", "hello你好<新闻科普><adult><male>"),
        ("style+age+gender-only", "<新闻科普><adult><male>"),
    ],
)
def test_how_an_answer_looks(task, text):
    utterance = Utterance(
        key="k",
        wav="k.wav",
        text="Hello 你 好",
        words=(Word("hello", 0.104, 0.4551), Word("你", 0.52, 0.7), Word("好", 0.7, 0.98)),
        labels={"event": "throat clearing", "style": "新闻科普", "gender": "male", "age": "adult"},
        reply="i am fine",
    )
    assert write(EVERY[task], utterance) == normalize_text(text)


@pytest.mark.parametrize(
    ("task", "utterance", "lack"),
    [
        ("asr", {}, "no transcript"),
        ("timestamps", {"text": "a"}, "no word times"),
        ("chat", {"text": "a"}, "no reply"),
        ("chat", {"reply": "a"}, "no transcript"),
        ("gender", {"text": "a", "labels": {"age": "old"}}, "no gender label"),
        ("age+gender", {"text": "a", "labels": {"age": "old"}}, "no gender label"),
        ("style+age+gender-only", {"labels": {"age": "old"}}, "no style and no gender label"),
        ("age+gender", {"labels": {"age": "old", "gender": "male"}}, "no transcript"),
    ],
)
def test_what_an_utterance_lacks(task, utterance, lack):
    utterance = Utterance(key="u7", wav="k.wav", **utterance)
    assert missing(EVERY[task], utterance) == lack
    with pytest.raises(ValueError, match=re.escape(f"'u7' cannot be an example of task '{task}': {lack}")):
        write(EVERY[task], utterance)


# -- what a model says may be anything


MARKS = st.sampled_from(
    ["<", ">", "<>", "<1.2>", "<0.5>", "<male>", "<MALE>", "<Old>", " ", CHAT_SEPARATOR, "a", "你", "<９.５>"]
)
SAID = st.text() | st.lists(MARKS, max_size=12).map("".join) | st.from_regex(r"(<\d{1,400}(\.\d+)?>a?){1,4}")


@given(SAID, st.sampled_from(list(EVERY.values())))
@example(f"<1>a<{'9' * 400}>", TASKS["timestamps"])
def test_anything_is_read_without_raising(said, task):
    answer = read(task, said)
    normal = normalize_text(said).strip()
    if task.labels:
        assert (answer.label in task.labels) == (answer.fault is None)
    elif task.parts:
        assert (len(answer.labels) == len(task.parts)) == (answer.fault is None)
        assert all(answer.labels.get(part.name, part.labels[0]) in part.labels for part in task.parts)
        assert (answer.text is None) != task.transcript
    elif task.name == "chat":
        assert (answer.fault is None) == (CHAT_SEPARATOR in normal) == (answer.reply is not None)
    elif task.name == "asr":
        assert answer.fault is None
    else:
        starts = [word.start for word in answer.words]
        runs = starts == sorted(starts) and all(word.start <= word.end for word in answer.words)
        assert runs or answer.fault
        assert normal == "" or answer.words or answer.fault
        assert all(word.text for word in answer.words)
    json.dumps(answer.__dict__, allow_nan=False)  # what `infer` writes must be JSON to every reader


@pytest.mark.parametrize(
    ("task", "said", "fault"),
    [
        ("gender", "hello", "no label in 'hello'"),
        ("gender", "hello<mail>", "<mail> is no label of task 'gender': female, male"),
        ("gender", "hello<>", "<> is no label"),
        ("gender", "", "no label in ''"),
        ("age+gender", "hello", "no label in 'hello'"),
        ("age+gender", "hello<adult>", "no gender label in 'hello<adult>'"),
        ("age+gender", "hello<male>", "<male> is no label of task 'age': child, adult, old; no gender label"),
        ("age+gender-only", "<male><adult>", "'age': child, adult, old; <adult> is no label of task 'gender'"),
        ("chat", "hello", "no <开始回答> in 'hello'"),
        ("timestamps", "hello", "'hello' stands outside"),
        ("timestamps", "<0.1>hello<0.5>world", "'world' stands outside"),
        ("timestamps", "<0.1>hello", "stands outside"),
        ("timestamps", "<0.5>hello<0.1>", "times run backwards"),
        ("timestamps", "<0.5>hello<0.6><0.1>world<0.7>", "times run backwards"),
    ],
)
def test_a_fault_is_named(task, said, fault):
    answer = read(EVERY[task], said)
    assert fault in answer.fault
    assert answer.label is None
    if "hello" in said:
        assert "hello" in answer.text


def test_the_first_label_counts_in_any_case():
    assert read(TASKS["gender"], "a <MALE> <female>").label == "male"
    assert read(TASKS["event"], "a<Throat Clearing>").label == "throat clearing"
    assert read(TASKS["emotion"], "a<male><happy>").label is None
    assert read(COMBINATIONS["age+gender"], "a<ADULT> <Male><old>").labels == {"age": "adult", "gender": "male"}
    assert read(COMBINATIONS["age+gender"], "a<adult><happy>").labels == {"age": "adult"}


@given(SENTENCES)
def test_words_join_to_what_was_split(text):
    assert join_words(split_words(text)) == text
    assert not any(unit.isspace() or not unit for unit in split_words(text))
