"""What the rows of the log say of speed, waiting and memory; a profile; the summary at the end."""

import json
import time

import pytest
import tiny

from osum_npu.audio.mel import frame_count
from osum_npu.cli.main import main
from osum_npu.data import collate
from osum_npu.data.loader import Position
from osum_npu.models.flops import Work, count_flops
from osum_npu.training.log import read_log
from osum_npu.training.loop import _Run, train
from osum_npu.training.meter import read_peak
from osum_npu.training.summary import summary

STAGE = "{name: all, trainable: [encoder, llm, lora], steps: 6, learning_rate: 1e-3, batch_seconds: 6, questions: 2, "
STAGE += "ctc_weight: 0.5, tasks: {asr: 1, gender: 1, chat: 1}}"


@pytest.fixture(autouse=True)
def _one_thread():
    with tiny.one_thread():
        yield


def test_rates_are_those_of_the_data(corpus, tmp_path, monkeypatch):
    """Two steps a row, against layouts made of the same steps by the model."""
    monkeypatch.setenv("OSUM_PEAK_TFLOPS", "0.5")
    recipe = tiny.recipe(corpus, tmp_path / "run", f"stages=[{STAGE}]", "log_every=2")
    train(recipe)
    run = _Run(recipe, tmp_path / "run")
    (stage,) = recipe.stages
    feed, got = run.feed.steps(stage, Position()), tiny.rows(tmp_path / "run")
    assert len(got) == 3
    for row in got:
        sound = labels = positions = flops = 0
        for batch in [batch for _ in range(2) for batch in next(feed).batches]:
            frames = [frame_count(n) for n in batch.samples]
            layout = run.model.layout(frames, batch.prompts, batch.answers, batch.about, batch.after)
            sound += sum(batch.samples) / 16000
            labels += len(layout.label_N)
            positions += int(layout.mask_BL.sum())
            lengths = layout.packed[:-1] if int(layout.mask_BL.sum()) < layout.mask_BL.numel() else layout.packed
            work = Work(frames, lengths, len(layout.label_N), spelled=True)
            flops += sum(part.total for part in count_flops(run.model.config, stage.trainable, work).values())
        seconds = 2 * row["step_seconds"]
        assert row["audio_hours_per_hour"] * seconds == pytest.approx(sound)
        assert row["label_tokens_per_second"] * seconds == pytest.approx(labels)
        assert row["positions_per_second"] * seconds == pytest.approx(positions)
        assert row["tflops"] * seconds * 1e12 == pytest.approx(flops)
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.5)
        assert 0.1 < row["host_memory_gib"] < 64
        assert "slow_rank" not in row


def test_slow_reading_is_seen_as_waiting(corpus, tmp_path, monkeypatch):
    def waiting(name):
        train(tiny.recipe(corpus, tmp_path / name, f"stages=[{STAGE}]", "log_every=6"))
        (row,) = tiny.rows(tmp_path / name)
        return row["waiting_share"], row["step_seconds"]

    share, seconds = waiting("fast")
    original = collate.read_audio

    def slowly(*words, **more):
        time.sleep(4 * seconds / 3)  # about three utterances a step
        return original(*words, **more)

    monkeypatch.setattr(collate, "read_audio", slowly)
    slow_share, _ = waiting("slow")
    assert slow_share > max(0.6, share)
    assert share < 0.6


@pytest.mark.parametrize("text", ["fast", "0", "-1", "inf"])
def test_a_peak_that_is_none_is_refused(text, monkeypatch):
    monkeypatch.setenv("OSUM_PEAK_TFLOPS", text)
    with pytest.raises(ValueError, match=f"OSUM_PEAK_TFLOPS='{text}': wanted a number above 0"):
        read_peak()


def test_a_profile_of_some_steps(corpus, tmp_path, capsys):
    words = ["train", str(tiny.write_recipe(tmp_path / "run.yaml", corpus)), f"out={tmp_path / 'run'}"]
    assert main([*words, f"stages=[{STAGE}]", "--profile", "2"]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "run/profile"
    events = json.loads((folder / "trace.json").read_text("utf-8"))["traceEvents"]
    assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 2
    table = (folder / "operators.txt").read_text("utf-8")
    assert "aten::mm" in table
    assert len([line for line in table.splitlines() if " aten::" in f" {line.strip()}"]) <= 20
    assert table in said
    assert f"profile: {folder}" in said
    assert said.splitlines()[-1] == f"model: {tmp_path / 'run/model'}"


def test_a_run_too_short_for_a_profile_says_so(corpus, tmp_path, capsys):
    train(tiny.recipe(corpus, tmp_path / "run", f"stages=[{STAGE}]", "stages.0.steps=2"), profile=2)
    assert "profile: nothing recorded, the first 3 steps are left out" in capsys.readouterr().out
    assert not (tmp_path / "run/profile").exists()


def test_the_summary_has_a_line_for_each_stage(finished):
    log = read_log(finished / "log.jsonl")
    head, *lines = summary(log).splitlines()
    assert head.split()[0] == "stage"
    assert [line.split()[:2] for line in lines] == [["hear", "4"], ["understand", "12"], ["tune", "14"]]
    first, last = ([row for row in log if "learning_rate" in row][i] for i in (4, 11))
    assert f"{first['loss']:.3f} → {last['loss']:.3f}" in lines[1]
    old = [{k: v for k, v in row.items() if k != "waiting_share"} for row in log]  # as earlier versions wrote them
    assert len(summary(old).splitlines()) == 4
