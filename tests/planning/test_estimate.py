"""Plans against steps that are really computed, and against the arithmetic that they rest on."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
import yaml

from osum_npu import backend, op
from osum_npu.audio.mel import log_mel
from osum_npu.config import load_recipe
from osum_npu.models.lora import is_lora
from osum_npu.planning.devices import DEVICES, find_device, read_devices
from osum_npu.planning.estimate import How, computing_seconds, memory_by_part, plan_stage, trace_step, watch
from osum_npu.planning.report import format_plans, warnings
from osum_npu.planning.sizes import build_on_meta, llm_sizes, materialize, published, read_sizes
from osum_npu.planning.step import Speech, make_batch
from osum_npu.planning.tracer import Operator, Tracer
from osum_npu.training.held import hold
from osum_npu.training.optimizer import freeze

SPEECH = Speech(seconds=1.2, prompt_tokens=6, tokens_per_second=5)
COUNT = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return load_recipe([tiny.write_recipe(tmp_path_factory.mktemp("plan") / "recipe.yaml", "nowhere")])


@pytest.fixture(scope="module")
def devices():
    return read_devices()


def real_trace(config, stage, dtype, llm_dtype, micro_batches):
    """Watch the same step on real tensors."""
    backend.load("cpu").activate()
    torch.manual_seed(0)
    model = build_on_meta(config)
    materialize(model)
    hold(model, llm_dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02) if tensor.ndim > 1 else tensor.fill_(1.0)
    model.train()
    freeze(model, stage)
    log_mel(torch.zeros(1, 400), [400], 80)
    tracer = Tracer(config.llm["vocab_size"])
    watch(tracer, model, stage, [make_batch(model, stage, SPEECH, COUNT) for _ in range(micro_batches)], dtype)
    return tracer.trace()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2], ids=["encoder", "all", "lora"])
def test_a_fake_step_is_the_real_one(recipe, devices, stage, dtype):
    stage, config, micro_batches = recipe.stages[stage], read_sizes(recipe), 2
    how = How(speech=SPEECH, llm_learns=stage is not recipe.stages[2])
    fake = trace_step(config, stage, dtype, devices["cpu"], how, COUNT, micro_batches).trace
    with tiny.one_thread():
        real = real_trace(config, stage, dtype, torch.float32 if how.llm_learns else dtype, micro_batches)
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.03)
    for part in ("weights", "optimiser"):
        assert fake.peak[part] == real.peak[part]
    assert sum(o.flops for o in fake.operators) == pytest.approx(sum(o.flops for o in real.operators), rel=0.01)
    assert sum(o.moved for o in fake.operators) == pytest.approx(sum(o.moved for o in real.operators), rel=0.03)


def test_a_plan_leaves_ops_and_caches_as_they_were(recipe, devices):
    before = {name: (each.forced, set(each.implementations)) for name, each in op.REGISTRY.items()}
    trace_step(read_sizes(recipe), recipe.stages[1], torch.bfloat16, devices["ascend-910b"], How(speech=SPEECH), 2, 1)
    assert {name: (each.forced, set(each.implementations)) for name, each in op.REGISTRY.items()} == before
    features = log_mel(torch.randn(1, 16000), [16000])
    assert torch.isfinite(features).all()


def planned(recipe, device, name="cpu", **how):
    stage = replace(recipe.stages[1], batch_seconds=4.8, micro_batch_seconds=None)
    return plan_stage(read_sizes(recipe), stage, "float32", name, device, How(speech=SPEECH, **how))


def test_checkpointing_needs_less_and_sharding_divides(recipe, devices):
    config, stage, device = read_sizes(recipe), recipe.stages[1], devices["ascend-910b"]
    config.encoder["layers"] = config.llm["num_hidden_layers"] = 4
    memory = {}
    for name, how in {
        "plain": How(devices=4, speech=SPEECH),
        "checkpointed": How(devices=4, activation_checkpointing=True, speech=SPEECH),
        "sharded": How(devices=4, sharding="full", speech=SPEECH),
    }.items():
        traced = trace_step(config, stage, torch.float32, device, how, 8, 1)
        memory[name] = memory_by_part(traced, device, how, torch.float32)
    assert memory["checkpointed"]["activations"] < 0.8 * memory["plain"]["activations"]
    assert memory["sharded"]["optimiser"] == pytest.approx(memory["plain"]["optimiser"] / 4, rel=0.01)
    assert memory["sharded"]["gradients"] == pytest.approx(4 * traced.trainable / 4, rel=0.01)


def test_a_frozen_llm_is_planned_as_it_is_held(recipe, devices):
    config, stage, device = read_sizes(recipe), recipe.stages[2], devices["ascend-910b"]
    weights = {}
    for learns in (True, False):
        how = How(speech=SPEECH, llm_learns=learns)
        traced = trace_step(config, stage, torch.bfloat16, device, how, 2, 1)
        weights[learns] = traced.stored["weights"]
        assert weights[learns] == memory_by_part(traced, device, how, torch.bfloat16)["weights"] - buffers(config)
    matrices = sum(p.numel() for n, p in build_on_meta(config).named_parameters() if is_matrix_of_llm(n, p))
    assert weights[True] - weights[False] == 2 * matrices


def buffers(config):
    return sum(buffer.nbytes for buffer in build_on_meta(config).buffers())


def is_matrix_of_llm(name, parameter):
    return name.startswith("llm.") and parameter.ndim == 2 and not is_lora(name)


def test_hybrid_divides_within_a_machine_and_adds_up_between(recipe, devices):
    device = replace(devices["ascend-910b"], machine=4)
    full, hybrid = (planned(recipe, device, devices=12, sharding=kind) for kind in ("full", "hybrid"))
    assert hybrid.memory["optimiser"] == pytest.approx(3 * full.memory["optimiser"], rel=0.01)
    within = 3 / 4 * (2 * 4 * full.parameters + 4 * full.trainable)
    between = 2 * 2 / 3 * 4 * full.trainable / 4
    assert hybrid.communication_bytes == pytest.approx(hybrid.micro_batches * (within + between), rel=1e-6)
    assert hybrid.communication_seconds == pytest.approx(
        hybrid.micro_batches * (within / device.link + between / device.network)
    )


def test_rings_send_what_rings_send(recipe, devices):
    alone = planned(recipe, devices["cpu"])
    four = planned(recipe, devices["cpu"], devices=4)
    assert alone.communication_bytes == 0
    assert four.communication_bytes == pytest.approx(2 * 3 / 4 * 4 * four.trainable, rel=1e-6)
    assert four.communication_seconds == pytest.approx(four.communication_bytes / devices["cpu"].between(4))
    sharded = planned(recipe, devices["cpu"], devices=4, sharding="full")
    per_batch = 3 / 4 * (2 * 4 * sharded.parameters + 4 * sharded.trainable)
    assert sharded.communication_bytes == pytest.approx(sharded.micro_batches * per_batch, rel=1e-6)


def test_what_fits_fits_and_a_little_more_does_not(recipe, devices):
    small = replace(devices["cpu"], memory=devices["cpu"].runtime + 4e7)
    one = planned(recipe, small)
    config, stage = read_sizes(recipe), recipe.stages[1]
    count = round(one.largest_seconds / SPEECH.seconds)

    def needed(utterances):
        traced = trace_step(config, stage, torch.float32, small, How(speech=SPEECH), utterances, 1)
        return sum(memory_by_part(traced, small, How(speech=SPEECH), torch.float32).values())

    assert needed(int(count * 0.97)) <= small.memory < needed(1 + int(count * 1.1))


def test_a_run_that_cannot_fit_is_warned_of(recipe, devices):
    one = planned(recipe, replace(devices["cpu"], memory=devices["cpu"].runtime + 1e6))
    assert not one.fits
    assert one.largest_seconds == 0
    assert "sharding: full" in warnings([one])[0]
    assert "NO" in format_plans([one])


def test_an_operator_takes_its_work_or_its_bytes(devices):
    device = devices["h200"]
    rate, bandwidth = device.products["bfloat16"] * device.reached.products, device.bandwidth * device.reached.bandwidth
    bound_by_work = Operator("forward", "product", "bfloat16", 1e12, 1e6, 0)
    bound_by_bytes = Operator("forward", "product", "bfloat16", 1e6, 1e9, 0)
    assert device.seconds(bound_by_work) == pytest.approx(device.launch + 1e12 / rate)
    assert device.seconds(bound_by_bytes) == pytest.approx(device.launch + 1e9 / bandwidth)
    steps = [bound_by_work, bound_by_work._replace(phase="update")]
    assert computing_seconds(steps, device, 1, 3) == pytest.approx(4 * device.seconds(bound_by_work))


def test_released_sizes_are_those_of_the_checkpoints():
    model = build_on_meta_llm("Qwen/Qwen2-7B-Instruct")
    assert model == 7_615_616_512  # model card of Qwen2-7B: 7.62 billion
    assert build_on_meta_llm("Qwen/Qwen2.5-3B-Instruct") == pytest.approx(3.09e9, rel=0.01)
    assert llm_sizes("Qwen/Qwen2-7B")["vocab_size"] == published()["Qwen/Qwen2-7B"]["vocab_size"]


def build_on_meta_llm(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(llm_sizes(name))
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    return llm.num_parameters()


def test_devices_of_ones_own(tmp_path, devices):
    own = tmp_path / "own.yaml"
    entry = yaml.safe_load(DEVICES.read_text("utf-8"))["h200"]
    own.write_text(yaml.safe_dump({"mine": {**entry, "memory": 1e9}}), "utf-8")
    assert find_device("MINE", read_devices(own))[1].memory == 1e9
    assert find_device("910B", devices)[0] == "ascend-910b"
    with pytest.raises(ValueError, match="known are ascend-910b"):
        find_device("z80", devices)
    own.write_text(yaml.safe_dump({"mine": {**entry, "memory": -1, "colour": "red"}}), "utf-8")
    with pytest.raises(ValueError, match=r"(?s)mine\.memory.*mine\.colour|mine\.colour.*mine\.memory"):
        read_devices(own)


def test_every_device_says_where_its_figures_come_from(devices):
    assert {"ascend-910b", "h200", "h100", "a100", "cpu"} <= set(devices)
    assert [name for name, device in devices.items() if len(device.source) < 20] == []


def test_the_verb_prints_and_writes(tmp_path):
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", "nowhere")
    out = tmp_path / "plan.json"
    stage = "stages=[{name: tune, trainable: [lora], steps: 2, learning_rate: 1e-3, batch_seconds: 2.4}]"
    words = [recipe, stage, "--device", "cpu,910B", "--devices", "2", "--utterance-seconds", "1.2", "--json", out]
    done = tiny.osum_npu("plan", *words)
    assert done.returncode == 0, done.stderr
    assert "time to finish" in done.stdout
    rows = json.loads(out.read_text("utf-8"))
    assert [(row["stage"], row["device"]) for row in rows] == [("tune", "cpu"), ("tune", "ascend-910b")]
    assert all(row["fits"] and row["step_seconds"] > 0 for row in rows)
