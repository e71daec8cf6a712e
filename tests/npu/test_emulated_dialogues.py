"""OSUM-Pangu's dialogues on the emulated device: recorded numbers, trainings with and without sound, answers."""

from dataclasses import replace

import pytest
import replay
import tiny
import torch
from safetensors.torch import load_file

from osum_npu import backend, parity
from osum_npu.checkpoints.model_directory import load_model
from osum_npu.data.manifest import read_manifest
from osum_npu.inference.decoding import DECODINGS
from osum_npu.inference.engine import Engine
from osum_npu.tasks import get_task
from osum_npu.training.log import read_log

pytestmark = pytest.mark.emulated_npu

RECORDING = replay.Recording("osum_pangu.json")
ALIKE = [
    name for name in RECORDING.forward if "speech_embeds" not in RECORDING.cases[name]["tensors"] or "single" in name
]
"""Cases without the original's habit: batches of text alone, and single recordings."""


@pytest.fixture(scope="module")
def device():
    return backend.load("npu").activate()


@pytest.fixture(scope="module")
def model(device, tmp_path_factory):
    return RECORDING.load(tmp_path_factory.mktemp("pangu"), merge=False).to(device)


@torch.no_grad()
@pytest.mark.parametrize("name", ALIKE)
def test_recorded_logits_and_losses(name, model, device):
    case = RECORDING.cases[name]
    features, frames = RECORDING.hear(case["batch"])
    before, about, after = RECORDING.asked(case, case["batch"])
    answers = [[*RECORDING.ids(one["label"]), RECORDING.golden["config"]["eos_token_id"]] for one in case["batch"]]
    layout = model.layout(frames, before, answers, about, after).to(device)
    speech, _ = model.hear(features.to(device), frames)
    embeds = model.embed(speech, layout)
    assert embeds.device.type == "npu"
    record = case["tensors"]["inputs_embeds"]
    assert replay.misses(record, embeds.cpu()[layout.mask_BL.cpu()], replay.TENSORS) == {}
    output = model(features.to(device), frames, layout)
    assert output.loss_sum.item() / output.label_count == pytest.approx(float(case["loss"]), rel=replay.LOSS)


@torch.no_grad()
@pytest.mark.parametrize("name", RECORDING.generate)
def test_recorded_answers_in_one_batch(name, model, device):
    case = RECORDING.cases[name]
    features, frames = RECORDING.hear(case["outputs"])
    before, about, after = RECORDING.asked(case, case["outputs"])
    speech, lengths = model.hear(features.to(device), frames)
    said = model.respond(speech, lengths, before, about, after, **case["settings"])
    assert said.tolist() == [one["ids"] for one in case["outputs"]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (name, count) in enumerate((("train", 24), ("dev", 4))):
        tiny.write_corpus(folder / f"{name}_sound.jsonl", count, seed)
        tiny.write_dialogues(folder / f"{name}.jsonl", folder / f"{name}_sound.jsonl", seed)
    return folder


def losses(out):
    return [row["loss"] for row in read_log(out / "log.jsonl") if "learning_rate" in row]


STAGE = (
    "{name: all, trainable: [encoder, adapter, lora], steps: 8, learning_rate: 3e-3, batch_seconds: 5,"
    " micro_batch_seconds: 2.5, tasks: {asr: 1, chat_think: 1, text2text: 1, intent: 1}}"
)
CHANGES = [*tiny.WITHOUT_CHANCE[:3], "model.form=osum_pangu", "model.ctc=false", f"stages=[{STAGE}]"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny.write_recipe(folder / "recipe.yaml", corpus)
    for name in ("cpu", "npu"):
        done = tiny.osum_npu("train", recipe, f"out={folder / name}", *CHANGES, env={"OSUM_BACKEND": name})
        assert done.returncode == 0, done.stderr
    return folder


def test_losses_are_those_of_the_host(trained):
    pairs = zip(losses(trained / "npu"), losses(trained / "cpu"), strict=True)
    assert all(abs(a - b) <= 1e-3 * abs(b) for a, b in pairs)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_learn_what_one_learns(sharding, trained, corpus, tmp_path):
    """Some shares are text alone."""
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", corpus)
    env = {"OSUM_BACKEND": "npu", "NPU_EMULATOR_DEVICES": "2"}
    changes = (f"out={tmp_path / 'two'}", f"sharding={sharding}", *CHANGES)
    done = tiny.torchrun(recipe, *changes, processes=2, env=env)
    assert done.returncode == 0, done.stdout
    pairs = zip(losses(tmp_path / "two"), losses(trained / "npu"), strict=True)
    assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in pairs)
    want, got = (load_file(run / "model" / "adapter_model.safetensors") for run in (trained / "npu", tmp_path / "two"))
    assert max(parity.relative_error(got[key], want[key]) for key in want) <= 1e-3


def test_recordings_and_texts_are_answered_alike(trained, corpus, device):
    """In float32: by a model that has hardly learned, the likeliest tokens are too close for less."""
    rows, said = list(read_manifest(corpus / "dev.jsonl").utterances), []
    for place in (torch.device("cpu"), device):
        model, tokenizer = load_model(trained / "npu" / "model")
        decoding = replace(DECODINGS["osum-pangu"], max_new_tokens=12)
        engine = Engine(model, tokenizer, place, decoding=decoding)
        said.append([result.answers for result in engine.answer(rows, [get_task("asr"), get_task("intent")])])
    assert said[0] == said[1]
    assert {tuple(answers) for answers in said[0]} == {("asr",), ("intent",)}
