"""Blocks that are computed again for the gradient learn the same."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from osum_npu.data.loader import Position
from osum_npu.data.sources import read_source
from osum_npu.training.build import build
from osum_npu.training.log import read_log
from osum_npu.training.loop import _Run, train
from osum_npu.training.optimizer import freeze

WHISPER = f"model={{kind: whisper, config: {json.dumps(tiny.WHISPER_SIZES)}, dropout: 0.1}}"
PARTS = {"speech llm": "[encoder, ctc, adapter, llm, lora]", "lora alone": "[lora]", "whisper": "[encoder, decoder]"}


@pytest.fixture(autouse=True)
def _one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(params=[*PARTS])
def make(request, corpus, tmp_path):
    def recipe(name, *changes):
        stage = f"{{name: all, trainable: {PARTS[request.param]}, steps: 3, learning_rate: 3e-3, batch_seconds: 6}}"
        model = [WHISPER] if request.param == "whisper" else []
        return tiny.recipe(corpus, tmp_path / name, *model, f"stages=[{stage}]", *changes)

    return recipe


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_with_dropout_learns_the_same(make, precision):
    runs = [
        make(name, f"precision={precision}", *more)
        for name, more in (("a", ()), ("b", ("activation_checkpointing=true",)))
    ]
    folders = [train(run) for run in runs]
    logs = [
        [(row["loss"], row["gradient_norm"]) for row in read_log(f.parent / "log.jsonl") if "gradient_norm" in row]
        for f in folders
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3
    weights = [sorted(path.read_bytes() for path in folder.glob("*.safetensors")) for folder in folders]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("recomputed", [False, True])
def test_blocks_are_computed_twice_or_once(make, recomputed):
    recipe = make("run", f"activation_checkpointing={str(recomputed).lower()}")
    run = _Run(recipe, Path(recipe.out))
    stage = recipe.stages[0]
    freeze(run.model, stage)
    run.model.train()
    seen = []
    wanted = ("encoder.blocks.0.attn", "llm.model.layers.1.self_attn", "decoder.layers.1.encoder_attn")
    names = [name for name in wanted if name in dict(run.model.named_modules())]
    for name in names:
        run.model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    run.step.backward(stage, next(run.feed.steps(stage, Position())).batches, run.meter, False)
    for name in names:
        # nothing below the first trained weight is computed again
        frozen = not any(p.requires_grad for p in run.model.encoder.parameters()) and name.startswith("encoder")
        assert seen.count(name) == (2 if recomputed and not frozen else 1), name
    assert len(names) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", ["adapter, lora", "encoder"])
def test_a_frozen_encoder_keeps_nothing_for_the_backward_pass(trainable, dtype, corpus, tmp_path):
    stage = f"stages=[{{name: one, trainable: [{trainable}], steps: 1, learning_rate: 1e-3}}]"
    recipe = tiny.recipe(corpus, tmp_path / "run", stage, "model.ctc=false")
    model, _ = build(recipe, read_source(corpus / "train.jsonl", 30)[0], dtype)
    freeze(model.train(), recipe.stages[0])
    kept = []
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
            encoded, lengths = model.encoder(torch.randn(2, 90, 80), [90, 70])
        heard, _ = model.adapter(encoded, lengths)
    learns = trainable == "encoder"
    assert encoded.requires_grad == learns
    assert bool(kept) == learns
    assert heard.requires_grad
