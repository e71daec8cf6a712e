"""What each stage of a recipe needs on a device: a step is traced on fake tensors, the rest is arithmetic.

Memory and operators of one device come from the trace. How training is cut over devices is added to it: data
parallelism repeats everything but the batch; sharding (FSDP) divides weights, gradients and optimiser by the number of
devices, or of those in a machine, and gathers one block at a time. Communication is that of rings, and is taken not to
overlap with computing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from osum_npu import backend
from osum_npu.audio.mel import log_mel
from osum_npu.config import Recipe, Stage
from osum_npu.models.flops import count_flops
from osum_npu.models.speech_llm import SpeechLLM, SpeechLLMConfig
from osum_npu.planning.devices import Device
from osum_npu.planning.kernels import kernels
from osum_npu.planning.sizes import build_on_meta, materialize
from osum_npu.planning.step import Speech, batch_size, make_batch, take_step
from osum_npu.planning.tracer import Operator, Trace, Tracer
from osum_npu.training.build import checkpoint_activations
from osum_npu.training.held import hold, llm_learns
from osum_npu.training.optimizer import Optimizers, freeze

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HOST = "cpu"
"""The backend whose own ops are traced as they are; those of others are stood in for."""
_TRACES, _FAR = 4, 16
"""The search for the largest batch takes so many traces at most, of batches up to so many times the planned one."""


@dataclass(frozen=True)
class How:
    """How training is cut and stored."""

    devices: int = 1
    sharding: Literal["none", "full", "hybrid"] = "none"
    """FSDP: weights, gradients and optimiser are divided over the devices, or over those of a machine."""
    activation_checkpointing: bool = False
    llm_learns: bool = True
    """Some stage trains the base LLM; else its matrices are held in the dtype of the computation."""
    speech: Speech = field(default_factory=Speech)

    @classmethod
    def of(cls, recipe: Recipe, devices: int, speech: Speech) -> How:
        """Take what a recipe says."""
        checkpointing, learns = recipe.activation_checkpointing, llm_learns(recipe.stages)
        return cls(devices, recipe.sharding, checkpointing, learns, speech)

    def parts(self, device: Device) -> int:
        """Return over how many devices weights, gradients and optimiser are divided."""
        return {"none": 1, "full": self.devices, "hybrid": min(self.devices, device.machine)}[self.sharding]


@dataclass(frozen=True)
class StagePlan:
    """What one stage needs; bytes and seconds are those of one device."""

    stage: str
    device: str
    devices: int
    parameters: int
    trainable: int
    utterances: int
    """Of one device at once."""
    micro_batches: int
    """Of one device in a step."""
    memory: dict[str, int]
    """Bytes by part at the fullest moment."""
    capacity: int
    largest_seconds: float
    """Sound that one device can compute at once; 0 where not even one utterance fits."""
    step_seconds: float
    communication_bytes: int
    """Sent by one device in a step."""
    communication_seconds: float
    flops: float
    """Of the model in a step, on one device."""
    utilization: float
    """MFU: ``flops`` over what the device could do in the time of a step."""
    steps: int
    audio_hours_per_hour: float

    @property
    def memory_bytes(self) -> int:
        """All parts."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the device has that much."""
        return self.memory_bytes <= self.capacity

    @property
    def hours(self) -> float:
        """Time of the whole stage."""
        return self.steps * self.step_seconds / 3600


@dataclass(frozen=True)
class Traced:
    """One device's step."""

    trace: Trace
    parameters: int
    trainable: int
    stored: dict[str, int]
    """Bytes of weights, gradients and optimiser outside of the step's own memory."""
    largest_block: int
    """Parameters that sharding gathers at once."""
    flops: float


