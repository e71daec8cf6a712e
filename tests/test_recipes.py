"""Every recipe that is shipped can be read, the words around it are true, and OSUM's run through all their stages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from transformers import WhisperForConditionalGeneration

from osum_npu.checkpoints.model_directory import load_model
from osum_npu.checkpoints.whisper import encoder_state
from osum_npu.config import NewModel, SavedModel, dump_recipe, load_recipe
from osum_npu.evaluation.run import evaluate
from osum_npu.planning.devices import find_device, read_devices
from osum_npu.planning.estimate import How, cut, memory_by_part, trace_step
from osum_npu.planning.sizes import read_sizes
from osum_npu.planning.step import Speech
from osum_npu.tasks import TASKS
from osum_npu.training.log import read_log
from osum_npu.training.loop import train

ROOT = Path(__file__).parents[1]
OSUM = ROOT / "recipes" / "osum"
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
CARDS = {"cards_1": 1, "cards_8": 8, "cards_3x8": 24}
"""Devices that layers over OSUM's stages are for."""
LAYERS = [path for path in FILES if path.parent.name == "tiny" or path.stem in CARDS]
"""Each lies over another recipe."""
RECIPES = [path for path in FILES if path not in LAYERS]


def name(path):
    return path.relative_to(ROOT / "recipes").as_posix()


def layers(path):
    """A recipe, or what a layer lies over and the layer."""
    if path in RECIPES:
        return [path]
    return [OSUM / "stage2.yaml" if path.stem in CARDS else path.parents[1] / path.name, path]


def test_there_are_recipes():
    assert {"quickstart/recipe.yaml", "osum/stage1.yaml", "osum/stage2.yaml"} <= {name(path) for path in RECIPES}
    assert {"osum/tiny/stage1.yaml", "osum/tiny/stage2.yaml"} <= {name(path) for path in LAYERS}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_recipe_parses_and_is_written_as_it_was_read(path, tmp_path):
    recipe = load_recipe(layers(path))
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), "utf-8")
    assert load_recipe([tmp_path / "again.yaml"]) == recipe
    assert recipe.data.train


def goes_on(later, earlier):
    return isinstance(later.model, SavedModel) and later.model.path == f"{earlier.out}/model"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_part_of_a_new_model_learns_in_some_stage_of_it_or_of_what_goes_on(path):
    recipe = load_recipe([path])
    if isinstance(recipe.model, NewModel) and recipe.model.llm.kind == "random":
        later = [other for other in map(load_recipe, ([file] for file in RECIPES)) if goes_on(other, recipe)]
        learned = {part for one in (recipe, *later) for stage in one.stages for part in stage.trainable}
        assert {"encoder", "adapter", "llm"} <= learned
        assert ("ctc" in learned) == recipe.model.ctc
        assert "lora" in learned or recipe.model.lora is None


@pytest.mark.parametrize(("file", "index"), [("stage1", 0), ("stage2", 0), ("stage2", 1)])
def test_osum_learns_as_the_release_does(file, index):
    recipe = load_recipe([OSUM / f"{file}.yaml"])
    stage, devices, accum_grad = recipe.stages[index], 24, 4
    assert (stage.learning_rate, stage.betas, stage.eps, stage.weight_decay) == (5e-5, (0.9, 0.99), 1e-6, 0.01)
    assert (stage.schedule, stage.warmup_steps, stage.clip) == ("inverse_sqrt", 8000, 5)
    assert stage.micro_batch_seconds == 3900 / 100
    assert stage.batch_seconds == devices * accum_grad * stage.micro_batch_seconds
    masks = stage.spec_augment
    assert (masks.time_masks, masks.time_frames, masks.frequency_masks, masks.frequency_bins) == (2, 50, 2, 10)
    assert (masks.substitutions, masks.substitution_frames) == (3, 30)
    assert (recipe.checkpoint_every, recipe.seed, recipe.precision) == (1250, 777, "bfloat16")
    assert (recipe.data.max_seconds, recipe.data.max_answer_tokens, recipe.activation_checkpointing) == (29, 200, True)
    assert set(stage.tasks) == set(TASKS)


def test_osums_second_stage_has_the_published_form():
    recipe = load_recipe([OSUM / "stage2.yaml"])
    encoder, adapter, lora = recipe.model.encoder, recipe.model.adapter, recipe.model.lora
    assert (encoder.width, encoder.layers, encoder.heads, encoder.max_frames) == (1024, 24, 16, 1500)
    assert (adapter.layers, adapter.heads, adapter.feed_forward) == (4, 4, 2560)
    assert (encoder.dropout, adapter.dropout) == (0.1, 0.1)
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 32, 0.1)
    assert set(lora.targets) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    assert {stage.name: stage.trainable for stage in recipe.stages} == {
        "link": ("adapter",),
        "link_and_encoder_and_lora": ("encoder", "adapter", "lora"),
    }


