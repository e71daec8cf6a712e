import json
import random

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.evaluation.metrics import NONE, headline, score
from osum_npu.tasks import COMBINATIONS, LISTED, TASKS, Answer, Utterance, Word, read, write

TIMES = (Word("hello", 0.1, 0.5), Word("world", 0.6, 1.0))


def utterance(key="u", **fields):
    return Utterance(key=key, wav=f"{key}.wav", **{"text": "hello world", "lang": "en", "duration": 1.5} | fields)


def full(task, key="u"):
    labels = {choice.name: choice.labels[0] for choice in task.choices}
    return utterance(key, words=TIMES, reply="a small model", thought="hm", labels=labels)


def rounded(scores):
    """As it comes back from a JSON file, less the last digits, where the order of a sum shows."""
    return json.loads(json.dumps(scores, allow_nan=False), parse_float=lambda digits: round(float(digits), 9))


@pytest.mark.parametrize("task", [t for t in LISTED.values() if t.hears], ids=lambda t: t.name)
class TestEveryTask:
    def test_true_answers_score_perfectly(self, task):
        scores = score(task, [(full(task), read(task, write(task, full(task))))] * 3)
        assert (scores["n"], scores["failed"], scores["unreadable"], scores["unlabelled"]) == (3, 0, 0, 0)
        assert (scores["wer"], scores["seconds"]) == (0 if task.transcript else None, 4.5)
        perfect = {"wer": 0, "cer": None, "aas_ms": 0}
        assert all(scores[metric.key] == perfect.get(metric.key, 1) for metric in headline(task))

    def test_no_answer_is_an_error(self, task):
        scores = score(task, [(full(task), None), (full(task), read(task, write(task, full(task))))])
        assert (scores["n"], scores["failed"]) == (2, 1)
        assert scores["wer"] == (0.5 if task.transcript else None)
        assert scores["wer_counts"]["deletions"] == (2 if task.transcript else 0)
        worst = {"cer": None, "aas_ms": 0}
        assert all(scores[metric.key] == worst.get(metric.key, 0.5) for metric in headline(task))

    def test_nothing_to_score(self, task):
        scores = score(task, [])
        assert scores["n"] == 0
        assert all(scores[f"{metric.key}{end}"] is None for metric in headline(task) for end in ("", "_interval"))

    def test_an_utterance_without_the_label_is_left_out(self, task):
        scores = score(task, [(Utterance(key="u", wav="u.wav"), read(task, "hello<male>"))])
        assert (scores["n"], scores["unlabelled"]) == (0, 1)

    def test_the_order_changes_nothing(self, task):
        rng = random.Random(0)
        said = ["hello<male>", "hello world", "<happy>", write(task, full(task)), "<0.1>hello<0.7>"]
        pairs = [(full(task, f"u{i}"), read(task, rng.choice(said))) for i in range(20)]
        before = rounded(score(task, pairs))
        rng.shuffle(pairs)
        assert rounded(score(task, pairs)) == before


# No number words: the English normaliser writes a run of them as one number.
SENTENCE = st.lists(st.sampled_from(["small", "model", "today", "hears"]), min_size=1, max_size=6).map(" ".join)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=6))
def test_word_error_rate_is_that_of_jiwer(sentences):
    pairs = [(utterance(text=text), Answer(text=said)) for text, said in sentences]
    scores = score(TASKS["asr"], pairs)
    assert scores["wer"] == pytest.approx(jiwer.wer(*([*side] for side in zip(*sentences, strict=True))))
    assert scores["wer_counts"]["reference"] == sum(len(text.split()) for text, _ in sentences)


def test_languages_are_rated_apart():
    pairs = [
        (utterance(text="Hello, world"), Answer(text="hello word")),
        (utterance(text="今天天气", lang="zh"), Answer(text="今天，天汽。")),
        (utterance(text="明天见", lang=None), Answer(text="明天见")),
        (utterance(text="guten tag", lang="de"), Answer(text="guten tag")),
    ]
    scores = score(TASKS["asr"], pairs)
    assert (scores["wer"], scores["wer_counts"]["utterances"]) == (1 / 4, 2)
    assert (scores["cer"], scores["cer_counts"]["utterances"]) == (1 / 7, 2)
    # "HELLO," keeps its comma there.
    assert scores["release_wer"] == 3 / 11


