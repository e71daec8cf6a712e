"""Several processes train as one, whether each holds the whole model or a part of it."""

import json
import time

import pytest
import tiny
import together
import torch
from safetensors.torch import load_file

from osum_npu.data.plan import WeightedSource, plan_epoch, share
from osum_npu.data.sources import read_source
from osum_npu.parity import relative_error
from osum_npu.training.log import read_log
from osum_npu.training.loop import train

SLOW = "several trainings in up to four processes"
FULL = pytest.param("full", marks=pytest.mark.slow(reason=SLOW))


def losses(out):
    return [row.get("loss", row.get("ctc_loss")) for row in read_log(out / "log.jsonl") if "learning_rate" in row]


def weights(out):
    files = ("model.safetensors", "adapter_model.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(out / "model" / file).items()}


def steered(corpus, folder):
    """Copy a manifest so that a test may spoil some of its sounds; return its lines."""
    (folder / "train").mkdir()
    for path in (corpus / "train").iterdir():
        (folder / "train" / path.name).symlink_to(path)
    return (corpus / "train.jsonl").read_text("utf-8").replace(str(corpus), str(folder)).splitlines()


@pytest.fixture(scope="module")
def odd(corpus, tmp_path_factory):
    """Steps of odd sizes, micro batches, a step whose second share is empty, a file that only one rank meets."""
    folder = tmp_path_factory.mktemp("odd")
    lines = steered(corpus, folder)
    lines[3] = lines[3].replace("003.wav", "gone.wav")
    (folder / "train.jsonl").write_text("\n".join(lines), "utf-8")
    source = f"data.train.tones.path={folder / 'train.jsonl'}"
    changes = (*tiny.WITHOUT_CHANCE, source, "stages.2.batch_seconds=1.0")
    with tiny.one_thread():
        train(tiny.recipe(corpus, folder / "alone", *changes))
    return changes, folder / "alone"


@pytest.mark.parametrize(
    ("sharding", "processes"), [("none", 2), pytest.param("full", 2, marks=pytest.mark.slow(reason=SLOW)), ("full", 3)]
)
def test_several_processes_learn_what_one_learns(sharding, processes, odd, corpus, tmp_path):
    changes, alone = odd
    recipe, out = tiny.write_recipe(tmp_path / "recipe.yaml", corpus), tmp_path / "run"
    changes = (f"out={out}", *changes, f"sharding={sharding}")
    assert f"{processes} × cpu" in together.train(recipe, *changes, processes=processes)
    assert len(losses(alone)) == len(losses(out)) == 14
    assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(losses(alone), losses(out)))
    want, got = weights(alone), weights(out)
    assert want.keys() == got.keys()
    # AdamW divides by the size of a gradient, so where that is rounding noise the weights differ by more than it: by
    # 2e-3 with the sums of AVX2, in one entry of a LoRA that has learned for two steps.
    assert max(relative_error(got[key], want[key]) for key in want) <= 5e-3
    assert (out / "skipped.txt").read_text("utf-8") == (alone / "skipped.txt").read_text("utf-8")
    together.train(recipe, *changes, processes=processes)