def plan_stage(config: SpeechLLMConfig, stage: Stage, precision: str, name: str, device: Device, how: How) -> StagePlan:
    """Plan one stage.

    Args:
        config: sizes of the model.
        stage: what learns, from how much sound.
        precision: of the recipe; ``auto`` is the one in which the device multiplies fastest.
        name: of the device.
        device: its figures.
        how: training is cut.
    """
    if precision not in _DTYPES:
        precision = max(_DTYPES, key=lambda name: device.products.get(name, 0.0))
    dtype = _DTYPES[precision]
    count, micro_batches = cut(stage, how)
    traced = trace_step(config, stage, dtype, device, how, count, min(2, micro_batches))
    memory = memory_by_part(traced, device, how, dtype)
    bytes_sent, sending = _communication(traced, device, how, micro_batches, dtype)
    computing = computing_seconds(traced.trace.operators, device, min(2, micro_batches), micro_batches)
    step = computing + sending
    flops = traced.flops * micro_batches / min(2, micro_batches)
    sound = count * micro_batches * how.speech.seconds * how.devices
    peak = device.products.get(str(dtype).removeprefix("torch."), device.products["float32"])
    return StagePlan(
        stage=stage.name,
        device=name,
        devices=how.devices,
        parameters=traced.parameters,
        trainable=traced.trainable,
        utterances=count,
        micro_batches=micro_batches,
        memory=memory,
        capacity=int(device.memory),
        largest_seconds=_largest(config, stage, dtype, device, how, count, sum(memory.values())),
        step_seconds=step,
        communication_bytes=bytes_sent,
        communication_seconds=sending,
        flops=flops,
        utilization=flops / step / peak,
        steps=stage.steps,
        audio_hours_per_hour=sound / step,
    )


def cut(stage: Stage, how: How) -> tuple[int, int]:
    """Return how many utterances a device computes at once, and how often in a step."""
    share = stage.batch_seconds / how.devices
    at_once = min(stage.micro_batch_seconds or share, share)
    return batch_size(how.speech, at_once), max(1, round(share / at_once))


def trace_step(
    config: SpeechLLMConfig, stage: Stage, dtype: torch.dtype, device: Device, how: How, count: int, micro_batches: int
) -> Traced:
    """Trace a step of one device on fake tensors.

    Args:
        config: sizes of the model.
        stage: what learns.
        dtype: of the computation.
        device: decides which ops are one kernel.
        how: training is cut.
        count: utterances at once.
        micro_batches: of them in the step.
    """
    model = build_on_meta(config)
    learning = freeze(model, stage)
    hold(model, torch.float32 if how.llm_learns else dtype)
    stored = _stored(model)
    if how.parts(device) > 1:
        hold(model, dtype)  # gathered weights come in the dtype of the computation
    # log-mel keeps its filters and its window: they have to be real when a fake step first asks for them
    log_mel(torch.zeros(1, 400), [400], model.encoder.config.n_mels)
    with FakeTensorMode(allow_non_fake_inputs=True), _ops(device):
        materialize(model)
        if how.activation_checkpointing:
            checkpoint_activations(model)
        model.train()
        batches = [make_batch(model, stage, how.speech, count) for _ in range(micro_batches)]
        tracer = Tracer(config.llm["vocab_size"])
        watch(tracer, model, stage, batches, dtype)
    flops = sum(part.total for batch in batches for part in count_flops(config, stage.trainable, batch.work).values())
    return Traced(
        trace=tracer.trace(),
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in learning),
        stored=stored,
        largest_block=max(sum(p.numel() for p in block.parameters()) for block in _gathered(model)),
        flops=flops,
    )


def watch(tracer: Tracer, model: SpeechLLM, stage: Stage, batches: Sequence[Any], dtype: torch.dtype) -> None:
    """Take a step under a tracer, with the optimiser's state in place, as in every step but the first.

    Args:
        tracer: to note it.
        model: with what learns set by ``freeze``.
        stage: what learns.
        batches: micro batches of the step.
        dtype: of the computation.
    """
    freeze(model, stage)
    optimizer = Optimizers(model, stage)
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.0)
    optimizer.zero_grad()
    for tensor in (*model.parameters(), *model.buffers()):
        tracer.hold(tensor, "weights")
    for one in optimizer.all:
        for state in one.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    tracer.hold(value, "optimiser")
    for parameter in learning:
        parameter.register_post_accumulate_grad_hook(partial(_note_gradient, tracer))
    tracer.forget()
    with tracer:
        take_step(model, stage, optimizer, batches, dtype, tracer.enter)


