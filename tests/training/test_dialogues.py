"""Trainings on rows with sound and rows about text alone, in the form of OSUM-Pangu, in one process and in two."""

import json
import random
import re
import shutil
import string

import pytest
import tiny
import together
import torch
from safetensors.torch import load_file

from osum_npu.cli.main import main
from osum_npu.config import load_recipe
from osum_npu.data.loader import Position
from osum_npu.data.plan import WeightedSource, plan_epoch, share
from osum_npu.data.sources import read_source
from osum_npu.inference.engine import Engine
from osum_npu.parity import relative_error
from osum_npu.tasks import Utterance, get_task
from osum_npu.tasks.form import get_form
from osum_npu.training.build import build
from osum_npu.training.log import read_log
from osum_npu.training.loop import _Run, train

SLOW = "several trainings in two processes"
TASKS = {"asr": 1, "age": 1, "chat": 1, "chat_think": 3, "text2text": 1, "intent": 1}
STEPS, SECONDS, MICRO = 12, 5.0, 2.5


@pytest.fixture(scope="module")
def dialogues(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogues")
    for seed, name in enumerate(("train.jsonl", "dev.jsonl")):
        tiny.write_dialogues(folder / name, corpus / name, seed)
    return folder


def changes(folder, *more):
    tasks = ", ".join(f"{name}: {weight}" for name, weight in TASKS.items())
    stage = (
        f"{{name: all, trainable: [encoder, ctc, adapter, lora], steps: {STEPS}, learning_rate: 3e-3, ctc_weight: 0.3,"
        f" batch_seconds: {SECONDS}, micro_batch_seconds: {MICRO}, spec_augment: {{time_frames: 10}},"
        f" tasks: {{{tasks}}}}}"
    )
    return [
        *tiny.WITHOUT_CHANCE[:3],
        "model.form=osum_pangu",
        "model.llm.vocabulary=900",
        "dev_every=6",
        f"data.train.tones={{path: {folder / 'train.jsonl'}}}",
        f"data.dev.tones.path={folder / 'dev.jsonl'}",
        f"stages=[{stage}]",
        *more,
    ]


@pytest.fixture(scope="module")
def alone(dialogues, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    with tiny.one_thread():
        train(tiny.recipe(corpus, out, *changes(dialogues)))
    return out


def losses(out):
    return [row["loss"] for row in read_log(out / "log.jsonl") if "learning_rate" in row]


def weights(out):
    files = ("model.safetensors", "adapter_model.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(out / "model" / file).items()}


def test_the_plan_has_steps_of_all_kinds(dialogues):
    """Sound beside text, text alone, and shares of text alone beside shares with sound."""
    (source,) = [WeightedSource(read_source(dialogues / "train.jsonl", 3.0)[0])]
    plan = plan_epoch([source], TASKS, batch_seconds=SECONDS, seed=0, epoch=0)

    def heard(examples):
        return [example.utterance.wav is not None for example in examples]

    assert any(set(heard(step)) == {True, False} for step in plan)
    shares = [[any(heard(share(step, rank, 2))) for rank in range(2)] for step in plan]
    assert any(len(set(pair)) == 2 for pair in shares)
    assert any(not any(heard(step)) for step in plan)
    assert all(example.utterance.seconds <= 3.0 for step in plan for example in step)


def test_losses_fall_and_are_told_by_task(alone):
    rows = [row for row in read_log(alone / "log.jsonl") if "dev_loss" in row]
    assert len(rows) == STEPS / 6
    assert rows[-1]["dev_loss"] < rows[0]["dev_loss"]
    for row in rows:
        assert {f"dev_loss/{name}" for name in ("intent", "text2text")} <= row.keys()


def test_batches_hold_the_form_and_answers_with_prefix(dialogues, corpus, tmp_path):
    recipe = tiny.recipe(corpus, tmp_path / "run", *changes(dialogues))
    run = _Run(recipe, tmp_path / "run")
    feed, said = run.feed.steps(recipe.stages[0], Position()), {}
    for _ in range(4 * STEPS):
        for batch in next(feed).batches:
            asked = [(e, task) for e in batch.examples for task in e.tasks]
            for (example, task), before, after, answer, about in zip(
                asked, batch.prompts, batch.after, batch.answers, batch.about, strict=True
            ):
                form = run.feed.form
                text = run.tokenizer.decode(before).replace(" ", "")
                assert text.startswith(form.before[task.kind].replace(" ", ""))
                own = (example.utterance.prompt or "").replace(" ", "")
                assert (bool(own) and text.endswith(own)) == (not task.hears)
                assert run.tokenizer.decode(after).replace(" ", "") == form.after
                assert (about is None) == (example.utterance.wav is None) == (not task.hears)
                said.setdefault(task.name, []).append((example.utterance, run.tokenizer.decode(answer[:-1])))
            sounds = [place for place in batch.about if place is not None]
            assert sounds == list(range(len(batch.samples)))
    assert said.keys() == TASKS.keys()
    for utterance, text in said["chat_think"]:
        wanted = f"<chat><think>{utterance.thought}<think end>{utterance.reply}"
        assert text.replace(" ", "") == wanted.replace(" ", "")
    for utterance, text in said["intent"]:
        assert text.replace(" ", "") == get_task(utterance.intent).prefix
    for utterance, text in said["text2text"]:
        assert text.replace(" ", "") == utterance.reply.replace(" ", "")


@pytest.mark.parametrize("sharding", ["none", "full", pytest.param("hybrid", marks=pytest.mark.slow(reason=SLOW))])
def test_two_processes_learn_what_one_learns(sharding, alone, dialogues, corpus, tmp_path):
    recipe, out = tiny.write_recipe(tmp_path / "recipe.yaml", corpus), tmp_path / "run"
    together.train(recipe, f"out={out}", *changes(dialogues, f"sharding={sharding}"), processes=2)
    assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(losses(alone), losses(out), strict=True))
    want, got = weights(alone), weights(out)
    assert want.keys() == got.keys()
    # AdamW divides by the size of a gradient, so where that is rounding noise the weights differ by more than it.
    assert max(relative_error(got[key], want[key]) for key in want) <= 1e-3


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_stage_of_text_alone_moves_nothing_that_hears(sharding, dialogues, corpus, tmp_path):
    stage = "{name: text, trainable: [encoder, adapter, lora], steps: 3, learning_rate: 3e-3, batch_seconds: 12,"
    stage += " tasks: {intent: 1, text2text: 1}, weight_decay: 0.1}"
    recipe, out = tiny.write_recipe(tmp_path / "recipe.yaml", corpus), tmp_path / "run"
    more = [*changes(dialogues)[:-1], "model.ctc=false", f"stages=[{stage}]", f"sharding={sharding}"]
    together.train(recipe, f"out={out}", *more, processes=2)
    torch.manual_seed(0)
    begun = load_recipe([recipe], [f"out={out}", *more])
    with tiny.one_thread():
        model, _ = build(begun, _Run(begun, tmp_path / "other").feed.utterances)
    got = weights(out)
    heard = {name: p for name, p in model.named_parameters() if name.startswith(("encoder.", "adapter.", "marks"))}
    assert heard.keys() < got.keys() | {"encoder.positional_embedding"}
    assert all(torch.equal(p, got[name]) for name, p in heard.items())
    assert any(
        name.startswith("base_model") and tensor.abs().max() > 0 for name, tensor in got.items() if "lora_B" in name
    )


def test_an_interrupted_training_goes_on(alone, dialogues, corpus, tmp_path):
    """From a checkpoint whose optimiser knows nothing of what text has not moved."""
    out = tmp_path / "run"
    with tiny.one_thread():
        train(tiny.recipe(corpus, out, *changes(dialogues)))
        last = sorted((out / "checkpoints").iterdir())[-1]
        for folder in (last, out / "model"):
            shutil.rmtree(folder)
        train(tiny.recipe(corpus, out, *changes(dialogues)))
    want, got = weights(alone), weights(out)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_the_model_answers_recordings_and_texts(alone, dialogues, monkeypatch):
    monkeypatch.setenv("OSUM_BACKEND", "cpu")
    engine = Engine.load(alone / "model")
    assert engine.form.prefix
    rows = read_source(dialogues / "dev.jsonl", 3.0)[0]
    tasks = [get_task(name) for name in ("asr", "text2text", "intent")]
    results = list(engine.answer(rows, tasks))
    assert [result.utterance for result in results] == rows
    for result in results:
        spoken = result.utterance.wav is not None
        assert result.error is None
        assert set(result.answers) == ({"asr"} if spoken else {"text2text", "intent"})
        assert (result.seconds is not None) == (result.as_json()["wav"] is not None) == spoken
    for result in results[:1] + results[-2:]:
        (again,) = engine.answer([result.utterance], tasks)
        assert again == result
    (unfit,) = engine.answer(rows[-1:], [get_task("asr")])
    assert unfit.error == f"{rows[-1].key}: no sound for asr"
    (unfit,) = engine.answer(rows[:1], [get_task("intent")])
    assert unfit.error == f"{rows[0].key}: intent is about text alone, and the row has a sound"


def test_the_verbs_take_rows_without_sound(alone, dialogues, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OSUM_BACKEND", "cpu")
    model, out = str(alone / "model"), tmp_path / "answers.jsonl"
    words = ["infer", "--model", model, "--tasks", "asr,intent", "--out", str(out), str(dialogues / "dev.jsonl")]
    assert main(words) == 0
    lines = [json.loads(line) for line in out.open(encoding="utf-8")]
    assert {tuple(line["results"]) for line in lines} == {("asr",), ("intent",)}
    capsys.readouterr()
    assert main(["infer", "--model", model, "--tasks", "text2text", "--prompt", "say the last of do mi"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["key"], line["wav"], line["duration"]) == ("prompt", None, None)
    assert "reply" in line["results"]["text2text"]
    report = tmp_path / "report"
    words = ["eval", "--model", model, "--data", str(dialogues / "dev.jsonl"), "--out", str(report)]
    assert main([*words, "--tasks", "asr,text2text,intent"]) == 0
    scores = json.loads((report / "report.json").read_text("utf-8"))["tasks"]
    assert scores["intent"]["n"] == scores["text2text"]["n"] == 2
    assert main(["data", "check", str(dialogues / "train.jsonl")]) == 0


def test_a_learned_tokenizer_has_units_for_the_words_of_the_form(dialogues, corpus, tmp_path):
    """Each question carries them, so letter by letter they would be most of what is computed."""
    recipe, rng = tiny.recipe(corpus, tmp_path, *changes(dialogues)), random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(2000)]
    spoken = [Utterance(key=str(i), wav="none", text=" ".join(rng.choices(words, k=8))) for i in range(1000)]
    _, tokenizer = build(recipe, spoken)
    for text in get_form("osum_pangu").texts:
        assert len(tokenizer(text).input_ids) <= 1.4 * len(re.findall(r"\w+|[^\w\s]", text))