@pytest.mark.parametrize("file", ["stage1", "stage2"])
@pytest.mark.parametrize("cards", CARDS)
def test_a_step_of_osum_is_the_same_on_any_number_of_devices(cards, file):
    alone = load_recipe([OSUM / f"{file}.yaml"])
    recipe = load_recipe([OSUM / f"{file}.yaml", OSUM / f"{cards}.yaml"])
    assert (recipe.stages, recipe.model, recipe.data) == (alone.stages, alone.model, alone.data)
    for stage in recipe.stages:
        assert (stage.batch_seconds / CARDS[cards] / stage.micro_batch_seconds).is_integer()


@pytest.mark.slow(reason="traces of a step with 8 billion parameters take a minute")
@pytest.mark.parametrize("cards", CARDS)
def test_osum_fits_its_devices(cards):
    recipe, (name, device) = load_recipe(layers(OSUM / f"{cards}.yaml")), find_device("910B", read_devices())
    how = How.of(recipe, CARDS[cards], Speech())
    for stage in recipe.stages:
        count, _ = cut(stage, how)
        traced = trace_step(read_sizes(recipe), stage, torch.bfloat16, device, how, count, 1)
        memory = sum(memory_by_part(traced, device, how, torch.bfloat16).values())
        assert memory < 0.8 * device.memory, f"{stage.name} on {CARDS[cards]} × {name}"


def test_osum_runs_through_all_stages_in_small(corpus, tmp_path):
    """The recipes with their tiny layers, two steps a stage; stage 2 begins with what stage 1 learned."""
    places = [f"data.{part}.all.path={corpus / part}.jsonl" for part in ("train", "dev")]

    def run(file, *changes):
        few = ("steps=2", "batch_seconds=24", "micro_batch_seconds=12")
        steps = [f"stages.{i}.{change}" for i in range(1 if file == "stage1" else 2) for change in few]
        layers = [OSUM / f"{file}.yaml", OSUM / "tiny" / f"{file}.yaml"]
        return train(load_recipe(layers, [*places, *steps, *changes, f"out={tmp_path / file}", "data.workers=0"]))

    with tiny.one_thread():
        first = run("stage1")
        second = run("stage2", f"model.encoder_weights={first}")
    measured = [row["stage"] for row in read_log(tmp_path / "stage2" / "log.jsonl") if "dev_loss" in row]
    assert measured == ["link", "link_and_encoder_and_lora"]
    learned = encoder_state(WhisperForConditionalGeneration.from_pretrained(first).state_dict())
    encoder = load_model(second)[0].encoder.state_dict()
    moved = max(float((tensor - encoder[key]).abs().max()) for key, tensor in learned.items())
    assert 0 < moved < 1e-6, "two steps of a warm-up of 8000 to a rate of 5e-5"
    report = evaluate(second, [corpus / "dev.jsonl"], [TASKS["gender"]], tmp_path / "report", limit=2)
    assert report.scores["gender"]["n"] == 2


@pytest.mark.slow  # four processes import torch
def test_the_script_of_osum_goes_from_whisper_to_a_score(corpus, tmp_path):
    words = "stages.0.steps=1 stages.0.batch_seconds=24 data.workers=0"
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STAGE1": f"{OSUM}/tiny/stage1.yaml {words}",
        "STAGE2": f"{OSUM}/tiny/stage2.yaml {words} stages.1.steps=1 stages.1.batch_seconds=24",
        "OSUM_BACKEND": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    data = [str(corpus / f"{part}.jsonl") for part in ("train", "dev", "dev")]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "osum-npu").write_text(f'#!/bin/sh\nexec {sys.executable} -m osum_npu "$@"\n')
    (tmp_path / "bin" / "osum-npu").chmod(0o755)
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    done = subprocess.run([OSUM / "run.sh", *data, tmp_path / "run"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report" / "report.json").exists()


def test_every_file_and_stage_of_osum_is_told():
    told = (OSUM / "README.md").read_text("utf-8")
    files = [path.relative_to(OSUM).as_posix() for path in OSUM.rglob("*.*") if path.name != "README.md"]
    assert [file for file in files if f"[{file}]({file})" not in told] == []
    stages = yaml.safe_load((OSUM / "stage2.yaml").read_text("utf-8"))["stages"]
    assert [stage["name"] for stage in stages if f"`fire_module: {stage['name']}`" not in told] == []