def _note_gradient(tracer: Tracer, parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    tracer.hold(parameter.grad, "gradients")


@contextmanager
def _ops(device: Device) -> Iterator[None]:
    host = device.backend == _HOST
    if host:
        import_module(backend.load(_HOST).ops)
    with nullcontext() if host else kernels(device.fused):
        yield


def _gathered(model: SpeechLLM) -> list[nn.Module]:
    """List what sharding gathers at once: blocks, and the LLM's embeddings."""
    decoder: Any = model.llm.get_decoder()
    return [*model.encoder.blocks, *model.adapter.blocks, *decoder.layers, model.llm.get_input_embeddings()]


def _stored(model: SpeechLLM) -> dict[str, int]:
    """Return bytes of weights, gradients and optimiser of the whole model."""
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    return {"weights": sum(p.nbytes for p in model.parameters()), "gradients": gradients, "optimiser": 2 * gradients}


def memory_by_part(traced: Traced, device: Device, how: How, dtype: torch.dtype) -> dict[str, int]:
    """Return bytes by part at the fullest moment of a step."""
    parts: Counter[str] = Counter(traced.trace.peak)
    gradients = traced.stored["gradients"]
    if (shares := how.parts(device)) > 1:
        block = traced.largest_block
        for part, size in traced.stored.items():
            parts[part] = -(-size // shares)
        parts["weights"] += 2 * block * dtype.itemsize  # one in use, one on its way
        parts["communication"] = 4 * min(block, traced.trainable)
    elif how.devices > 1:
        flat = Counter({part: parts[part] for part in ("weights", "optimiser")})
        flat |= {"gradients": gradients, "communication": gradients}
        parts = flat if flat.total() > parts.total() else parts
    own = sum(size for part, size in parts.items() if part not in ("weights", "optimiser"))  # comes and goes
    parts["fragmentation"] = int(own * device.fragmentation)
    parts["runtime"] = int(device.runtime)
    order = ("weights", "gradients", "optimiser", "activations", "logits", "communication", "fragmentation", "runtime")
    return {part: int(parts[part]) for part in order}


def _communication(
    traced: Traced, device: Device, how: How, micro_batches: int, dtype: torch.dtype
) -> tuple[int, float]:
    """Return bytes that a device sends in a step, and seconds: rings of all-reduce, all-gather and reduce-scatter."""
    gradients, shares = 4 * traced.trainable, how.parts(device)
    copies = how.devices // shares
    within = between = 0.0
    if shares > 1:
        gathers = 2 * traced.parameters * dtype.itemsize
        within = (shares - 1) / shares * micro_batches * (gathers + gradients)
    if copies > 1:  # sharded gradients are exchanged after every micro batch
        between = 2 * (copies - 1) / copies * gradients / shares * (micro_batches if shares > 1 else 1)
    return int(within + between), within / device.between(shares) + between / device.between(how.devices)


def computing_seconds(operators: Sequence[Operator], device: Device, traced: int, micro_batches: int) -> float:
    """Add up operators; those of the micro batches as often as there are any."""
    by_phase: Counter[str] = Counter()
    for operator in operators:
        by_phase[operator.phase] += device.seconds(operator)  # type: ignore[assignment]
    update = by_phase.pop("update", 0)
    return by_phase.total() * micro_batches / traced + update


def _largest(
    config: SpeechLLMConfig, stage: Stage, dtype: torch.dtype, device: Device, how: How, count: int, known: int
) -> float:
    """Find how many seconds of sound fit at once: memory is nearly a line over the number of utterances."""

    def needed(utterances: int) -> int:
        traced = trace_step(config, stage, dtype, device, how, utterances, 1)
        return sum(memory_by_part(traced, device, how, dtype).values())

    points = {count: known}
    trial = 2 * count if known <= device.memory else max(1, count // 2)
    guess = count
    while trial not in points and len(points) < _TRACES:
        points[trial] = needed(trial)
        (a, at_a), (b, at_b) = sorted(points.items(), key=lambda point: abs(point[1] - device.memory))[:2]
        # small batches may all need the same: what the exchange of gradients takes
        guess = max(0, int(a + (device.memory - at_a) * (b - a) / (at_b - at_a))) if at_a != at_b else _FAR * count
        trial = max(1, min(guess, _FAR * count))
    fitting = max((n for n, memory in points.items() if memory <= device.memory), default=0)
    return (max(guess, fitting) if guess > max(points) else fitting) * how.speech.seconds