OTHERS = {
    "bfloat16": ([], 2e-3),  # of a loss; without sharding, two processes and one differ by 1e-4
    "patience": (["stages=[STAGE]", "stages.0.trainable=[encoder, llm]", "stages.0.patience=1", "dev_every=2"], 1e-5),
    "whisper": ([f"model={{kind: whisper, config: {json.dumps(tiny.WHISPER_SIZES)}}}", "stages=[STAGE]"], 1e-5),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_sharded_models_learn_what_one_process_learns(kind, corpus, tmp_path):
    """In bfloat16, where parts begin to learn in the second stage; to the best of dev losses; a whole Whisper."""
    changes, tolerance = OTHERS[kind]
    stage = "{name: all, trainable: [encoder, decoder], steps: 4, learning_rate: 1e-3, batch_seconds: 12}"
    still = tiny.WITHOUT_CHANCE if kind == "bfloat16" else [] if kind == "whisper" else tiny.WITHOUT_CHANCE[:3]
    changes = [*still, *(change.replace("STAGE", stage) for change in changes)]
    changes += ["activation_checkpointing=true", f"precision={'bfloat16' if kind == 'bfloat16' else 'float32'}"]
    with tiny.one_thread():
        train(tiny.recipe(corpus, tmp_path / "alone", *changes))
    recipe, out = tiny.write_recipe(tmp_path / "recipe.yaml", corpus), tmp_path / "run"
    together.train(recipe, f"out={out}", *changes, "sharding=full", processes=2)
    assert all(abs(a - b) <= tolerance * abs(a) for a, b in zip(losses(tmp_path / "alone"), losses(out), strict=True))
    want, got = (load_file(folder / "model/model.safetensors") for folder in (tmp_path / "alone", out))
    assert want.keys() == got.keys()
    assert all(want[name].dtype == got[name].dtype == torch.float32 for name in want)
    if kind != "bfloat16":  # AdamW's first steps are as large as the rate, whatever rounding made of small gradients
        assert max(relative_error(got[name], want[name]) for name in want) <= 1e-3


def test_ranks_that_share_the_work_of_muon_learn_what_one_learns(corpus, tmp_path):
    stage = "{name: all, trainable: [encoder, adapter, llm], learning_rate: 1e-3, steps: 6, batch_seconds: 12}"
    changes = [*tiny.WITHOUT_CHANCE[:3], f"stages=[{stage}]", "stages.0.muon_learning_rate=1e-2"]
    with tiny.one_thread():
        train(tiny.recipe(corpus, tmp_path / "alone", *changes))
    recipe, out = tiny.write_recipe(tmp_path / "recipe.yaml", corpus), tmp_path / "run"
    together.train(recipe, f"out={out}", *changes, processes=3)
    # matrices are made orthogonal in bfloat16, which makes more of the rounding of sums than other steps do
    assert all(abs(a - b) <= 1e-3 * abs(a) for a, b in zip(losses(tmp_path / "alone"), losses(out), strict=True))


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_ranks_with_three_times_the_data_of_another_finish(sharding, corpus, tmp_path):
    """Two thirds of what the second rank meets in the first epoch cannot be read; a batch holds one utterance."""
    lines = steered(corpus, tmp_path)
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("\n".join(lines), "utf-8")
    stage = "{name: all, trainable: [encoder, ctc, adapter, llm], learning_rate: 1e-3, ctc_weight: 0.3, steps: STEPS}"
    settings = {"batch_seconds": 8, "micro_batch_seconds": 0.5}
    source = WeightedSource(read_source(manifest, 30)[0])
    plan = plan_epoch([source], {"asr": 1}, batch_seconds=settings["batch_seconds"], seed=0, epoch=0)
    second = [example.utterance for step in plan for example in share(step, 1, 2)]
    spoiled = [utterance.wav for i, utterance in enumerate(second) if i % 3]
    for path in spoiled:
        (tmp_path / "train" / path.rpartition("/")[2]).unlink()
    changes = [
        *tiny.WITHOUT_CHANCE[:3],
        f"data.train.tones={{path: {manifest}}}",
        f"stages=[{stage.replace('STEPS', str(len(plan)))}]",
        *(f"stages.0.{name}={value}" for name, value in settings.items()),
    ]
    with tiny.one_thread():
        train(tiny.recipe(corpus, tmp_path / "alone", *changes))
    recipe, out = tiny.write_recipe(tmp_path / "recipe.yaml", corpus), tmp_path / "run"
    together.train(recipe, f"out={out}", *changes, f"sharding={sharding}", processes=2)
    assert len(losses(out)) == len(plan) >= 4
    # the loss is a mean over all tokens of a step: the same only if each utterance is there, and once
    assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(losses(tmp_path / "alone"), losses(out), strict=True))
    skipped = [set((tmp_path / name / "skipped.txt").read_text("utf-8").splitlines()) for name in ("alone", "run")]
    assert skipped[0] == skipped[1]
    assert len(skipped[0]) == len(spoiled)


@pytest.mark.parametrize("sharding", ["none", FULL])
def test_a_run_goes_on_with_more_processes_and_with_fewer(sharding, corpus, tmp_path):
    changes = [*tiny.WITHOUT_CHANCE, "checkpoint_every=1", "keep_checkpoints=1", f"sharding={sharding}"]
    for stage in range(3):  # AdamW divides by gradients that may be rounding noise, of which AVX2's sums have more
        changes += [f"stages.{stage}.learning_rate=1e-4", f"stages.{stage}.eps=1e-4"]
    with tiny.one_thread():
        train(tiny.recipe(corpus, tmp_path / "alone", *changes))
    recipe, out = tiny.write_recipe(tmp_path / "recipe.yaml", corpus), tmp_path / "run"
    for processes, last in ((2, 5), (3, 10)):
        training = together.Training(recipe, f"out={out}", *changes, processes=processes)
        while len(losses(out)) < last:
            assert training.alive(), training.end()
            time.sleep(0.005)
        training.kill()
    together.train(recipe, f"out={out}", *changes)
    assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(losses(tmp_path / "alone"), losses(out), strict=True))
    want, got = weights(tmp_path / "alone"), weights(out)
    apart = max(float((got[name] - want[name]).abs().max()) for name in want)
    print(f"2, 3, then 1 processes: weights differ by {apart:.1e}")
    assert apart <= 1e-5


@pytest.mark.slow(reason=SLOW)
@pytest.mark.parametrize("micro", ["null", "1.5"])
@pytest.mark.parametrize(("sharding", "processes"), [("none", 2), ("none", 4), ("full", 2), ("full", 4), ("hybrid", 4)])
def test_fifty_steps_have_the_same_losses(sharding, processes, micro, corpus, tmp_path, record_property):
    stage = "{name: all, trainable: [encoder, ctc, adapter, llm], steps: 50, learning_rate: 1e-3, ctc_weight: 0.3}"
    changes = [*tiny.WITHOUT_CHANCE[:3], f"stages=[{stage}]", "stages.0.batch_seconds=8", "dev_every=50"]
    with tiny.one_thread():
        train(tiny.recipe(corpus, tmp_path / "alone", *changes))
    recipe, out = tiny.write_recipe(tmp_path / "recipe.yaml", corpus), tmp_path / "run"
    changes += [f"out={out}", f"sharding={sharding}", f"stages.0.micro_batch_seconds={micro}"]
    together.train(recipe, *changes, processes=processes, per_node=2 if sharding == "hybrid" else None)
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses(tmp_path / "alone"), losses(out), strict=True))
    print(f"{sharding}, {processes} processes, micro batches {micro}: losses differ by {apart:.1e}")
    assert apart <= 1e-4
