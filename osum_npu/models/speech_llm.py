"""Speech encoder, adapter and LLM as one model.

Shapes: B utterances, T mel frames, M mel bins, F encoder frames, E speech embeddings, L positions, H width of the
LLM, N labelled positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from osum_npu import functional
from osum_npu.models.adapters import OsumAdapter, OsumAdapterConfig
from osum_npu.models.layout import Layout, lay_out
from osum_npu.models.llm import build_llm
from osum_npu.models.lora import LoraSettings, add_lora
from osum_npu.models.whisper import WhisperEncoder, WhisperEncoderConfig

CROSS_ENTROPY_CHUNK = 1024
"""Label positions whose logits exist at the same time."""


class SpeechLLMConfig(PreTrainedConfig):
    """Sizes of all parts; what ``config.json`` holds."""

    model_type = "speech_llm"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        adapter: dict[str, Any] | None = None,
        llm: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
        ctc: bool = False,
        llm_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Take plain dictionaries, as JSON does.

        Args:
            encoder: fields of :class:`WhisperEncoderConfig`.
            adapter: fields of :class:`OsumAdapterConfig`.
            llm: a transformers configuration with ``model_type``.
            lora: fields of :class:`LoraSettings`; ``None`` for no LoRA.
            ctc: whether the encoder has a CTC head, an auxiliary loss.
            llm_path: hub name or folder of the base LLM where the model directory does not hold its weights.
            kwargs: what every transformers configuration takes.
        """
        super().__init__(**kwargs)
        self.encoder, self.adapter, self.llm = encoder or {}, adapter or {}, llm or {}
        self.lora, self.ctc, self.llm_path = lora, ctc, llm_path


@dataclass
class SpeechLLMOutput:
    """Losses of one batch, as sums and counts, so that micro batches and ranks can be added up."""

    loss_sum: Tensor
    """Cross entropy in nats, summed over label tokens; float32."""
    label_count: int
    ctc_sum: Tensor | None
    """CTC loss in nats, summed over utterances; ``None`` without a CTC head or targets."""
    ctc_count: int
    """CTC target tokens."""


