"""What a rank computes of a step: features, losses, gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from osum_npu.audio.augment import apply
from osum_npu.audio.mel import frame_count, log_mel
from osum_npu.config import Stage
from osum_npu.data.collate import Batch
from osum_npu.models.speech_llm import SpeechLLM, SpeechLLMOutput
from osum_npu.training.build import Trainee
from osum_npu.training.meter import Meter
from osum_npu.training.optimizer import part_of
from osum_npu.training.ranks import Ranks
from osum_npu.training.sharding import blank_batch, clip, reshard, with_silence


class Computation:
    """Computes a model's losses and gradients."""

    def __init__(
        self, model: Trainee, device: torch.device, dtype: torch.dtype, ranks: Ranks, *, sharded: bool, end: int
    ) -> None:
        """Take a model.

        Args:
            model: on the device.
            device: of this rank.
            dtype: of the computation.
            ranks: of the run.
            sharded: the model is divided among the ranks, which have to compute equally often.
            end: a token id.
        """
        self.model, self.device, self.dtype, self.ranks, self.sharded = model, device, dtype, ranks, sharded
        self.end = end

    @torch.no_grad()
    def settle_dtypes(self, stages: Sequence[Stage]) -> None:
        """Compute once as if all stages were one: FSDP settles then in which dtype the gradient of a block comes."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(part_of(name) in stage.trainable for stage in stages))
        self.model.eval()
        self.forward(stages[0], blank_batch(self.end, sound=True))
        reshard(self.model)

    def forward(self, stage: Stage, batch: Batch) -> SpeechLLMOutput:
        """Compute the losses of a batch, from its samples on."""
        model = self.model
        features = log_mel(batch.wave_BS.to(self.device), batch.samples, model.encoder.config.n_mels)
        frames = [frame_count(n) for n in batch.samples]
        if batch.drawn:
            features = apply(features, batch.drawn)
        layout = None
        if stage.llm_weight:
            layout = model.layout(frames, batch.prompts, batch.answers, batch.about, batch.after).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            output: SpeechLLMOutput = model(features, frames, layout, batch.spellings if stage.ctc_weight else None)
        return output

    def backward(
        self, stage: Stage, batches: Sequence[Batch], meter: Meter, flag: bool
    ) -> tuple[dict[str, Tensor], bool]:
        """Add up this rank's gradients of a step; losses are means over all its tokens, however it is cut.

        Args:
            stage: of the run.
            batches: this rank's share of the step.
            meter: counts what is computed.
            flag: something that all ranks are to know if one of them does.

        Returns:
            The losses, in nats a token, and whether any rank has raised its flag; the same on every rank.
        """
        batches = [batch for batch in batches if batch.examples]
        spelled = 0
        if stage.ctc_weight and isinstance(self.model, SpeechLLM):
            spelled = sum(len(self.model.ctc_targets(t)) for batch in batches for t in batch.spellings)
        mine = (sum(batch.label_count for batch in batches), spelled, sum(len(b.samples) for b in batches), int(flag))
        labels, units, sounds, flags = self.ranks.counts(*mine)
        labels, units = max(1, labels), max(1, units)
        if self.sharded:
            blank = blank_batch(self.end, sound=sounds > 0)
            batches += [blank] * (self.ranks.most(len(batches)) - len(batches))
        total, ctc_total = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        with meter.computing():
            for batch in batches:
                silent = self.sharded and sounds > 0 and not batch.samples
                output = self.forward(stage, with_silence(batch) if silent else batch)
                loss = stage.llm_weight * output.loss_sum / labels
                if output.ctc_sum is not None:
                    loss = loss + stage.ctc_weight * output.ctc_sum / units
                if loss.requires_grad:
                    (loss if batch.examples else loss * 0).backward()  # type: ignore[no-untyped-call]
                if batch.examples:
                    meter.count(batch)
                    total += output.loss_sum.detach()
                    ctc_total += 0 if output.ctc_sum is None else output.ctc_sum.detach()
        losses = {"loss": self.ranks.add(total) / labels} if stage.llm_weight else {}
        if stage.ctc_weight:
            losses["ctc_loss"] = self.ranks.add(ctc_total) / units
        return losses, flags > 0

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Add up the gradients of all ranks, scale them to a norm of at most ``limit``; return the norm before."""
        if not self.sharded:
            self.ranks.add_gradients(parameters)
        return clip(parameters, limit).to(self.device)
