"""What learns in a stage, from what, and how fast."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import tiny
import torch
from safetensors.torch import load_file

from osum_npu import backend
from osum_npu.checkpoints.distributed import read_model
from osum_npu.checkpoints.model_directory import load_model
from osum_npu.config import RecipeError
from osum_npu.data.loader import Position, steps
from osum_npu.data.sources import read_source
from osum_npu.models.lora import LoraSettings
from osum_npu.models.speech_llm import SpeechLLM, SpeechLLMConfig
from osum_npu.parity import relative_error
from osum_npu.tasks import Utterance, spell
from osum_npu.training.build import build, spelling_units
from osum_npu.training.log import read_log
from osum_npu.training.loop import _Run, train
from osum_npu.training.optimizer import Optimizers, freeze, part_of, schedule
from osum_npu.training.saver import checkpoints

ONE_STAGE = "stages=[{name: all, trainable: [encoder, ctc, adapter, llm, lora], steps: 3, learning_rate: 3e-3}]"
TINY_PARTS = {
    "encoder": {"width": 8, "layers": 1, "heads": 1},
    "adapter": {"layers": 1, "heads": 1, "feed_forward": 8},
    "llm": {
        "model_type": "qwen2",
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    },
}
STILL = tuple(f"model.{part}.dropout=0" for part in ("encoder", "adapter", "lora"))
"""Without dropout, so that a batch gives the same numbers every time."""


@pytest.fixture(autouse=True)
def _one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def utterances(corpus):
    return read_source(corpus / "train.jsonl", 30)[0]


def losses(out, name="loss"):
    return [row[name] for row in read_log(out / "log.jsonl") if name in row]


# -- the run as a whole


@pytest.mark.parametrize("fastest", [torch.float32, torch.bfloat16])
def test_auto_computes_in_what_the_device_trains_fastest_in(corpus, tmp_path, monkeypatch, capsys, fastest):
    cpu = replace(backend.load("cpu"), fastest=lambda: fastest)
    monkeypatch.setattr(backend, "current", lambda: cpu)
    said = {}
    for precision in ("auto", "bfloat16"):
        train(tiny.recipe(corpus, tmp_path / precision, ONE_STAGE, f"precision={precision}"))
        said[precision] = capsys.readouterr().out
    assert f"cpu, {str(fastest).removeprefix('torch.')}, " in said["auto"]
    assert "warning" not in said["auto"]
    assert ("no instructions for bfloat16" in said["bfloat16"]) == (fastest is torch.float32)


def test_the_losses_fall(finished):
    spelled, said = losses(finished, "ctc_loss"), losses(finished)
    assert spelled[-1] < 0.6 * spelled[0]
    assert said[-1] < 0.95 * said[0]
    assert losses(finished, "dev_loss")[-1] < said[0]
    assert all(map(math.isfinite, spelled + said))


def test_longer_training_learns_the_tones(corpus, tmp_path):
    """Sixty steps of a second are enough to hear whether a tone is rich or pure, on utterances never trained on."""
    stage = "{name: all, trainable: [encoder, adapter, llm], steps: 60, learning_rate: 5e-3, batch_seconds: 12}"
    overrides = [f"stages=[{stage}]", "stages.0.tasks={gender: 1}", "dev_every=60", "model.ctc=false", *STILL]
    train(tiny.recipe(corpus, tmp_path / "run", *overrides))
    assert losses(tmp_path / "run")[-1] < 0.6 * losses(tmp_path / "run")[0]


def test_the_finished_folder_is_a_model(finished, corpus):
    model, tokenizer = load_model(finished / "model")
    assert not list(finished.rglob("*.part"))
    assert (finished / "model" / "README.md").read_text("utf-8").count("kind: random") == 1
    newest = read_model(checkpoints(finished / "checkpoints")[-1])
    parameters = dict(model.named_parameters())
    assert newest.keys() == parameters.keys()
    assert all(torch.equal(tensor, newest[name]) for name, tensor in parameters.items())
    assert {*"doremifasola好天"} <= set(model.config.ctc_units)
    assert tokenizer.decode(tokenizer("do re").input_ids).strip() == "do re"


def test_the_seed_decides_the_weights(corpus, tmp_path, utterances):
    models = [build(tiny.recipe(corpus, tmp_path / "r", f"seed={seed}"), utterances)[0] for seed in (0, 0, 1)]
    first, same, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_labels_and_time_stamps_are_one_token_each(corpus, tmp_path, utterances):
    recipe = tiny.recipe(corpus, tmp_path / "r")
    tokenizer = build(recipe, utterances)[1]
    for text in ("<male>", "<throat clearing>", "<新闻科普>", "<开始回答>", "<0.00>", "<0.02>", "<2.00>"):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1, text
    assert len(tokenizer("<2.02>", add_special_tokens=False).input_ids) > 1  # longest_stamp is 2 s


def test_ctc_spells_frequent_words_as_a_whole_and_all_others_by_character(corpus, tmp_path):
    often, seldom = Utterance(key="a", wav="a", text="Hello 你好"), Utterance(key="b", wav="b", text="held")
    units = spelling_units([*[often] * 1000, seldom, Utterance(key="c", wav="c")])
    assert units == sorted({"hello", *"hello你好d"})
    model = SpeechLLM(SpeechLLMConfig(**TINY_PARTS, ctc_units=units))
    spelled = [units[i] for i in model.ctc_targets("hello held你x")]
    assert spelled == ["hello", *"held", "你"]
    assert model.ctc_head.out_features == len(units) + 1


def test_ctc_spells_labels_as_a_whole():
    labelled = Utterance(key="a", wav="a", text="你好", labels={"event": "throat clearing", "style": "客服"})
    units = spelling_units([labelled])
    model = SpeechLLM(SpeechLLMConfig(**TINY_PARTS, ctc_units=units))
    assert spell(labelled) == "你好<throat clearing><客服>"
    assert [units[i] for i in model.ctc_targets(spell(labelled))] == ["你", "好", "<throat clearing>", "<客服>"]


# -- what learns


@pytest.mark.parametrize("part", ["encoder", "adapter", "llm", "lora", "ctc"])
def test_a_stage_trains_its_parts_and_no_other(part, corpus, tmp_path, utterances):
    recipe = tiny.recipe(corpus, tmp_path / "run", ONE_STAGE, f"stages.0.trainable=[{part}]", "stages.0.ctc_weight=0.5")
    before = build(recipe, utterances)[0].state_dict()
    after = load_model(train(recipe))[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, _ in build(recipe, utterances)[0].named_parameters() if part_of(name) == part}
    assert changed <= trained
    assert len(changed) > 0.9 * len(trained)
    assert trained


def test_parts_are_told_apart_by_name(corpus, tmp_path, utterances):
    model, _ = build(tiny.recipe(corpus, tmp_path / "r"), utterances)
    parts = {part_of(name) for name, _ in model.named_parameters()}
    assert parts == {"encoder", "adapter", "llm", "lora", "ctc"}
    assert part_of("marks") == "adapter"
    lora = [name for name, _ in model.named_parameters() if part_of(name) == "lora"]
    targets = LoraSettings().targets
    assert len(lora) == 2 * len(targets) * 2  # A and B of each target in two layers
    assert all(name.startswith("llm.") for name in lora)


def test_llm_weight_0_leaves_adapter_and_llm_out(corpus, tmp_path, utterances):
    recipe = tiny.recipe(corpus, tmp_path / "run", ONE_STAGE, "stages.0.llm_weight=0", "stages.0.ctc_weight=1")
    before = build(recipe, utterances)[0].state_dict()
    after = load_model(train(recipe))[0].state_dict()
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"encoder", "ctc"}
    assert losses(tmp_path / "run") == []


def test_vectors_are_not_decayed_and_rates_follow_the_factor(corpus, tmp_path, utterances):
    changes = ("stages.1.weight_decay=0.5", "stages.1.betas=[0.8, 0.9]", "stages.1.eps=1e-6")
    recipe = tiny.recipe(corpus, tmp_path / "r", *changes)
    model, _ = build(recipe, utterances)
    parameters = freeze(model, recipe.stages[1])
    optimizers = Optimizers(model, recipe.stages[1])
    groups = [group for one in optimizers.all for group in one.param_groups]
    assert {id(p) for group in groups for p in group["params"]} == set(map(id, parameters))
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    for group in groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.5 if parameter.ndim > 1 else 0)
    optimizers.step(0.25)
    assert {group["lr"] for group in groups} == {recipe.stages[1].learning_rate / 4}


def test_token_embeddings_learn_at_a_rate_of_their_own(corpus, tmp_path, utterances):
    recipe = tiny.recipe(corpus, tmp_path / "r", "stages.1.embedding_learning_rate=0.02")
    model, _ = build(recipe, utterances)
    freeze(model, recipe.stages[1])
    optimizers = Optimizers(model, recipe.stages[1])
    optimizers.step(0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for one in optimizers.all for g in one.param_groups for p in g["params"]}
    fast = {name for name, rate in rates.items() if rate == 0.01}
    assert fast == {name for name in rates if "embed_tokens" in name or "lm_head" in name}
    assert {rate for name, rate in rates.items() if name not in fast} == {recipe.stages[1].learning_rate / 2}


def test_muon_takes_hidden_matrices_alone(corpus, tmp_path, utterances):
    recipe = tiny.recipe(corpus, tmp_path / "r", "stages.1.muon_learning_rate=0.02")
    model, _ = build(recipe, utterances)
    parameters = freeze(model, recipe.stages[1])
    adamw, muon = Optimizers(model, recipe.stages[1]).all
    names = {id(p): name for name, p in model.named_parameters()}
    taken = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    left = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert sorted(taken + left) == sorted(names[id(p)] for p in parameters)
    shapes = dict(model.named_parameters())
    assert all(shapes[name].ndim == 2 for name in taken)
    assert not any(word in name for name in taken for word in ("embed_tokens", "lm_head", "ctc_head", "lora", "marks"))
    hidden = ("q_proj", "up_proj", "attn.query.weight", "mlp.0.weight", "adapter.projection.weight")
    assert all(any(word in name for name in taken) for word in hidden)


# -- micro batches


def gradients(recipe, out, step):
    run = _Run(recipe, out)
    freeze(run.model, recipe.stages[0])
    run.model.train()
    found, _ = run.step.backward(recipe.stages[0], step(run).batches, run.meter, False)
    return {name: loss.item() for name, loss in found.items()}, {
        name: parameter.grad for name, parameter in run.model.named_parameters()
    }


@pytest.mark.parametrize("micro", [0.5, 3.0, 7.0])
def test_micro_batches_add_up_to_the_whole(micro, corpus, tmp_path):
    recipe = tiny.recipe(
        corpus, tmp_path / "run", ONE_STAGE, "stages.0.ctc_weight=0.5", "stages.0.batch_seconds=15", *STILL
    )
    stage = recipe.stages[0]

    def first_step(micro_batch_seconds):
        def step(run):
            return next(
                steps(
                    run.feed.train,
                    {"asr": 1, "gender": 1, "timestamps": 1},
                    run.feed.collator(stage),
                    batch_seconds=stage.batch_seconds,
                    micro_batch_seconds=micro_batch_seconds,
                )
            )

        return step

    whole_losses, whole = gradients(recipe, tmp_path / "run", first_step(None))
    losses_, pieces = gradients(recipe, tmp_path / "run", first_step(micro))
    assert losses_ == pytest.approx(whole_losses, rel=1e-5)
    scale = math.sqrt(sum(float(g.square().sum()) for g in whole.values()) / sum(g.numel() for g in whole.values()))
    for name, gradient in whole.items():
        if gradient.square().mean().sqrt() > 1e-3 * scale:  # a key's bias has no gradient but rounding
            assert relative_error(pieces[name], gradient) < 1e-4, name
        assert (pieces[name] - gradient).abs().max() < 1e-5 * max(1, scale / 1e-2), name


def test_micro_batches_log_the_same_numbers(corpus, tmp_path):
    overrides = (ONE_STAGE, "stages.0.ctc_weight=0.5", "stages.0.batch_seconds=15", *STILL)
    train(tiny.recipe(corpus, tmp_path / "whole", *overrides))
    train(tiny.recipe(corpus, tmp_path / "micro", *overrides, "stages.0.micro_batch_seconds=3"))
    for one, other in zip(tiny.rows(tmp_path / "whole"), tiny.rows(tmp_path / "micro"), strict=True):
        for name in ("loss", "ctc_loss", "gradient_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4)
    first, second = (tiny.rows(tmp_path / name)[0] for name in ("whole", "micro"))
    for name in ("loss", "ctc_loss", "gradient_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-5)


# -- learning rates


@pytest.fixture(scope="module")
def stage(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("stage") / "r"

    def make(name, steps, warmup):
        how_fast = f"steps: {steps}, learning_rate: 0.4, warmup_steps: {warmup}, schedule: {name}"
        return tiny.recipe(corpus, path, f"stages=[{{name: s, trainable: [llm], {how_fast}}}]").stages[0]

    return make


@pytest.mark.parametrize(("steps_", "warm"), [(10, 0), (10, 4), (10, 1), (1, 0), (5, 5), (3, 9)])
def test_schedules_by_hand(stage, steps_, warm):
    for step in range(steps_):
        rise = 0.4 * (step + 1) / warm if step < warm else None
        fallen = (step - warm) / max(1, steps_ - warm)
        by_hand = {
            "constant": rise or 0.4,
            "linear": rise or 0.4 * (1 - fallen),
            "cosine": rise or 0.4 * (1 + math.cos(math.pi * fallen)) / 2,
            # WarmupLR of WeNet, whose first two steps have one rate
            "inverse_sqrt": 0.4 * max(warm, 1) ** 0.5 * min(max(step, 1) ** -0.5, max(step, 1) * max(warm, 1) ** -1.5),
        }
        for name, rate in by_hand.items():
            made = stage(name, steps_, warm)
            got = made.learning_rate * schedule(made, step)
            assert got == pytest.approx(rate, rel=1e-9)
            assert 0 < got <= 0.4 + 1e-12


def test_the_log_tells_the_rate_that_was_used(corpus, finished):
    recipe = tiny.recipe(corpus, finished)
    want = [stage.learning_rate * schedule(stage, step) for stage in recipe.stages for step in range(stage.steps)]
    assert [row["learning_rate"] for row in tiny.rows(finished)] == pytest.approx(want, rel=1e-12)


# -- what is asked


def test_combinations_are_trained_in_the_words_of_a_file(corpus, tmp_path, capsys):
    path = tmp_path / "prompts.yaml"
    path.write_text("<AGE><GENDER>:\n- which age and gender, please?\n<S2S>: [a]\n", "utf-8")
    words = (ONE_STAGE, "stages.0.tasks={age+gender: 1, age+gender-only: 1}", f"prompts={path}", "stamp_seconds=0.1")
    recipe = tiny.recipe(corpus, tmp_path / "run", *words)
    run = _Run(recipe, tmp_path / "run")
    stage = recipe.stages[0]
    batches = [batch for step in islice(run.feed.steps(stage, Position()), 3) for batch in step.batches]
    asked = {(e.tasks[0].name, tuple(p)) for b in batches for e, p in zip(b.examples, b.prompts, strict=True)}
    (own,) = run.tokenizer(["which age and gender, please?"], add_special_tokens=False).input_ids
    assert [prompt for name, prompt in asked if name == "age+gender-only"] == [tuple(own)]
    assert len([prompt for name, prompt in asked if name == "age+gender"]) > 1
    assert len(run.tokenizer("<0.02>", add_special_tokens=False).input_ids) > 1
    train(recipe)
    assert len(losses(tmp_path / "run")) == 3
    assert f"{path}: ignored, as of no task here: <S2S>" in capsys.readouterr().out
    card = (tmp_path / "run" / "model" / "README.md").read_text("utf-8")
    assert f"--tasks age+gender,age+gender-only --prompts {path} recording.wav" in card


def test_prompts_that_are_none_are_missed_with_the_other_files(corpus, tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text("<TRANSCRIBE>: transcribe", "utf-8")
    with pytest.raises(RecipeError) as caught:
        train(tiny.recipe(corpus, tmp_path / "run", f"prompts={path}", "data.train.tones.path=a.jsonl"))
    faults = caught.value.faults
    assert len(faults) == 2
    assert f"prompts: {path}: wanted a list of sentences for each tag" in faults[1]


def test_batches_of_a_run_come_from_the_plan(corpus, utterances, tmp_path):
    """Positions in the log are those of the loader."""
    recipe = tiny.recipe(corpus, tmp_path / "run", ONE_STAGE, "stages.0.steps=9", "stages.0.batch_seconds=12")
    train(recipe)
    run = _Run(recipe, tmp_path / "run")
    stage = recipe.stages[0]
    feed = steps(run.feed.train, stage.tasks, run.feed.collator(stage), batch_seconds=stage.batch_seconds)
    assert [row["epoch"] for row in tiny.rows(tmp_path / "run")] == [step.after.epoch for step in islice(feed, 9)]


# -- a model that is there already


def test_a_saved_model_trains_on(corpus, finished, tmp_path):
    saved = f"model={{kind: saved, path: {finished / 'model'}}}"
    out = tmp_path / "more"
    train(tiny.recipe(corpus, out, saved))
    assert tiny.rows(out)[0]["ctc_loss"] < 0.6 * tiny.rows(finished)[0]["ctc_loss"]
    assert losses(out)[0] < 0.97 * losses(finished)[0]
    before, after = (load_model(path / "model")[0].state_dict() for path in (finished, out))
    assert before.keys() == after.keys()
    assert (finished / "model" / "tokenizer.json").read_bytes() == (out / "model" / "tokenizer.json").read_bytes()


def test_lora_is_added_to_a_saved_model_without_it(corpus, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "lora"
    train(tiny.recipe(corpus, plain, "model.lora=null", "stages.2.trainable=[llm]"))
    saved = f"model={{kind: saved, path: {plain / 'model'}, lora: {{rank: 2}}}}"
    stage = "stages=[{name: tune, trainable: [lora], steps: 3, learning_rate: 1e-2}]"
    train(tiny.recipe(corpus, out, saved, stage))
    before, after = (load_file(path / "model" / "model.safetensors") for path in (plain, out))
    layers = {name: name.replace(".base_layer", "") for name in after}
    assert {layers[name] for name in after} == before.keys()
    assert all(torch.equal(tensor, before[layers[name]]) for name, tensor in after.items())
    lora = load_file(out / "model" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in lora.values())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("stages.2.trainable=[lora]", "stage 'tune' needs lora, which this model does not have"),
        ("stages.2.ctc_weight=1", "stage 'tune' needs ctc, which this model does not have"),
    ],
)
def test_a_part_that_is_not_there_is_missed_before_the_first_step(change, fault, corpus, tmp_path):
    plain = tmp_path / "plain"
    without = ("model.lora=null", "model.ctc=false", ONE_STAGE, "stages.0.trainable=[llm]")
    train(tiny.recipe(corpus, plain, *without))
    stage = "{{name: {}, trainable: [llm], steps: 1, learning_rate: 1e-3}}"
    stages = f"stages=[{', '.join(map(stage.format, ('a', 'b', 'tune')))}]"
    saved = f"model={{kind: saved, path: {plain / 'model'}}}"
    with pytest.raises(ValueError, match=fault):
        train(tiny.recipe(corpus, tmp_path / "run", saved, stages, change))
    assert not (tmp_path / "run" / "log.jsonl").exists()


# -- devices


def test_a_device_without_an_adamw_of_its_own_is_refused(corpus, tmp_path):
    stage = "{name: all, trainable: [llm], steps: 1, learning_rate: 0.01}"
    with pytest.raises(ValueError, match="backend 'cpu' has no AdamW of its own"):
        train(tiny.recipe(corpus, tmp_path / "run", f"stages=[{stage}]", "device_adamw=true"))