class SpeechLLM(PreTrainedModel):
    """Hears, and answers what it is asked about it."""

    config_class = SpeechLLMConfig
    base_model_prefix = ""
    main_input_name = "features"
    _supports_sdpa: ClassVar[bool] = True

    def __init__(self, config: SpeechLLMConfig, llm: PreTrainedModel | None = None) -> None:
        """Build with random weights.

        Args:
            config: sizes.
            llm: a loaded LLM to use instead of building one from ``config.llm``.
        """
        super().__init__(config)
        encoder = WhisperEncoderConfig(**config.encoder)
        self.encoder = WhisperEncoder(encoder)
        self.llm = llm if llm is not None else build_llm(config.llm)
        width: int = self.llm.get_input_embeddings().embedding_dim
        self.vocabulary: int = self.llm.get_input_embeddings().num_embeddings
        self.adapter = OsumAdapter(OsumAdapterConfig(**config.adapter), encoder.width, width)
        self.marks = nn.Parameter(torch.randn(2, width) * self.llm.config.initializer_range)
        """Embeddings of speech begin and speech end."""
        # the last class is CTC's blank
        self.ctc_head = nn.Linear(encoder.width, self.vocabulary + 1) if config.ctc else None
        if config.lora is not None:
            add_lora(self.llm, LoraSettings(**config.lora))

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: every part initialises itself."""

    def speech_length(self, frames: int) -> int:
        """Return how many speech embeddings come of ``frames`` mel frames."""
        return self.adapter.length(self.encoder.length(frames))

    def embed(self, speech_BEH: Tensor, layout: Layout) -> Tensor:
        """Build the LLM's input ``[B, L, H]``, for training and inference alike.

        Args:
            speech_BEH: speech embeddings, padded to the longest.
            layout: places of prompt, speech and answer.
        """
        tokens = self.llm.get_input_embeddings()(layout.tokens)
        width, dtype = tokens.shape[-1], speech_BEH.dtype
        table = torch.cat(
            [tokens.new_zeros(1, width).to(dtype), self.marks.to(dtype), tokens.to(dtype), speech_BEH.flatten(0, 1)]
        )
        return table[layout.source_BL]

    def forward(
        self,
        features: Tensor,
        frames: Tensor,
        layout: Layout,
        ctc_targets: Sequence[Sequence[int]] | None = None,
    ) -> SpeechLLMOutput:
        """Compute the losses of a batch; logits exist at label positions only.

        Args:
            features: float ``[B, T, M]`` log-mel, zero behind each end.
            frames: int64 ``[B]``.
            layout: made by :func:`lay_out` with answers, on the model's device.
            ctc_targets: transcript ids of each utterance, for the CTC head; an empty one is left out of the loss.
        """
        encoded_BFC, length_B = self.encoder(features, frames)
        speech_BEH, _ = self.adapter(encoded_BFC, length_B)
        hidden_BLH = self.llm.get_decoder()(
            inputs_embeds=self.embed(speech_BEH, layout),
            attention_mask=layout.mask_BL,
            position_ids=layout.position_BL,
            use_cache=False,
        ).last_hidden_state
        hidden_NH = hidden_BLH.flatten(0, 1)[layout.predictor_N]
        head = self.llm.get_output_embeddings()
        loss_sum = functional.linear_cross_entropy(
            hidden_NH, head.weight, layout.label_N, chunk=CROSS_ENTROPY_CHUNK
        )
        ctc_sum, ctc_count = None, 0
        if self.ctc_head is not None and ctc_targets is not None:
            ctc_sum, ctc_count = self._ctc(encoded_BFC, length_B, ctc_targets)
        return SpeechLLMOutput(loss_sum, len(layout.label_N), ctc_sum, ctc_count)

    def _ctc(self, encoded_BFC: Tensor, length_B: Tensor, targets: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        assert self.ctc_head is not None
        rows = [i for i, target in enumerate(targets) if target]
        flat = torch.tensor([token for target in targets for token in target], dtype=torch.int64)
        device = encoded_BFC.device
        log_probs = self.ctc_head(encoded_BFC[rows]).float().log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(
            log_probs,
            flat.to(device),
            length_B[rows],
            torch.tensor([len(targets[i]) for i in rows], device=device),
            blank=self.vocabulary,
            reduction="sum",
            zero_infinity=True,
        )
        return loss, len(flat)

    @torch.no_grad()
    def generate(
        self, features: Tensor, frames: Tensor, prompts: Sequence[Sequence[int]], **settings: Any
    ) -> Tensor:
        """Answer a prompt about each utterance; several utterances in one left-padded batch.

        Args:
            features: float ``[B, T, M]`` log-mel, zero behind each end.
            frames: int64 ``[B]``.
            prompts: token ids of each instruction.
            settings: what :meth:`transformers.GenerationMixin.generate` takes.

        Returns:
            int64 ``[B, new tokens]``, the answers only.
        """
        encoded_BFC, length_B = self.encoder(features, frames)
        speech_BEH, _ = self.adapter(encoded_BFC, length_B)
        lengths = [self.speech_length(n) for n in frames.tolist()]
        layout = lay_out(prompts, lengths, padding="left").to(speech_BEH.device)
        answer: Tensor = self.llm.generate(
            inputs_embeds=self.embed(speech_BEH, layout), attention_mask=layout.mask_BL.long(), **settings
        )
        return answer


def make_config(
    encoder: WhisperEncoderConfig,
    adapter: OsumAdapterConfig,
    llm: dict[str, Any],
    lora: LoraSettings | None,
    *,
    ctc: bool,
    llm_path: str | None = None,
) -> SpeechLLMConfig:
    """Make a model configuration of typed parts."""
    return SpeechLLMConfig(
        encoder=asdict(encoder),
        adapter=asdict(adapter),
        llm=llm,
        lora=None if lora is None else {**asdict(lora), "targets": list(lora.targets)},
        ctc=ctc,
        llm_path=llm_path,
    )