def test_confusions_and_classes():
    emotion = TASKS["emotion"]
    said = ["happy", "happy", "sad", "angry", None]
    answers = [None if label is None else read(emotion, f"hi<{label}>") for label in said]
    pairs = [(utterance(labels={"emotion": "happy"}), answer) for answer in answers]
    pairs.append((utterance(labels={"emotion": "Sad"}), read(emotion, "hi<sad>")))
    scores = score(emotion, pairs)
    labels, matrix = scores["confusion"]["labels"], scores["confusion"]["matrix"]
    assert labels == list(emotion.labels)
    assert all(len(row) == len(labels) + 1 for row in matrix)
    happy = dict(zip([*labels, NONE], matrix[labels.index("happy")], strict=True))
    assert {label: n for label, n in happy.items() if n} == {"happy": 2, "sad": 1, NONE: 2}
    assert (scores["accuracy"], scores["unreadable"], scores["failed"], scores["unlabelled"]) == (2 / 5, 1, 1, 1)
    assert scores["classes"]["happy"] == {"n": 5, "accuracy": 2 / 5}
    assert scores["classes"]["sad"] == {"n": 0, "accuracy": None}


@pytest.mark.parametrize("name", ["age+gender", "age+gender-only"])
def test_a_combination_is_right_if_all_its_labels_are(name):
    task = COMBINATIONS[name]
    said = ["<adult><male>", "<adult><female>", "<male><adult>", "<adult>", "", "<ADULT> <Male>"]
    truth = utterance(labels={"age": "adult", "gender": "male"})
    pairs = [(truth, read(task, f"hello world{marks}")) for marks in said] + [(truth, None)]
    scores = score(task, pairs)
    assert (scores["n"], scores["failed"], scores["unreadable"]) == (7, 1, 3)
    assert (scores["accuracy"], scores["age_accuracy"], scores["gender_accuracy"]) == (2 / 7, 4 / 7, 2 / 7)
    low, high = scores["gender_accuracy_interval"]
    assert low < 2 / 7 < high
    assert scores["age_confusion"]["labels"] == ["child", "adult", "old"]
    assert scores["age_confusion"]["matrix"][1] == [0, 4, 0, 3]
    assert scores["gender_confusion"]["matrix"][1] == [1, 2, 4]
    assert scores["gender_classes"]["male"] == {"n": 7, "accuracy": 2 / 7}
    assert scores["wer"] == (1 / 7 if task.transcript else None)


def test_labels_without_transcripts_have_no_error_rate():
    gender = TASKS["gender"]
    scores = score(gender, [(utterance(text=None, labels={"gender": "male"}), read(gender, "<male>"))])
    assert (scores["accuracy"], scores["wer"], scores["cer"]) == (1, None, None)


def test_timestamps_average_over_the_words_that_match():
    task = TASKS["timestamps"]
    pairs = [(utterance(words=TIMES), read(task, "<0.14>hello<0.50><0.60>word<1.00>"))]
    scores = score(task, pairs)
    assert scores["aas_ms"] == pytest.approx(20)
    assert (scores["matched"], scores["wer"]) == (0.5, 0.5)


def test_replies_are_compared_without_case_and_punctuation():
    chat = TASKS["chat"]
    asked = utterance(text="who are you", reply="a small model")
    replies = ["A small model.", "a large model", ""]
    scores = score(chat, [(asked, read(chat, f"who are you<开始回答>{reply}")) for reply in replies])
    assert scores["answer_accuracy"] == 1 / 3
    assert scores["wer"] == 0
    assert score(chat, [(asked, read(chat, "a small model"))])["unreadable"] == 1


def test_unknown_durations_are_not_taken_for_nothing():
    pairs = [(utterance(duration=None), None), (utterance(), None)]
    assert score(TASKS["asr"], pairs)["seconds"] is None
