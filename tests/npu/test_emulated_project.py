"""This project on the real torch_npu wheel and an emulated device: ops, training, answers, two processes."""

import json
import os
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file

from osum_npu import backend, functional, parity  # noqa: F401  functional fills the registry
from osum_npu.op import REGISTRY
from osum_npu.training.log import read_log

pytestmark = pytest.mark.emulated_npu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}") for name in REGISTRY for dtype in DTYPES
]


@pytest.fixture(scope="module")
def device():
    return backend.load("npu").activate()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    tiny.write_corpus(folder / "train.jsonl", 40)
    tiny.write_corpus(folder / "dev.jsonl", 8, seed=1)
    return folder


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_ops_on_the_device(device, name, dtype):
    implementation = parity.serving(REGISTRY[name], dtype, device)
    assert implementation.provider == ("reference" if name == "linear_cross_entropy" else "npu")
    rows = parity.check(REGISTRY[name], implementation, dtype, device)
    assert rows
    assert [row for row in rows if not row.ok] == []


def test_modules_model_and_training_agree_with_the_host(tmp_path):
    done = tiny.osum_npu(
        *("parity", "--backend", "npu", "--level", "modules,model,run", "--dtype", "float32,bfloat16", "--steps", 8),
        *("--out", tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "parity.json").read_text("utf-8"))
    assert report["ok"]
    assert report["facts"]["backend"] == "npu"
    assert {row["level"] for row in report["rows"]} == {"modules", "model", "run"}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The tiny recipe with 50 steps, on the host and on the emulated device, by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny.write_recipe(folder / "recipe.yaml", corpus)
    changes = [*tiny.WITHOUT_CHANCE, "stages.0.steps=20", "stages.1.steps=24", "stages.2.steps=6"]
    for name in ("cpu", "npu"):
        log = folder / f"{name}.calls"
        env = {"OSUM_BACKEND": name, "NPU_EMULATOR_CALL_LOG": str(log)}
        done = tiny.osum_npu("train", recipe, f"out={folder / name}", *changes, env=env)
        assert done.returncode == 0, done.stderr
    return folder


def losses(out):
    return [row.get("loss", row.get("ctc_loss")) for row in read_log(out / "log.jsonl") if "learning_rate" in row]


def test_fifty_losses_are_those_of_the_host(trained):
    host, device = losses(trained / "cpu"), losses(trained / "npu")
    assert len(host) == len(device) == 50
    assert max(abs(a - b) / abs(b) for a, b in zip(device, host)) <= 1e-3


@pytest.mark.emulator_only
def test_the_training_took_the_fused_operators(trained):
    calls = [json.loads(line) for line in (trained / "npu.calls").read_text("utf-8").splitlines()]
    fused = {name for process in calls for name in process["fused"]}
    assert {"npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul"} <= fused


def test_the_trained_model_answers_on_both(trained, corpus, tmp_path):
    said, log = [], tmp_path / "calls"
    for name in ("cpu", "npu"):
        model, out = trained / "npu" / "model", tmp_path / f"{name}.jsonl"
        done = tiny.osum_npu(
            *("infer", "--model", model, "--tasks", "asr,gender", "--out", out, corpus / "dev.jsonl"),
            env={"OSUM_BACKEND": name, "NPU_EMULATOR_CALL_LOG": str(log)},
        )
        assert done.returncode == 0, done.stderr
        said.append([json.loads(line)["results"] for line in out.open(encoding="utf-8")])
    assert said[0] == said[1]
    if "NPU_EMULATOR" not in os.environ:
        return
    fused = {name for line in log.read_text("utf-8").splitlines() for name in json.loads(line)["fused"]}
    assert {"npu_fused_infer_attention_score", "npu_add_rms_norm", "npu_swiglu"} <= fused


def test_two_processes_with_hccl_learn_what_one_learns(trained, corpus, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", corpus)
    env = {"OSUM_BACKEND": "npu", "NPU_EMULATOR_DEVICES": "2"}
    alone = tiny.osum_npu("train", recipe, f"out={tmp_path / 'alone'}", *tiny.WITHOUT_CHANCE, env=env)
    assert alone.returncode == 0, alone.stderr
    done = tiny.torchrun(recipe, f"out={tmp_path / 'two'}", *tiny.WITHOUT_CHANCE, processes=2, env=env)
    assert done.returncode == 0, done.stdout
    pairs = zip(losses(tmp_path / "two"), losses(tmp_path / "alone"), strict=True)
    assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in pairs)
    want, got = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("alone", "two"))
    # AdamW divides by the size of a gradient, so where that is rounding noise the weights differ by more than it.
    assert max(parity.relative_error(got[key], want[key]) for key in want) <= 1e-3


def test_the_device_s_adamw_learns_what_torch_s_learns_and_goes_on(corpus, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", corpus)
    stage = "{name: all, trainable: [encoder, adapter, llm], steps: 8, learning_rate: 3.0e-3, batch_seconds: 12}"
    changes = [*tiny.WITHOUT_CHANCE[:2], "model.lora=null", f"stages=[{stage}]", "checkpoint_every=5"]
    for name, own in (("torch", "false"), ("device", "true")):
        words = ("train", recipe, f"out={tmp_path / name}", *changes, f"device_adamw={own}")
        done = tiny.osum_npu(*words, env={"OSUM_BACKEND": "npu"})
        assert done.returncode == 0, done.stderr
    assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in zip(losses(tmp_path / "device"), losses(tmp_path / "torch")))
    weights = load_file(tmp_path / "device" / "model" / "model.safetensors")
    last = max((tmp_path / "device" / "checkpoints").iterdir())
    for folder in (last, tmp_path / "device" / "model"):
        shutil.rmtree(folder)
    assert tiny.osum_npu(*words, env={"OSUM_BACKEND": "npu"}).returncode == 0
    again = load_file(tmp_path / "device" / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_doctor_finds_the_device():
    done = tiny.osum_npu("doctor", "--json", env={"OSUM_BACKEND": "npu"})
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["device"]["name"] == "npu:0"
    assert {op["provider"] for op in report["ops"]} == {"npu", "reference"}


def test_auto_takes_the_npu():
    env = {name: value for name, value in os.environ.items() if name != "OSUM_BACKEND"}
    done = tiny.osum_npu("doctor", "--json", env={**env, "OSUM_BACKEND": "auto"})
    assert json.loads(done.stdout)["chosen"] == "npu"
