"""Instruction following and what wording changes, against counts made by hand and an independent bootstrap."""

import json
import random
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.evaluation.confidence import bootstrap_difference, bootstrap_interval, wilson_interval
from osum_npu.evaluation.figures import rate_bars
from osum_npu.evaluation.following import compare, following, measure, read_following
from osum_npu.evaluation.metrics import headline, score
from osum_npu.evaluation.report import format_instructions, write_report
from osum_npu.tasks import LISTED, TASKS, Utterance, Word, get_task, read, write
from osum_npu.tasks.form import get_form

OSUM, PANGU = get_form("osum"), get_form("osum_pangu")
WORDS = (Word("hello", 0.1, 0.5), Word("world", 0.6, 1.0))


def utterance(task, i=0):
    labels = {choice.name: choice.labels[i % 2] for choice in task.choices}
    text = {"text": "hello world", "words": WORDS, "labels": labels, "thought": "hm"} if task.hears else {}
    asked = {} if task.hears else {"prompt": "what?"}
    wanted = {"intent": "age"} if task.kind == "intent" else {"reply": "a small model"}
    return Utterance(key=f"u{i}", wav="a.wav" if task.hears else None, lang="en", **text, **asked, **wanted)


def answered(name, *texts):
    task = get_task(name)
    return [(utterance(task), None if text is None else read(task, text)) for text in texts]


def test_an_instruction_is_followed_if_the_answer_has_the_tags_of_its_task():
    found = following(
        {
            "age": answered("age", "<asr><age>hi<OLD>", "<asr><age>hi", "<asr>hi", "hi<OLD>", None),
            "gender+age-only": answered("gender+age-only", "<gender><age><MALE><OLD>", "<age><gender><OLD><MALE>"),
            "chat_think": answered("chat_think", "<chat><think>a<think end>b"),
            "intent": answered("intent", "<asr>"),
            "asr": [],
        }
    )
    counts = {name: (rate["followed"], rate["n"], rate["rate"]) for name, rate in found["tasks"].items()}
    assert counts == {"age": (2, 5, 0.4), "gender+age-only": (1, 2, 0.5), "chat_think": (1, 1, 1.0)}
    assert (found["all"]["followed"], found["all"]["n"], found["all"]["rate"]) == (4, 8, 0.5)
    assert found["all"]["interval"] == wilson_interval(4, 8)
    assert following({})["all"] == {"n": 0, "followed": 0, "rate": None, "interval": None}


@pytest.mark.parametrize("task", [*LISTED.values(), get_task("emotion+age")], ids=lambda task: task.name)
def test_both_sides_of_a_comparison_are_the_scores(task):
    """What is compared is what the task table shows, metric by metric."""
    rng = random.Random(task.name)
    truth = [utterance(task, i) for i in range(30)]
    said = [
        "<asr><age>hello word<OLD>",
        "hello world<male>",
        "",
        "<0.2>hello<0.7><0.7>world<1.5>",
        "it is a small model",
    ]
    sides = []
    for _ in range(2):
        texts = [rng.choice([write(task, u, prefix=rng.random() < 0.5), rng.choice(said)]) for u in truth]
        sides.append([(u, read(task, text) if rng.random() < 0.9 else None) for u, text in zip(truth, texts)])
    scores = [score(task, side) for side in sides]
    found = compare(task, *sides) if task.kind != "intent" else {}
    for metric in headline(task) if task.kind != "intent" else ():
        values = [s[metric.key] for s in scores]
        if None in values:
            assert metric.key not in found
            continue
        assert [found[metric.key][w] for w in ("fixed", "natural")] == pytest.approx(values)
        assert found[metric.key]["difference"] == pytest.approx(values[1] - values[0])
        low, high = found[metric.key]["interval"]
        assert low <= found[metric.key]["difference"] <= high
    assert found or task.kind == "intent"


def test_the_paired_interval_is_that_of_drawing_utterances():
    rng = np.random.default_rng(0)
    n = rng.integers(1, 20, 200)
    one = rng.binomial(n, 0.3)
    other = np.clip(one + rng.integers(-1, 3, 200), 0, None)
    difference, (low, high) = bootstrap_difference([*zip(one, n)], [*zip(other, n)])
    assert difference == pytest.approx(other.sum() / n.sum() - one.sum() / n.sum())
    draws = rng.integers(0, 200, (4000, 200))
    plain = (other[draws].sum(1) - one[draws].sum(1)) / n[draws].sum(1)
    assert (low, high) == pytest.approx(tuple(np.percentile(plain, [2.5, 97.5])), abs=0.004)
    # Paired, it is narrower than the two intervals apart.
    assert high - low < sum(np.ptp(bootstrap_interval(side, n)) for side in (one, other)) / 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_no_difference_from_oneself(tallies):
    found = bootstrap_difference(tallies, tallies)
    assert found is None if not sum(d for _, d in tallies) else found == (0, [0, 0])


