"""In which dtype weights are held, how they come into memory, and that neither changes a number."""

import json
from pathlib import Path

import pytest
import tiny
import together
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from osum_npu.checkpoints.model_directory import load_model
from osum_npu.models.llm import build_llm
from osum_npu.models.lora import is_lora
from osum_npu.training import build as building
from osum_npu.training.held import hold
from osum_npu.training.interrupt import Interrupted
from osum_npu.training.log import read_log
from osum_npu.training.loop import train

SIZES = {
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
STAGES = (
    "stages=[{name: link, trainable: [adapter], steps: 2, learning_rate: 1e-3, batch_seconds: 12},"
    " {name: tune, trainable: [encoder, lora], steps: 3, learning_rate: 1e-3, batch_seconds: 12}]"
)


def write_llm(folder, dtype=torch.float32, **sizes):
    """Write an LLM as it is released, of random numbers that bfloat16 would round, norms too."""
    torch.manual_seed(0)
    llm = build_llm({**SIZES, **sizes})
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    llm.to(dtype).save_pretrained(folder, max_shard_size="20MB")
    characters = {chr(i): i for i in range(32, 127)}
    units = Tokenizer(models.BPE(vocab={**characters, "<unk>": 127}, merges=[], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=units, eos_token="~", pad_token="~").save_pretrained(folder)
    return folder


def recipe(corpus, out, folder, *changes):
    llm = f"model.llm={{kind: pretrained, path: {folder}}}"
    still = [change for change in tiny.WITHOUT_CHANCE if "spec_augment" not in change]
    return tiny.recipe(corpus, out, llm, "model.ctc=false", STAGES, "precision=bfloat16", *still, *changes)


def numbers(out):
    names = ("loss", "gradient_norm", "dev_loss")
    return [{name: row[name] for name in names if name in row} for row in read_log(out / "log.jsonl")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def trained(corpus, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("held") / "run"
    with tiny.one_thread():
        train(recipe(corpus, out, folder))
    return out


def test_a_frozen_llm_in_bfloat16_gives_the_numbers_of_one_in_float32(trained, corpus, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "hold", lambda model, _: hold(model, torch.float32))
    with tiny.one_thread():
        train(recipe(corpus, tmp_path / "run", folder))
    assert numbers(trained) == numbers(tmp_path / "run")
    for file in ("model.safetensors", "adapter_model.safetensors"):
        narrow, wide = (load_file(out / "model" / file) for out in (trained, tmp_path / "run"))
        assert narrow.keys() == wide.keys()
        assert all(torch.equal(narrow[name], wide[name]) for name in wide)


def test_matrices_of_a_frozen_llm_are_held_in_the_dtype_of_the_computation(corpus, folder, tmp_path):
    held, _ = building.build(recipe(corpus, tmp_path / "run", folder), [], torch.bfloat16)
    narrow = {name for name, p in held.named_parameters() if p.dtype is torch.bfloat16}
    assert {p.dtype for p in held.parameters()} == {torch.bfloat16, torch.float32}
    matrices = {name for name, p in held.named_parameters() if name.startswith("llm.") and p.ndim == 2}
    assert narrow == {name for name in matrices if not is_lora(name)}
    wide, _ = building.build(recipe(corpus, tmp_path / "run", folder, "stages.1.trainable=[llm]"), [], torch.bfloat16)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    file = load_file(folder / "model.safetensors")
    assert torch.equal(wide.llm.lm_head.weight, file["lm_head.weight"])
    assert torch.equal(held.llm.lm_head.weight, file["lm_head.weight"].bfloat16())
    assert torch.equal(held.llm.model.norm.weight, file["model.norm.weight"])
    rotary = [llm.model.rotary_emb.inv_freq for llm in (held.llm, wide.llm, build_llm(SIZES))]
    assert all(x.dtype is torch.float32 and torch.equal(x, rotary[2]) for x in rotary)


def test_what_learns_is_written_in_float32_and_the_rest_by_reference(trained, folder):
    assert json.loads((trained / "model" / "config.json").read_text("utf-8"))["llm_path"] == str(folder)
    files = [load_file(trained / "model" / name) for name in ("model.safetensors", "adapter_model.safetensors")]
    assert {tensor.dtype for file in files for tensor in file.values()} == {torch.float32}
    assert not [name for name in files[0] if name.startswith("llm.")]
    loaded, stored = load_model(trained / "model")[0], load_file(folder / "model.safetensors")
    assert torch.equal(loaded.llm.lm_head.weight, stored["lm_head.weight"])


def test_a_run_with_a_held_llm_goes_on(trained, corpus, folder, tmp_path):
    with tiny.one_thread():
        for limit in (0, 0, None):
            try:
                train(recipe(corpus, tmp_path / "run", folder), time_limit=limit)
            except Interrupted:
                continue
    assert numbers(tmp_path / "run") == numbers(trained)


def test_a_held_llm_is_sharded_with_the_rest(trained, corpus, folder, tmp_path):
    recipe(corpus, tmp_path / "run", folder)
    still = [change for change in tiny.WITHOUT_CHANCE if "spec_augment" not in change]
    words = [f"model.llm={{kind: pretrained, path: {folder}}}", "model.ctc=false", STAGES, "precision=bfloat16", *still]
    together.train(tmp_path / "run.yaml", f"out={tmp_path / 'run'}", *words, "sharding=full", processes=2)
    for one, other in zip(numbers(trained), numbers(tmp_path / "run"), strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=2e-3)
    written = load_file(tmp_path / "run/model/adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}


MEASURE = """
import sys
from pathlib import Path

import torch

from osum_npu.config import load_recipe
from osum_npu.training.build import build
import peft
import transformers.models.qwen2.modeling_qwen2

def resident(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))

recipe = load_recipe(sys.argv[1:2], sys.argv[3:])
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model, _ = build(recipe, [], getattr(torch, sys.argv[2]))
held = sum(p.nbytes for p in model.parameters())
print(held, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux tells it")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_released_llm_is_in_memory_once(dtype, corpus, tmp_path):
    """Its files are mapped where they have the dtype that it is held in; kernels of the first product take 30 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14 if dtype == "bfloat16" else 7}
    folder = write_llm(tmp_path / "llm", getattr(torch, dtype), **sizes)
    path = tiny.write_recipe(tmp_path / "recipe.yaml", corpus)
    words = [f"model.llm={{kind: pretrained, path: {folder}}}", "model.ctc=false", STAGES]
    done = tiny.python("-c", MEASURE, path, dtype, *words)
    assert done.returncode == 0, done.stderr
    held, peak = map(int, done.stdout.split())
    assert held > 80e6
    assert peak < 1.1 * held + 5e7, f"held {held / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB"
