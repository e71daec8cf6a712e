"""One training step on invented data of a given size: what is traced to plan, and measured to check the plan.

It does what ``osum_npu.training.loop`` does with a batch, from samples to the update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osum_npu.audio.mel import frame_count, log_mel
from osum_npu.audio.read import SAMPLE_RATE
from osum_npu.config import Stage
from osum_npu.models.flops import Work
from osum_npu.models.layout import Layout
from osum_npu.models.speech_llm import SpeechLLM
from osum_npu.planning.tracer import Phase
from osum_npu.training.optimizer import Optimizers

SHORTEST = 0.9
"""Share of the longest utterance in a batch that the shortest lasts; what a step costs hardly depends on it, for
nothing that costs much is padded."""


@dataclass(frozen=True)
class Speech:
    """What the utterances are like."""

    seconds: float = 10.0
    """Length of the longest of a batch."""
    prompt_tokens: int = 20
    tokens_per_second: float = 4.0
    """Of the answers."""

    def answer_tokens(self, seconds: float) -> int:
        """Tokens of the answer to an utterance, with its end mark."""
        return round(seconds * self.tokens_per_second) + 1


@dataclass(frozen=True)
class Batch:
    """What is computed at once. Shapes: B utterances, S samples."""

    wave_BS: Tensor
    samples: Sequence[int]
    layout: Layout | None
    spellings: list[str] | None
    labels: int
    work: Work
    """The same in numbers."""

    @property
    def frames(self) -> Sequence[int]:
        """Mel frames of each utterance."""
        return self.work.frames


def batch_size(speech: Speech, seconds: float) -> int:
    """Return how many utterances are ``seconds`` of sound; at least one."""
    mean = speech.seconds * (1 + SHORTEST) / 2
    return max(1, int(seconds / mean + 1e-9))


def make_batch(model: SpeechLLM, stage: Stage, speech: Speech, count: int) -> Batch:
    """Invent a batch of ``count`` utterances, the longest as long as ``speech`` says, noise for sound.

    Args:
        model: what it is for.
        stage: what is asked.
        speech: what the utterances are like.
        count: utterances.
    """
    shares = [1 - (1 - SHORTEST) * i / max(1, count - 1) for i in range(count)]
    lengths = [speech.seconds * share for share in shares]
    samples = [round(length * SAMPLE_RATE) for length in lengths]
    frames = [frame_count(n) for n in samples]
    layout, positions, labels = None, [], 0
    if stage.llm_weight:
        about = [i for i in range(count) for _ in range(stage.questions)]
        answers = [[0] * speech.answer_tokens(lengths[i]) for i in about]
        prompts = [[0] * speech.prompt_tokens] * len(about)
        layout = model.layout(frames, prompts, answers, about)
        positions, labels = list(layout.packed or ()), sum(map(len, answers))
    spellings = None
    if stage.ctc_weight:
        unit = next(iter(model.config.ctc_units or ["a"]))
        spellings = [unit * speech.answer_tokens(length) for length in lengths]
    return Batch(
        wave_BS=torch.randn(count, samples[0]),
        samples=samples,
        layout=layout,
        spellings=spellings,
        labels=labels,
        work=Work(frames, positions, labels, spelled=spellings is not None),
    )


def take_step(
    model: SpeechLLM,
    stage: Stage,
    optimizer: Optimizers,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    enter: Callable[[Phase], None] = lambda _: None,
) -> None:
    """Learn from micro batches.

    Args:
        model: with what learns set by ``freeze``.
        stage: weights of the losses.
        optimizer: of what learns.
        batches: computed one after the other.
        dtype: of the computation.
        enter: called where a phase begins.
    """
    labels = max(1, sum(batch.labels for batch in batches))
    for batch in batches:
        enter("forward")
        features = log_mel(batch.wave_BS, batch.samples, model.encoder.config.n_mels)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            output = model(features, batch.frames, batch.layout, batch.spellings)
        loss = stage.llm_weight * output.loss_sum / labels
        if output.ctc_sum is not None:
            loss = loss + stage.ctc_weight * output.ctc_sum / max(1, output.ctc_count)
        enter("backward")
        loss.backward()
        del output, loss
    enter("update")
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], stage.clip)
    optimizer.step(1.0)
    optimizer.zero_grad()
