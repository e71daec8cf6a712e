"""`osum-npu eval` as people call it: scores by task, the page, wordings and stages compared."""

import json
import shutil

import pytest

from osum_npu.cli.main import main
from osum_npu.evaluation.metrics import headline
from osum_npu.tasks import get_task


def test_eval_writes_scores_by_task_and_a_page(finished, corpus, tmp_path, capsys):
    rows = [json.loads(line) for line in (corpus / "dev.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row["wav"] = str(corpus / row["wav"])
    manifest, out = tmp_path / "test.jsonl", tmp_path / "out"
    broken = {**rows[0], "key": "broken", "wav": "gone.wav"}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [broken, *rows, {"key": "k"}]))
    tasks = ["asr", "gender", "timestamps", "chat", "age+gender", "style+age+gender-only"]
    words = ["--data", manifest, "--tasks", ",".join(tasks), "--limit", "5", "--out", out, "--decoding", "beam"]
    assert main(["eval", "--model", str(finished / "model"), *map(str, words)]) == 0
    said = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert set(report["tasks"]) == set(tasks)
    for name in tasks:
        scores = report["tasks"][name]
        assert scores["n"] == (5 if name != "chat" else min(5, sum("reply" in row for row in [broken, *rows])))
        assert {metric.key for metric in headline(get_task(name))} <= scores.keys()
        assert f"\n{name}" in said
    wer = report["tasks"]["asr"]["wer"]
    assert wer is None or wer >= 0
    assert report["tasks"]["asr"]["failed"] == 1  # a recording that is not there counts as an error
    assert report["tasks"]["gender"]["accuracy"] <= 0.8
    assert report["tasks"]["age+gender"]["accuracy"] <= report["tasks"]["age+gender"]["gender_accuracy"]
    assert report["facts"]["decoding"] == "beam"
    assert "gone.wav" in said
    assert f"{manifest}:{len(rows) + 2}: k: no wav" in said
    page = (out / "report.html").read_text("utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert "gone.wav" in page
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(predictions) == sum(scores["n"] for scores in report["tasks"].values())
    assert {row["task"] for row in predictions} == set(tasks)
    assert said.splitlines()[-1] == f"report: {out / 'report.html'}"


def test_eval_of_tasks_without_labels_ends_in_words(finished, corpus, tmp_path, capsys):
    manifest = tmp_path / "bare.jsonl"
    manifest.write_text('{"key": "a", "wav": "a.wav"}\n')
    words = ["--data", str(manifest), "--tasks", "asr,gender", "--out", str(tmp_path / "out")]
    assert main(["eval", "--model", str(finished / "model"), *words]) == 2
    assert "carries labels for asr, gender" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def answering_with_tags(finished, tmp_path):
    """The trained model as if it had learned OSUM-Pangu's form."""
    folder = tmp_path / "tags" / "model"
    shutil.copytree(finished / "model", folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "form": "osum_pangu"}))
    return folder


def test_eval_in_natural_language_compares_wordings_and_stages(answering_with_tags, corpus, tmp_path, capsys):
    tasks = ["asr", "gender+age-only", "chat", "gender"]
    words = ["--model", answering_with_tags, "--data", corpus / "dev.jsonl", "--limit", "2", "--natural"]
    assert main([str(w) for w in ["eval", *words, "--tasks", "asr", "--out", tmp_path / "1"]]) == 0
    words += ["--tasks", ",".join(tasks), "--out", tmp_path / "2", "--stage", f"stage 1={tmp_path / '1/report.json'}"]
    assert main([str(w) for w in ["eval", *words]]) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "2/report.json").read_text("utf-8"), parse_constant=pytest.fail)
    asked = [name for name in tasks if name in report["tasks"]]
    shown = [name for name in asked if name != "chat"]  # that form shows a chat no instruction
    following = report["instructions"]["following"]
    assert {w: set(found["tasks"]) for w, found in following.items()} == {"fixed": set(shown), "natural": set(shown)}
    assert report["instructions"]["differences"].keys() == set(shown)
    rows = [json.loads(line) for line in (tmp_path / "2/predictions.jsonl").read_text("utf-8").splitlines()]
    for name in shown:
        by_wording = {w: [row for row in rows if (row["task"], row["wording"]) == (name, w)] for w in following}
        assert [r["key"] for r in by_wording["fixed"]] == [r["key"] for r in by_wording["natural"]]
        assert not any(r["prompt"] for r in by_wording["fixed"])
        assert all(r["prompt"] for r in by_wording["natural"])
    assert "instructions followed" in said
    page = (tmp_path / "2/report.html").read_text("utf-8")
    assert "stage 1" in page
    assert "Instructions followed, by stage" in page


def test_eval_of_stages_wants_a_model_whose_answers_have_tags(answering_with_tags, finished, corpus, tmp_path, capsys):
    words = ["eval", "--data", corpus / "dev.jsonl", "--tasks", "asr", "--limit", "2"]
    first = ["--model", answering_with_tags, "--out", tmp_path / "1"]
    assert main([str(w) for w in [*words, *first]]) == 0
    second = ["--model", finished / "model", "--out", tmp_path / "2", "--stage", f"1={tmp_path / '1/report.json'}"]
    assert main([str(w) for w in [*words, *second]]) == 2
    assert "do not begin with the tags of their task" in capsys.readouterr().err
    assert not (tmp_path / "2" / "report.html").exists()


@pytest.mark.parametrize(
    ("stage", "fault"),
    [("report.json", "--stage wants a name and a report"), ("a=gone.json", "gone.json: the report of a stage cannot")],
)
def test_eval_of_a_stage_that_is_not_there(finished, corpus, tmp_path, capsys, stage, fault):
    words = ["--model", finished / "model", "--data", corpus / "dev.jsonl", "--out", tmp_path, "--stage", stage]
    assert main([str(w) for w in ["eval", *words]]) == 2
    assert fault in capsys.readouterr().err
