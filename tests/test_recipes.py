"""Every recipe that is shipped can be read and is told truly; those of OSUM and OSUM-Pangu run through all stages."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from transformers import WhisperForConditionalGeneration

from osum_npu.checkpoints.model_directory import load_model
from osum_npu.checkpoints.whisper import encoder_state
from osum_npu.config import NewModel, SavedModel, dump_recipe, load_recipe
from osum_npu.data.intents import write_intents
from osum_npu.data.manifest import read_manifest, write_manifest
from osum_npu.evaluation.run import evaluate
from osum_npu.planning.devices import find_device, read_devices
from osum_npu.planning.estimate import How, cut, memory_by_part, trace_step
from osum_npu.planning.sizes import read_sizes
from osum_npu.planning.step import Speech
from osum_npu.tasks import TASKS, get_task, read_prompts
from osum_npu.tasks.form import get_form
from osum_npu.training.log import read_log
from osum_npu.training.loop import train

ROOT = Path(__file__).parents[1]
OSUM, PANGU = ROOT / "recipes" / "osum", ROOT / "recipes" / "osum_pangu"
TAGS = PANGU / "tags.yaml"
"""Wordings, no recipe."""
FILES = sorted({*(ROOT / "recipes").rglob("*.yaml")} - {TAGS})
LABELLED = [task for task in TASKS.values() if task.labels]
CARDS = {"cards_1": 1, "cards_8": 8, "cards_3x8": 24}
"""Devices that layers over the stages of OSUM and OSUM-Pangu are for."""
LAST = {OSUM: "stage2.yaml", PANGU: "stage3.yaml"}
LAYERS = [path for path in FILES if path.parent.name == "tiny" or path.stem in CARDS]
"""Each lies over another recipe."""
RECIPES = [path for path in FILES if path not in LAYERS]


def name(path):
    return path.relative_to(ROOT / "recipes").as_posix()


def layers(path):
    """A recipe, or what a layer lies over and the layer."""
    if path in RECIPES:
        return [path]
    return [path.parent / LAST[path.parent] if path.stem in CARDS else path.parents[1] / path.name, path]


def every_file_is_told(folder):
    """But for those of folders with a README.md of their own."""
    told = (folder / "README.md").read_text("utf-8")
    own = {path.parent for path in folder.rglob("README.md")} - {folder}
    paths = [path for path in folder.rglob("*.*") if path.name != "README.md" and not own & {*path.parents}]
    files = [path.relative_to(folder).as_posix() for path in paths if "__pycache__" not in path.parts]
    assert [file for file in files if f"[{file}]({file})" not in told] == []


def test_there_are_recipes():
    assert {"quickstart/recipe.yaml", "osum/stage1.yaml", "osum/stage2.yaml"} <= {name(path) for path in RECIPES}
    assert {"osum/tiny/stage1.yaml", "osum/tiny/stage2.yaml"} <= {name(path) for path in LAYERS}
    stages = [f"stage{number}.yaml" for number in (1, 2, 3)]
    assert {f"osum_pangu/{file}" for file in stages} <= {name(path) for path in RECIPES}
    assert {"osum_pangu/cards_8.yaml", *(f"osum_pangu/tiny/{file}" for file in stages)} <= {
        name(path) for path in LAYERS
    }


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


ONE_STEP = "stages.0.steps=1 stages.0.batch_seconds=24 data.workers=0"


def run_script(script, tmp_path, *arguments, **words):
    """Run a recipe's script, one process for each verb."""
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OSUM_BACKEND": "cpu", "OMP_NUM_THREADS": "1", **words}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "osum-npu").write_text(f'#!/bin/sh\nexec {sys.executable} -m osum_npu "$@"\n')
    (tmp_path / "bin" / "osum-npu").chmod(0o755)
    done = subprocess.run([script, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_stages(folder, corpus, tmp_path, **words):
    """Run a folder's run.sh on tones; return the folder that it wrote."""
    data = [corpus / f"{part}.jsonl" for part in ("train", "dev", "dev")]
    run_script(folder / "run.sh", tmp_path, *data, tmp_path / "run", **words)
    return tmp_path / "run"


@pytest.mark.slow  # four processes import torch
def test_the_script_of_osum_goes_from_whisper_to_a_score(corpus, tmp_path):
    out = run_stages(
        OSUM,
        corpus,
        tmp_path,
        STAGE1=f"{OSUM}/tiny/stage1.yaml {ONE_STEP}",
        STAGE2=f"{OSUM}/tiny/stage2.yaml {ONE_STEP} stages.1.steps=1 stages.1.batch_seconds=24",
    )
    assert (out / "report" / "report.json").exists()


def test_every_file_and_stage_of_osum_is_told():
    every_file_is_told(OSUM)
    told = (OSUM / "README.md").read_text("utf-8")
    stages = yaml.safe_load((OSUM / "stage2.yaml").read_text("utf-8"))["stages"]
    assert [stage["name"] for stage in stages if f"`fire_module: {stage['name']}`" not in told] == []


PANGU_STAGES = ("stage1", "stage2", "stage3")


def pangu(file, *over):
    return load_recipe([PANGU / f"{file}.yaml", *(PANGU / f"{layer}.yaml" for layer in over)])


@pytest.mark.parametrize("file", PANGU_STAGES)
def test_osum_pangu_learns_as_the_release_does(file):
    recipe = pangu(file)
    (stage,) = recipe.stages
    assert (stage.learning_rate, stage.schedule, stage.warmup_steps) == (5e-4, "inverse_sqrt", 2000)
    assert (stage.betas, stage.eps, stage.weight_decay, stage.clip) == ((0.9, 0.99), 1e-6, 0.01, 5)
    assert (recipe.checkpoint_every, recipe.seed, recipe.precision) == (2500, 777, "bfloat16")
    assert recipe.data.max_seconds == 4000 / 100
    with_cards = pangu(file, "cards_8")
    assert (with_cards.stages, with_cards.model, with_cards.data) == (recipe.stages, recipe.model, recipe.data)
    accum_grad = 4
    assert stage.batch_seconds == 8 * accum_grad * stage.micro_batch_seconds


def test_osum_pangus_model_has_the_published_form():
    first, second, third = map(pangu, PANGU_STAGES)
    encoder, adapter, lora = first.model.encoder, first.model.adapter, second.model.lora
    assert (encoder.width, encoder.layers, encoder.heads, encoder.max_frames) == (1024, 24, 16, 30000)
    assert (adapter.layers, adapter.heads, adapter.feed_forward) == (4, 4, 2560)
    assert (first.model.lora, lora.rank, lora.alpha, lora.dropout) == (None, 64, 32, 0.1)
    assert set(lora.targets) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    assert get_form(first.model.form) == get_form("osum_pangu")
    assert goes_on(second, first)
    assert goes_on(third, second)
    assert [recipe.stages[0].trainable for recipe in (first, second, third)] == [
        ("adapter",),
        ("lora",),
        ("encoder", "adapter", "lora"),
    ]


def test_osum_pangus_first_stage_asks_by_tags_alone():
    recipe = pangu("stage1")
    wordings, ignored = read_prompts(ROOT / recipe.prompts)
    assert (ROOT / recipe.prompts, ignored) == (TAGS, "")
    shown = get_form(recipe.model.form).prompt
    for task in map(get_task, recipe.stages[0].tasks):
        assert task.hears
        assert task.kind not in shown or wordings[task.name] == (task.tag,)


def test_osum_pangus_second_stage_is_about_text_and_its_third_about_all():
    first, second, third = map(pangu, PANGU_STAGES)
    assert set(second.stages[0].tasks) == {"intent"}
    assert set(third.stages[0].tasks) == {*first.stages[0].tasks, "intent", "text2text"}
    assert set(TASKS) <= set(first.stages[0].tasks)
    sources = third.data.train
    assert {name: sources[name] for name in first.data.train} == first.data.train
    assert 0 < third.stages[0].natural < 1


def model_to_plan():
    """The model of stage 1 with the LoRA of stage 2: what there will be once both are trained."""
    return replace(pangu("stage1").model, lora=pangu("stage2").model.lora)


def test_osum_pangu_is_planned_with_the_model_that_it_will_have():
    told = (PANGU / "README.md").read_text("utf-8")
    (line,) = [line for line in told.splitlines() if line.startswith("model=")]
    (override,) = shlex.split(line.removeprefix("model="))
    planned, wanted = load_recipe([PANGU / "stage3.yaml"], [override]).model, model_to_plan()
    for part in ("encoder", "adapter", "llm", "lora"):
        assert getattr(planned, part) == getattr(wanted, part), part


@pytest.mark.slow(reason="traces of steps with 8 billion parameters take a minute")
@pytest.mark.parametrize("file", PANGU_STAGES)
def test_osum_pangu_fits_its_devices(file):
    recipe, (name, device) = pangu(file, "cards_8"), find_device("910B", read_devices())
    recipe = recipe if file == "stage1" else replace(recipe, model=model_to_plan())
    how = How.of(recipe, 8, Speech(prompt_tokens=80))
    count, _ = cut(recipe.stages[0], how)
    traced = trace_step(read_sizes(recipe), recipe.stages[0], torch.bfloat16, device, how, count, 1)
    memory = sum(memory_by_part(traced, device, how, torch.bfloat16).values())
    assert memory < 0.8 * device.memory, f"{file} on 8 × {name}"


def test_osum_pangu_runs_through_all_stages_in_small(corpus, tmp_path):
    """The recipes with their tiny layers, two steps a stage; each begins with what the one before learned."""
    asked = [TASKS["asr"], TASKS["gender"]]
    write_intents(tmp_path, {"train": 40, "dev": 8, "test": 4}, asked, 0)

    def run(file, recordings, *changes):
        places = {"all": corpus / "{}.jsonl"} if file == "stage1" else {"intents": tmp_path / "{}.jsonl"}
        places |= {"recordings": corpus / "{}.jsonl"} if recordings else {}
        sources = []
        for part in ("train", "dev"):
            paths = ", ".join(f"{name}: {{path: '{str(path).format(part)}'}}" for name, path in places.items())
            sources.append(f"data.{part}={{{paths}}}")
        few = [f"stages.0.{change}" for change in ("steps=2", "batch_seconds=24", "micro_batch_seconds=12")]
        tiny_layers = [PANGU / f"{file}.yaml", PANGU / "tiny" / f"{file}.yaml"]
        recipe = load_recipe(tiny_layers, [*sources, *few, *changes, f"out={tmp_path / file}", "data.workers=0"])
        return train(recipe)

    with tiny.one_thread():
        first = run("stage1", False, f"prompts={TAGS}")
        second = run("stage2", False, f"model.path={first}")
        third = run("stage3", True, f"model.path={second}")
    states = [load_model(folder)[0].state_dict() for folder in (first, second, third)]

    def moved(before, after):
        """Parts in which a tensor differs; names without LoRA have it nowhere."""
        plain = {key.replace(".base_layer", ""): tensor for key, tensor in before.items()}
        parts = {key: "lora" if ".lora_" in key else key.split(".")[0] for key in after}
        known = {key: plain.get(key.replace(".base_layer", "")) for key in after}
        return {parts[key] for key in after if known[key] is None or not torch.equal(known[key], after[key])}

    assert moved(states[0], states[1]) == {"lora"}
    assert any(tensor.any() for key, tensor in states[1].items() if ".lora_B" in key), "LoRA has learned"
    assert moved(states[1], states[2]) == {"encoder", "adapter", "marks", "lora"}
    data = [corpus / "dev.jsonl", tmp_path / "test.jsonl"]
    tasks = [get_task("gender"), get_task("intent")]
    with tiny.one_thread():
        report = evaluate(third, data, tasks, tmp_path / "report", limit=2, natural=True)
    assert {name: scores["n"] for name, scores in report.scores.items()} == {"gender": 2, "intent": 2}
    assert {wording: found["all"]["n"] for wording, found in report.instructions["following"].items()} == {
        "fixed": 2,
        "natural": 2,
    }


@pytest.mark.slow  # nine processes import torch
def test_the_script_of_osum_pangu_goes_from_instructions_to_a_comparison(corpus, tmp_path):
    stages = {f"STAGE{n}": f"{PANGU}/tiny/stage{n}.yaml {ONE_STEP}" for n in (1, 2, 3)}
    words = {"INTENTS": "--train 40 --dev 8 --test 8", "EVAL": "--limit 2 --tasks asr,gender,intent"}
    out = run_stages(PANGU, corpus, tmp_path, **stages, **words)
    for report in ("report_stage1", "report_stage2", "report"):
        found = json.loads((out / report / "report.json").read_text("utf-8"))["instructions"]
        assert set(found["following"]) == {"fixed", "natural"}
        assert set(found["differences"]) >= {"gender"}


@pytest.mark.slow  # ten processes import torch
def test_the_script_of_osum_pangu_in_small_scores_every_stage(corpus, tmp_path):
    """As it is, in a copy whose stages have one step, on tones."""
    shutil.copytree(PANGU, tmp_path / "recipes" / "osum_pangu")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    small = tmp_path / "recipes" / "osum_pangu" / "small"
    for path in small.glob("*.yaml"):
        few = re.sub(r"\bsteps: \d+", "steps: 1", path.read_text("utf-8"))
        few = re.sub(r"warmup_steps: \d+", "warmup_steps: 0", few)
        path.write_text(re.sub(r"batch_seconds: \d+", "batch_seconds: 24", few), "utf-8")
    out = tmp_path / "runs" / "osum_pangu_small"
    for part, rows in (("train", "train"), ("dev", "dev"), ("test", "dev")):
        write_manifest(out / "corpus" / f"{part}.jsonl", read_manifest(corpus / f"{rows}.jsonl").utterances)
    write_intents(out / "intents", {"train": 40, "dev": 8, "test": 8}, [TASKS["asr"], TASKS["gender"]], 0)
    run_script(small / "run.sh", tmp_path, corpus)
    for report in ("report_understand", "report_intents", "report_follow_without_stage2", "report"):
        found = json.loads((out / report / "report.json").read_text("utf-8"))["instructions"]
        asked = {wording: set(rates["tasks"]) for wording, rates in found["following"].items()}
        assert asked["fixed"] == asked["natural"] == {"asr", "timestamps", *(task.name for task in LABELLED)}
    page = (out / "report" / "report.html").read_text("utf-8")
    assert all(stage in page for stage in ("understand", "intents", "follow_without_stage2", "this model"))
    for report in ("report_intent", "report_free", "report_recordings"):
        assert (out / report / "report.json").exists()


def test_every_file_and_stage_of_osum_pangu_is_told():
    every_file_is_told(PANGU)
    told = (PANGU / "README.md").read_text("utf-8")
    for recipe in map(pangu, PANGU_STAGES):
        assert f"`{recipe.stages[0].name}`" in told
        assert [name for name in recipe.data.train if f"`{name}`" not in told] == []
