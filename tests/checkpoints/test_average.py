import shutil

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu.checkpoints.average import average
from osum_npu.checkpoints.distributed import read_model
from osum_npu.checkpoints.model_directory import load_model
from osum_npu.checkpoints.shards import as_bytes
from osum_npu.cli.main import main
from osum_npu.training.loop import train
from osum_npu.training.saver import checkpoints

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def write(folder, states):
    paths = [folder / f"{number}.pt" for number in range(len(states))]
    for path, state in zip(paths, states):
        torch.save(state, path)
    return paths


def averaged(folder, states):
    average(write(folder, states), folder / "mean.pt")
    return torch.load(folder / "mean.pt", weights_only=True)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.sampled_from(DTYPES), st.integers(0, 10**6))
def test_the_mean_is_that_of_float64_but_for_one_rounding(tmp_path_factory, count, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    states = [{"a": torch.randn(3, 5, generator=rng).to(dtype), "n": torch.tensor(i)} for i in range(count)]
    mean = averaged(tmp_path_factory.mktemp("mean"), states)
    assert (mean["a"].dtype, mean["n"].item()) == (dtype, count - 1)
    exact = torch.stack([state["a"].double() for state in states]).mean(0)
    rounding = max(torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 0)
    assert (mean["a"].double() - exact).abs().max() <= rounding * exact.abs().max()


def test_one_checkpoint_is_its_own_mean_bit_for_bit(tmp_path):
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-40, 3.1])
    state = {str(dtype): odd.to(dtype) for dtype in DTYPES} | {
        "steps": torch.tensor(2**60 + 1),
        "empty": torch.ones(0, 3),
    }
    mean = averaged(tmp_path, [state])
    assert list(mean) == list(state)
    assert all(torch.equal(as_bytes(mean[name]), as_bytes(state[name])) for name in state)


def test_small_changes_are_not_swallowed(tmp_path):
    """In bfloat16, 256 + 1 is 256."""
    states = [{"a": torch.full((3,), value, dtype=torch.bfloat16)} for value in (256.0, 1.0, 1.0, 1.0, 1.0)]
    assert averaged(tmp_path, states)["a"].tolist() == [52.0] * 3


def test_long_tensors_are_averaged_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr("osum_npu.checkpoints.average._CHUNK", 7)
    states = [{"a": torch.arange(60.0).reshape(3, 20).t() * factor} for factor in (1, 3)]
    assert torch.equal(averaged(tmp_path, states)["a"], 2 * torch.arange(60.0).reshape(3, 20).t())


def test_checkpoints_of_a_training_make_a_model(finished, tmp_path, capsys):
    """With LoRA, and a tokenizer, configuration and card from the run's model."""
    steps = checkpoints(finished / "checkpoints")
    assert len(steps) == 2
    assert main(["average", *map(str, steps), "--out", str(tmp_path / "mean")]) == 0
    assert capsys.readouterr().out == f"2 averaged: {tmp_path / 'mean'}\n"
    model, tokenizer = load_model(tmp_path / "mean")
    states = [{**load_model(finished / "model")[0].state_dict(), **read_model(step)} for step in steps]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (states[0][name] + states[1][name]) / 2), name
    last = finished / "model"
    assert {path.name for path in (tmp_path / "mean").iterdir()} == {path.name for path in last.iterdir()}
    assert tokenizer.get_vocab() == load_model(last)[1].get_vocab()

    average([tmp_path / "mean", last], tmp_path / "again")
    again, whole = load_model(tmp_path / "again")[0].state_dict(), load_model(last)[0].state_dict()
    assert all(torch.equal(again[name], (model.state_dict()[name] + whole[name]) / 2) for name in whole)


def test_one_checkpoint_of_a_training_is_that_model(finished, tmp_path):
    average(checkpoints(finished / "checkpoints")[-1:], tmp_path / "mean")
    one, other = (load_model(path)[0].state_dict() for path in (tmp_path / "mean", finished / "model"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_checkpoints_of_different_stages_are_refused(corpus, tmp_path):
    """LoRA learns in the last stage alone: what it was before is in no checkpoint before the end of the second."""
    train(tiny.recipe(corpus, tmp_path / "run", "keep_checkpoints=3"))
    steps = checkpoints(tmp_path / "run/checkpoints")
    with pytest.raises(ValueError, match=r"wanted checkpoints of one stage: .*step_00000009 has not model.llm.*lora_A"):
        average(steps, tmp_path / "mean")


def test_what_does_not_fit_is_named(finished, tmp_path):
    state = {"a": torch.ones(3), "b": torch.ones(2)}
    paths = write(tmp_path, [state, {"a": torch.ones(3, 1), "c": torch.ones(2)}])
    with pytest.raises(ValueError, match=r"1\.pt does not fit .*0\.pt:\n") as caught:
        average(paths, tmp_path / "mean.pt")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        "b is missing",
        "a is (3, 1)",
        "c, (2), is unknown",
    ]
    with pytest.raises(ValueError, match="got both"):
        average([paths[0], finished / "model"], tmp_path / "mean.pt")
    with pytest.raises(ValueError, match=f"{tmp_path / 'nowhere'}: wanted a model directory"):
        average([tmp_path / "nowhere"], tmp_path / "mean")
    with pytest.raises(ValueError, match="is there already"):
        average([finished / "model"], tmp_path)
    step = checkpoints(finished / "checkpoints")[-1]
    shutil.copytree(step, tmp_path / "checkpoints" / step.name)
    with pytest.raises(ValueError, match=f"wanted a model directory in {tmp_path / 'model'}, as a finished run has it"):
        average([tmp_path / "checkpoints" / step.name], tmp_path / "mean")
    assert not list(tmp_path.glob("mean*"))