def test_a_comparison_wants_the_same_utterances():
    with pytest.raises(ValueError, match="the same utterances, got 1 and 0"):
        bootstrap_difference([(1, 1)], [])


def test_the_report_shows_tables_and_bars_by_stage(tmp_path):
    good, bad = "<asr><age>hi<CHILD>", "<asr>hi"
    age = {w: {"age": answered("age", *texts)} for w, texts in (("fixed", [good] * 4), ("natural", [good, bad] * 2))}
    found = measure(age, PANGU)
    assert measure(age, OSUM).keys() == {"differences"}
    assert measure({"fixed": {}}, OSUM) == {}
    nothing = {"scores": {}, "examples": [], "curves": [], "facts": {}, "skipped": []}
    write_report(tmp_path / "1", title="t", **nothing, instructions=measure({"fixed": age["natural"]}, PANGU))
    earlier = {"stage <2>": read_following(tmp_path / "1/report.json")}
    page = write_report(tmp_path / "2", title="t", **nothing, instructions=found, earlier=earlier).read_text("utf-8")
    assert json.loads((tmp_path / "2/report.json").read_text("utf-8"))["instructions"] == found
    for text in ("Instructions followed, by stage", "natural − fixed", "this model", "stage &lt;2&gt;", "50.00 %"):
        assert text in page
    told = format_instructions(found)
    assert told.splitlines()[0].split()[:3] == ["instructions", "followed", "n"]
    assert any(line.split()[:4] == ["age", "4", "100.00", "%"] for line in told.splitlines())
    assert any(line.split()[:6] == ["age", "accuracy", "↑", "100.00", "50.00", "-50.00"] for line in told.splitlines())
    assert format_instructions({}) == ""


def test_only_instructions_that_are_shown_can_be_followed():
    age = {"age": answered("age", "<asr><age>hi<CHILD>", None)}
    others = {name: answered(name, f"<asr><{name}>hi") for name in ("gender", "chat")}
    found = measure({"fixed": {**age, **others}, "natural": age}, PANGU)["following"]
    assert PANGU.prompt & {"text", "chat"} == {"text"}
    assert {wording: rates["tasks"].keys() for wording, rates in found.items()} == {
        "fixed": {"age", "gender"},
        "natural": {"age"},
    }
    table = [re.split(r"\s{2,}", line) for line in format_instructions({"following": found}).splitlines()]
    assert [(line[0], *line[1:3], *line[4:6]) for line in table if line[0] in ("age", "all")] == [
        ("age", "2", "50.00 %", "2", "50.00 %"),
        ("all", "3", "66.67 %", "2", "50.00 %"),
    ]


def test_bars_are_drawn_for_what_there_is():
    rates = {
        "a": {"fixed": {"rate": 0.5, "interval": [0.2, 0.8]}, "natural": {"rate": None, "interval": None}},
        "b": {},
    }
    ElementTree.fromstring(rate_bars(rates))
    assert rate_bars(rates) == rate_bars(rates)
    assert "nan" not in rate_bars(rates)
    ElementTree.fromstring(rate_bars({"a": {}}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"instructions": {}}', '{"instructions": {"following": 1}}'])
def test_a_report_without_instructions_is_an_error_in_words(content, tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(ValueError, match=r"report\.json: the report of a stage cannot be read"):
        read_following(path)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"report\.json: this report tells nothing about instructions"):
        read_following(path)


def test_replies_are_compared_by_what_they_contain():
    task = TASKS["chat"]
    replies = ["A small model.", "It is a small model, I think", "a very small model", "model", ""]
    scores = score(task, answered("chat", *(f"<asr><chat>who<开始回答>{reply}" for reply in replies)))
    assert (scores["answer_accuracy"], scores["answer_contained"]) == (1 / 5, 2 / 5)
    low, high = scores["answer_contained_interval"]
    assert low < 2 / 5 < high
    zh = Utterance(key="k", wav=None, prompt="几个？", reply="三个")
    text2text = LISTED["text2text"]
    assert score(text2text, [(zh, read(text2text, "一共三个。"))])["answer_contained"] == 1


def test_intents_are_right_if_the_tags_are_and_nothing_else_is_said():
    scores = score(
        LISTED["intent"], answered("intent", "<asr><age>", "<ASR> <AGE>", "<asr>", "<asr><age>hi", "age", None)
    )
    assert (scores["intent_accuracy"], scores["n"], scores["unreadable"], scores["failed"]) == (2 / 6, 6, 2, 1)
