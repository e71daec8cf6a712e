"""The dev loss by task, and stages that end when it no longer falls."""

import pytest
import tiny
import torch

from osum_npu.checkpoints.distributed import read_model
from osum_npu.checkpoints.model_directory import load_model
from osum_npu.data.plan import plan_epoch
from osum_npu.training.log import Log, read_log
from osum_npu.training.loop import _Run, train
from osum_npu.training.saver import checkpoints
from osum_npu.training.validate import EarlyStop

STAGE = (
    "{{name: {}, trainable: [encoder, adapter, llm], steps: {}, learning_rate: 3e-3, batch_seconds: 3, patience: 2}}"
)
WORDS = (f"stages=[{STAGE.format('a', 12)}, {STAGE.format('b', 3)}]", "model.ctc=false", "dev_every=2", "log_every=1")
PLANTED = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0}
"""Dev loss by step; the fourth measurement is no better than the second."""


@pytest.fixture(autouse=True)
def _one_thread():
    with tiny.one_thread():
        yield


def test_the_dev_loss_is_that_of_each_utterance_alone(corpus, tmp_path):
    stage = "{name: all, trainable: [llm], steps: 4, learning_rate: 1e-3, tasks: {asr: 1, gender: 1}}"
    recipe = tiny.recipe(corpus, tmp_path / "run", f"stages=[{stage}]", *tiny.WITHOUT_CHANCE[:3])
    model, _ = load_model(train(recipe))
    row = read_log(tmp_path / "run/log.jsonl")[-1]
    run, sums = _Run(recipe, tmp_path / "run"), {}
    run.model.load_state_dict(model.state_dict())
    run.model.eval()
    (stage,) = recipe.stages
    collate = run.feed.collator(stage, augment=False)
    for step in plan_epoch(run.feed.dev, stage.tasks, batch_seconds=stage.batch_seconds, seed=0, epoch=0):
        for example in step:
            with torch.no_grad():
                output = run.step.forward(stage, collate([example], epoch=0))
            name = example.tasks[0].name
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + output.loss_sum.item(), count + output.label_count
    assert sums.keys() == {"asr", "gender"}
    for name, (total, count) in sums.items():
        assert row[f"dev_loss/{name}"] == pytest.approx(total / count, rel=1e-5)
    everything = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    assert row["dev_loss"] == pytest.approx(everything, rel=1e-5)


def test_patience():
    early = EarlyStop(2, [{"step": 2, "dev_loss": 3.0}, {"step": 3, "loss": 1.0}, {"step": 4, "dev_loss": 2.0}])
    assert (early.step, early.enough) == (4, False)
    assert not early.better(6, 2.0)
    assert not early.better(8, float("nan"))
    assert early.enough
    assert early.better(10, 1.9)
    assert (early.step, early.enough) == (10, False)


@pytest.fixture
def _planted(monkeypatch):
    original = Log.advance
    steps = [0]

    def advance(log, stage):
        original(log, stage)
        steps[0] = log.bar.n

    monkeypatch.setattr(Log, "advance", advance)
    monkeypatch.setattr(_Run, "_dev_losses", lambda run, stage: {"dev_loss": PLANTED.get(steps[0], 1.0 / steps[0])})


@pytest.mark.usefixtures("_planted")
def test_a_stage_ends_early_with_its_best_weights(corpus, tmp_path, capsys):
    """Stage a ends after step 8 with the weights of step 4; until then it is as without patience; b goes on."""
    out, keep = tmp_path / "run", ("checkpoint_every=4", "keep_checkpoints=9")
    train(tiny.recipe(corpus, out, *WORDS, *keep))
    assert "stage a ends after step 8 with the weights of step 4" in capsys.readouterr().out
    assert steps(out) == [*[("a", n) for n in range(1, 9)], *[("b", n) for n in range(9, 12)]]
    best, end = (read_model(out / f"checkpoints/step_0000000{n}") for n in (4, 8))
    assert all(torch.equal(tensor, end[name]) for name, tensor in best.items())
    train(tiny.recipe(corpus, tmp_path / "plain", *WORDS, *keep, "stages.0.patience=null", "stages.1.patience=null"))
    plain = read_model(tmp_path / "plain/checkpoints/step_00000004")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in best.items())
    assert len(steps(tmp_path / "plain")) == 15


@pytest.mark.usefixtures("_planted")
def test_a_killed_run_ends_its_stage_at_the_same_step(corpus, tmp_path, monkeypatch):
    original = Log.advance
    for last in (3, 5, 8, 10):

        def advance(log, stage, last=last):
            original(log, stage)
            if log.bar.n == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Log, "advance", advance)
            with pytest.raises(KeyboardInterrupt):
                train(tiny.recipe(corpus, tmp_path / "run", *WORDS))
    for name in ("run", "whole"):
        train(tiny.recipe(corpus, tmp_path / name, *WORDS))
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")
    models = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert models[0] == models[1]
    assert [path.name for path in checkpoints(tmp_path / "run/best")] == ["step_00000010", "step_00000011"]


def steps(out):
    return [(row["stage"], row["step"]) for row in read_log(out / "log.jsonl") if "learning_rate" in row]


def test_patience_needs_dev_data(corpus, tmp_path):
    with pytest.raises(ValueError, match="stage 'a' has patience, but no utterance of the dev data"):
        train(tiny.recipe(corpus, tmp_path / "run", *WORDS, "data.dev={}"))
