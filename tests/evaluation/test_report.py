import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from osum_npu.evaluation.difference import differences
from osum_npu.evaluation.figures import POINTS, learning_curves, spectrogram
from osum_npu.evaluation.metrics import score
from osum_npu.evaluation.report import Example, format_table, write_report
from osum_npu.tasks import COMBINATIONS, TASKS, Utterance, Word, read

NOTHING = {"scores": {}, "examples": [], "curves": [], "facts": {}, "skipped": []}


class Page(HTMLParser):
    """Elements, visible text and the words of each ``<mark>``; fails on tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.marked, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "mark" in self.open:
            self.marked.append(data)


def log(steps=60):
    return [
        {"stage": "align" if i < 20 else "tune", "step": 10 * i, "loss": math.exp(-i / 20), "learning_rate": 1e-4}
        | ({"ctc_loss": 3.0} if i < 20 else {})
        for i in range(steps)
    ]


def style_scores():
    style = TASKS["style"]
    truth = Utterance(key="u", wav="u.wav", text="你好", lang="zh", labels={"style": "客服"})
    return {"style": score(style, [(truth, read(style, f"你好<{said}>")) for said in ("客服", "客服", "其他", "?")])}


def example(**fields):
    rng = np.random.default_rng(0)
    defaults = {"key": "k1", "task": "asr", "wav": "a/b.wav", "reference": "hello world", "hypothesis": "hello word"}
    return Example(**defaults | {"mel": rng.random((130, 80), dtype=np.float32)} | fields)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    path = write_report(
        tmp_path / "new" / "report",
        title="A & B",
        scores=style_scores(),
        examples=[example()],
        curves=log(),
        facts={"model": "runs/a"},
        skipped=["broken.wav: no sound file"],
    )
    page = Page(path.read_text("utf-8"))
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    for words in ("A & B", "runs/a", "broken.wav: no sound file", "50.00 %", "客服", "CTC loss", "align", "tune"):
        assert words in page.text
    assert page.tags.count("svg") == 3
    assert page.marked == ["world", "word"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]


def test_json_holds_the_scores(tmp_path):
    scores = style_scores()
    write_report(tmp_path, title="t", **NOTHING | {"scores": scores, "facts": {"a": "b"}, "skipped": ["c"]})
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == {
        "tasks": scores, "facts": {"a": "b"}, "skipped": ["c"],
    }  # fmt: skip


def test_an_empty_score_set_has_a_page(tmp_path):
    page = Page(write_report(tmp_path, title="t", **NOTHING).read_text("utf-8"))
    assert "No task was scored." in page.text
    assert "svg" not in page.tags
    assert format_table({}).split()[0] == "task"


def test_scores_without_a_defined_metric_are_shown_as_dashes(tmp_path):
    scores = {name: score(task, []) for name, task in {**TASKS, **COMBINATIONS}.items()}
    Page(write_report(tmp_path, title="t", **NOTHING | {"scores": scores}).read_text("utf-8"))
    assert all("–" in line for line in format_table(scores).splitlines()[1:])


def test_a_combination_shows_each_of_its_labels(tmp_path):
    task = COMBINATIONS["age+gender"]
    truth = Utterance(key="u", wav="u.wav", text="hi", lang="en", labels={"age": "old", "gender": "male"})
    scores = {task.name: score(task, [(truth, read(task, f"hi{said}")) for said in ("<old><male>", "<old><female>")])}
    page = Page(write_report(tmp_path, title="t", **NOTHING | {"scores": scores}).read_text("utf-8"))
    assert "age+gender: age" in page.text
    assert "age+gender: gender" in page.text
    lines = [line.split("  ") for line in format_table(scores).splitlines()[1:]]
    shown = [" ".join(word.strip() for word in line if word.strip()) for line in lines]
    assert [line.split(" ↑ ")[0] for line in shown] == ["age+gender accuracy", "age accuracy", "gender accuracy"]
    assert ["50.00 %" in shown[0], "100.00 %" in shown[1], "50.00 %" in shown[2]] == [True] * 3
    assert "transcript WER 0.00 %" in shown[0]


def test_what_a_model_says_is_never_markup(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    path = write_report(
        tmp_path,
        title=evil,
        scores={},
        examples=[example(key=evil, wav=evil, reference=evil, hypothesis=evil, task="timestamps",
                          words=(Word(evil, 0.1, 0.4),))],
        curves=[row | {"stage": f"{evil}{row['stage']}"} for row in log()],
        facts={evil: evil},
        skipped=[evil],
    )  # fmt: skip
    page = Page(path.read_text("utf-8"))
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert page.text.count("<script>alert(1)</script>") >= 7


def test_an_answer_that_never_came(tmp_path):
    silent = example(hypothesis="", mel=None)
    page = Page(write_report(tmp_path, title="t", **NOTHING | {"examples": [silent]}).read_text("utf-8"))
    assert page.marked == ["hello", "world"]
    assert "img" not in page.tags


def test_words_lie_at_their_times(tmp_path):
    words = (Word("hello", 0.13, 0.65), Word("late", 1.2, 9.0), Word("beyond", 5.0, 6.0))
    examples = [example(task="timestamps", words=words), example(task="asr", words=words)]
    text = write_report(tmp_path, title="t", **NOTHING | {"examples": examples}).read_text("utf-8")
    assert re.findall(r'class="word" style="left: ([\d.]+)%; width: ([\d.]+)%"', text) == [
        ("10.000", "40.000"),
        ("92.308", "7.692"),
    ]


def test_many_skipped_files_are_counted(tmp_path):
    skipped = [f"{i}.wav: broken" for i in range(1000)]
    page = Page(write_report(tmp_path, title="t", **NOTHING | {"skipped": skipped}).read_text("utf-8"))
    assert "Skipped recordings: 1000" in page.text
    assert "800 more" in page.text
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["skipped"] == skipped


def test_a_report_that_fails_leaves_the_old_one(tmp_path):
    write_report(tmp_path, title="old", **NOTHING)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = style_scores()
    broken["style"]["extra"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, title="new", **NOTHING | {"scores": broken})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_terminal_table_is_aligned():
    asr = TASKS["asr"]
    pairs = [
        (Utterance(key="a", wav="a.wav", text="small models hear", lang="en"), read(asr, "small models here")),
        (Utterance(key="b", wav="b.wav", text="你好", lang="zh"), read(asr, "你好")),
    ]
    heading, wer, cer, style = format_table({"style": style_scores()["style"], "asr": score(asr, pairs)}).splitlines()
    assert wer.split()[:4] == ["asr", "WER", "↓", "33.33"]
    assert cer.split()[:3] == ["CER", "↓", "0.00"]
    assert style.split()[:4] == ["style", "accuracy", "↑", "50.00"]
    assert len({line.index("%") for line in (wer, cer, style)}) == 1
    assert heading.index("value") + len("value") == wer.index("%") + 1


def test_a_spectrogram_has_a_pixel_a_value_and_low_frequencies_below():
    mel = np.zeros((30, 80), np.float32)
    mel[:, 3] = 1
    mel[4, 7] = np.nan
    kind, data = spectrogram(mel).split(",")
    assert kind == "data:image/png;base64"
    brightness = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
    assert brightness.shape == (80, 30)
    assert set(brightness.argmax(axis=0)) == {80 - 1 - 3}
    spectrogram(np.full((5, 80), -3, np.float32))


def test_curves_are_drawn_for_the_columns_there_are():
    rows = [*log(), {"stage": "tune", "step": 600}, {"stage": "tune", "step": 610, "loss": None},
            {"stage": "tune", "step": 620, "loss": math.inf}]  # fmt: skip
    curves = learning_curves(rows)
    assert [curve.title for curve in curves] == ["Loss", "CTC loss", "Learning rate"]
    for curve in curves:
        ElementTree.fromstring(curve.svg)
        assert "nan" not in curve.svg
    assert curves == learning_curves(rows)
    assert learning_curves([]) == []
    assert learning_curves(rows[:1]) == []


def test_long_logs_are_averaged_down():
    loss = learning_curves([{"stage": "a", "step": i, "loss": i % 2} for i in range(20 * POINTS)])[0]
    longest = max(len(re.findall("[ML]", path)) for path in re.findall(r' d="([^"]*)"', loss.svg))
    assert longest <= POINTS


@given(st.text(alphabet="ab 你好,.<>0123", max_size=30), st.text(alphabet="ab 你好,.<>0123", max_size=30))
def test_differences_keep_the_text_and_vanish_for_a_copy(one, other):
    def plain(pieces):
        return "".join(f"<{piece.text}>" if piece.time else piece.text for piece in pieces)

    reference, hypothesis = differences(one, other)
    assert (plain(reference), plain(hypothesis)) == (one, other)
    assert not any(piece.differs for side in differences(one, one) for piece in side)


def test_differences_forgive_what_scoring_forgives():
    reference, hypothesis = differences("hello, 你好<0.10>a<0.50><male>", "Hello 你号<0.12>a<0.50><FEMALE>")
    assert [piece.text for piece in reference if piece.differs] == ["好", "<male>"]
    assert [piece.text for piece in hypothesis if piece.differs] == ["号", "<FEMALE>"]
