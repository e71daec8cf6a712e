"""A run that is killed and goes on ends exactly as one that was left alone."""

import json
import random
import signal
import time

import pytest
import tiny
import torch

from osum_npu.config import RecipeError
from osum_npu.data.sources import read_source
from osum_npu.models.layout import lay_out
from osum_npu.training.build import build
from osum_npu.training.log import Log, read_log
from osum_npu.training.loop import train
from osum_npu.training.meter import MEASURED
from osum_npu.training.state import checkpoints, load_tensors, read_progress

STEPS = 14
"""Of the tiny recipe: 4 to hear, 8 to understand, 2 to tune; a checkpoint every 3 and at the end of a stage."""


class StoppedError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def _one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture
def stop(monkeypatch):
    """Let every following run end right after this step of its optimiser."""
    original = Log.advance

    def stop_at(last):
        def advance(log, stage):
            original(log, stage)
            if log.bar.n == last:
                raise StoppedError

        monkeypatch.setattr(Log, "advance", advance)

    return stop_at


def numbers(out):
    """The log without what depends on the machine."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_log(out / "log.jsonl")]


def weights(out):
    return {
        name: (out / "model" / name).read_bytes()
        for name in ("model.safetensors", "adapter_model.safetensors", "tokenizer.json", "config.json")
    }


def test_the_log_holds_a_row_for_every_step_and_measurement(finished):
    rows = numbers(finished)
    assert [row["step"] for row in rows if "learning_rate" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "dev_loss" in row] == [4, 8, 12, 14]
    for row in rows:
        if "dev_loss" not in row:
            assert ("loss" in row) == (row["stage"] != "hear")
            assert ("ctc_loss" in row) == (row["stage"] != "tune")
            assert row["gradient_norm"] > 0
    assert [read_progress(path).step for path in checkpoints(finished / "checkpoints")] == [12, 14]


@pytest.mark.parametrize("last", [1, 4, 5, 8, 13])
def test_stopped_after_any_step_and_gone_on_with(last, corpus, finished, tmp_path, stop):
    recipe = tiny.recipe(corpus, tmp_path / "run")
    stop(last)
    with pytest.raises(StoppedError):
        train(recipe)
    assert numbers(tmp_path / "run")[-1]["step"] == last
    stop(None)
    train(recipe)
    assert numbers(tmp_path / "run") == numbers(finished)
    assert weights(tmp_path / "run") == weights(finished)


def test_stopped_again_and_again(corpus, finished, tmp_path, stop):
    recipe = tiny.recipe(corpus, tmp_path / "run", "checkpoint_every=1")
    for last in (2, 3, 6, 9, 11):
        stop(last)
        with pytest.raises(StoppedError):
            train(recipe)
    stop(None)
    train(recipe)
    assert numbers(tmp_path / "run") == numbers(finished)
    assert weights(tmp_path / "run") == weights(finished)


def test_killed_at_a_random_moment(corpus, finished, tmp_path):
    """SIGKILL of a real process, with workers that read ahead; then the same words again."""
    out = tmp_path / "run"
    layer = tiny.write_recipe(tmp_path / "tiny.yaml", corpus)
    words = ("train", layer, f"out={out}", "data.workers=1")
    process = tiny.osum_npu(*words, start=True)
    last = random.randint(1, STEPS - 4)
    try:
        deadline = time.monotonic() + 120
        while len(read_log(out / "log.jsonl")) < last and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert not (out / "model").exists()
    again = tiny.osum_npu(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == f"model: {out / 'model'}"
    assert numbers(out) == numbers(finished)
    assert weights(out) == weights(finished)


def test_threads_do_not_change_the_order_of_sums(corpus, tmp_path):
    """Every sequence has the same two marks, so their gradient is a sum that threads may race for."""
    utterances, _ = read_source(corpus / "train.jsonl", 30)
    model, _ = build(tiny.recipe(corpus, tmp_path / "run"), utterances)
    model.requires_grad_(True)
    layout = lay_out([[5, 6]] * 3000, [4] * 3000, [[7]] * 3000)
    torch.manual_seed(0)
    speech, slope = torch.randn(12000, 32, requires_grad=True), torch.randn(*layout.source_BL.shape, 32)
    torch.set_num_threads(2)
    found = []
    for _ in range(20):
        inputs = [model.marks, speech, model.llm.get_input_embeddings().weight]
        found.append(torch.autograd.grad(model.embed(speech, layout), inputs, slope))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_second_optimiser_goes_on_too(corpus, tmp_path, stop):
    changes = ("stages.1.muon_learning_rate=1e-2", "stages.2.steps=1")
    train(tiny.recipe(corpus, tmp_path / "whole", *changes))
    recipe = tiny.recipe(corpus, tmp_path / "run", *changes)
    stop(8)
    with pytest.raises(StoppedError):
        train(recipe)
    stop(None)
    train(recipe)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(corpus, finished, tmp_path, stop):
    recipe = tiny.recipe(corpus, tmp_path / "run")
    train(recipe)
    before = numbers(tmp_path / "run")
    stop(1)  # no step is left to stop at
    train(recipe)
    assert numbers(tmp_path / "run") == before == numbers(finished)
    assert weights(tmp_path / "run") == weights(finished)


def test_half_a_checkpoint_and_half_a_row_are_ignored(corpus, finished, tmp_path, stop):
    recipe, out = tiny.recipe(corpus, tmp_path / "run"), tmp_path / "run"
    stop(8)
    with pytest.raises(StoppedError):
        train(recipe)
    torn = out / "checkpoints" / "step_00000008.part"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"half of it")
    with (out / "log.jsonl").open("a") as log:
        log.write('{"stage": "understand", "step": 9, "lo')
    stop(None)
    train(recipe)
    assert numbers(out) == numbers(finished)
    assert weights(out) == weights(finished)


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(corpus, finished, tmp_path, stop):
    recipe, out = tiny.recipe(corpus, tmp_path / "run"), tmp_path / "run"
    stop(8)
    with pytest.raises(StoppedError):
        train(recipe)
    older, newest = checkpoints(out / "checkpoints")
    assert (older.name, newest.name) == ("step_00000004", "step_00000006")
    whole = (newest / "state.pt").read_bytes()
    (newest / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"step_00000006/state\.pt cannot be read .*remove that folder"):
        train(recipe)
    newest.rename(tmp_path / "aside")
    stop(None)
    train(recipe)
    assert numbers(out) == numbers(finished)
    assert weights(out) == weights(finished)


def test_a_checkpoint_holds_what_it_says(finished):
    newest = checkpoints(finished / "checkpoints")[-1]
    progress = read_progress(newest)
    assert (progress.stage, progress.stage_step, progress.step) == (2, 2, STEPS)
    state = load_tensors(newest)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert {int(moments["step"]) for one in state["optimizer"] for moments in one["state"].values()} == {2}


@pytest.mark.parametrize("change", ["another word", "a row less", "another order", "longer by a little"])
def test_data_that_changed_in_between_is_refused(change, corpus, tmp_path, stop):
    lines = (corpus / "train.jsonl").read_text("utf-8").replace('"wav": "', f'"wav": "{corpus}/').splitlines()
    manifest = tmp_path / "mine.jsonl"
    manifest.write_text("\n".join(lines), "utf-8")
    recipe = tiny.recipe(corpus, tmp_path / "run", f"data.train.mine={{path: {manifest}}}")
    stop(5)
    with pytest.raises(StoppedError):
        train(recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.p*") if path.is_file()}
    row = json.loads(lines[7])
    changed = {
        "another word": [*lines[:7], json.dumps({**row, "reply": "other"}), *lines[8:]],
        "a row less": lines[:-1],
        "another order": lines[::-1],
        "longer by a little": [*lines[:7], json.dumps({**row, "duration": row["duration"] + 0.01}), *lines[8:]],
    }
    manifest.write_text("\n".join(changed[change]), "utf-8")
    count = 39 if change == "a row less" else 40
    with pytest.raises(ValueError, match=rf"changed since .*step_00000004: mine: 40 utterances, \w+ then; {count} utt"):
        train(recipe)
    assert {path: path.read_bytes() for path in before} == before
    manifest.write_text("\n".join(lines), "utf-8")
    stop(6)
    with pytest.raises(StoppedError):
        train(recipe)


def test_another_recipe_in_the_same_folder_is_refused(corpus, tmp_path, stop):
    out = tmp_path / "run"
    train(tiny.recipe(corpus, out, "stages.1.steps=1"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match=r"holds a run of another recipe .*choose another out"):
        train(tiny.recipe(corpus, out, "stages.1.steps=2"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_recipe_that_failed_before_its_first_step_may_be_mended(corpus, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "empty.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="none of its rows can be used"):
        train(tiny.recipe(corpus, out, f"data.train.tones.path={tmp_path / 'empty.jsonl'}"))
    train(tiny.recipe(corpus, out, "stages.1.steps=1"))
    assert (out / "model" / "config.json").exists()
