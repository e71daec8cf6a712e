"""Speech encoder, adapter and LLM as one model.

Shapes: B utterances, T mel frames, M mel bins; F encoder frames and E speech embeddings of all utterances, end to end;
R rows and L positions of the LLM's input, H its width, N labelled positions, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedConfig, PreTrainedModel, RepetitionPenaltyLogitsProcessor
from transformers.initialization import no_init_weights

from osum_npu import functional, packing
from osum_npu.checkpoints.shards import read_weights, write_weights
from osum_npu.models.adapters import OsumAdapter, OsumAdapterConfig
from osum_npu.models.layout import Layout, lay_out, lay_out_left
from osum_npu.models.llm import build_llm, decode_packed, load_llm
from osum_npu.models.lora import LoraSettings, add_lora, is_lora, peft_config
from osum_npu.models.whisper import WhisperEncoder, WhisperEncoderConfig
from osum_npu.tasks.text import split_words

_MARK = re.compile(r"(<[^<>]+>)")

CROSS_ENTROPY_CHUNK = 1024
"""Label positions whose logits exist at the same time."""


class SpeechLLMConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed
    """Sizes of all parts; what ``config.json`` holds."""

    model_type = "speech_llm"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        adapter: dict[str, Any] | None = None,
        llm: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
        ctc_units: list[str] | None = None,
        llm_path: str | None = None,
        form: str = "osum",
        begin_of_text: str = "none",
        **kwargs: Any,
    ) -> None:
        """Take plain dictionaries, as JSON does.

        Args:
            encoder: fields of :class:`WhisperEncoderConfig`.
            adapter: fields of :class:`OsumAdapterConfig`.
            llm: a transformers configuration with ``model_type``.
            lora: fields of :class:`LoraSettings`; ``None`` for no LoRA.
            ctc_units: labels, words and characters that a CTC head on the encoder spells, an auxiliary loss;
                ``None`` for no head.
            llm_path: hub name or folder of the base LLM where the model directory does not hold its weights.
            form: the fixed texts around instruction and speech, by name (:data:`osum_npu.tasks.form.FormName`).
            begin_of_text: which texts begin with the tokenizer's ``<s>`` (:data:`osum_npu.tasks.form.BeginOfText`).
            kwargs: what every transformers configuration takes.
        """
        super().__init__(**kwargs)
        self.encoder, self.adapter, self.llm = encoder or {}, adapter or {}, llm or {}
        self.lora, self.ctc_units, self.llm_path = lora, ctc_units, llm_path
        self.form, self.begin_of_text = form, begin_of_text


class SpeechLLMOutput(NamedTuple):
    """Losses of one batch, as sums and counts, so that micro batches and ranks can be added up.

    A tuple, because FSDP looks for tensors in what a model returns, and does not look into dataclasses.
    """

    loss_sum: Tensor
    """Cross entropy in nats, summed over label tokens; float32."""
    label_count: int
    ctc_sum: Tensor | None
    """CTC loss in nats, summed over utterances; ``None`` without a CTC head or targets."""
    ctc_count: int
    """CTC target units."""


class SpeechLLM(PreTrainedModel):  # type: ignore[misc]
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
        self.adapter = OsumAdapter(OsumAdapterConfig(**config.adapter), encoder.width, width)
        self.marks = nn.Parameter(torch.randn(2, width) * self.llm.config.initializer_range)
        """Embeddings of speech begin and speech end."""
        self.ctc_head: nn.Linear | None = None
        if config.ctc_units is not None:
            self.ctc_head = nn.Linear(encoder.width, len(config.ctc_units) + 1)  # the last class is CTC's blank
            self._ctc_ids = {unit: i for i, unit in enumerate(config.ctc_units)}
        if config.lora is not None:
            add_lora(self.llm, LoraSettings(**config.lora))

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: every part initialises itself."""

    def speech_length(self, frames: int) -> int:
        """Return how many speech embeddings come of ``frames`` mel frames."""
        return self.adapter.length(self.encoder.length(frames))

    def layout(
        self,
        frames: Sequence[int],
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        about: Sequence[int],
    ) -> Layout:
        """Arrange a batch to learn from.

        Args:
            frames: mel frames of each utterance.
            prompts: token ids of each instruction.
            answers: token ids of each answer, end mark included.
            about: which utterance each instruction is about.
        """
        lengths = [self.speech_length(n) for n in frames]
        return lay_out(prompts, lengths, answers, about)

    def embed(self, speech_EH: Tensor, layout: Layout) -> Tensor:
        """Build the LLM's input ``[R, L, H]``, for training and inference alike.

        Args:
            speech_EH: speech embeddings of all utterances.
            layout: places of prompt, speech and answer.
        """
        tokens = self.llm.get_input_embeddings()(layout.tokens)
        width, dtype = tokens.shape[-1], speech_EH.dtype
        table = torch.cat([tokens.new_zeros(1, width).to(dtype), self.marks.to(dtype), tokens.to(dtype), speech_EH])
        # a gather by index would add up gradients in an order that changes from run to run
        return F.embedding(layout.source_BL, table)

    def forward(
        self,
        features: Tensor,
        frames: Sequence[int],
        layout: Layout | None = None,
        spellings: Sequence[str] | None = None,
    ) -> SpeechLLMOutput:
        """Compute the losses of a batch; logits exist at label positions only.

        Args:
            features: float ``[B, T, M]`` log-mel.
            frames: mel frames of each utterance.
            layout: made by :meth:`layout`, on the model's device; ``None`` leaves adapter and LLM out.
            spellings: tagged transcripts for the CTC head; an empty one is left out of its loss, ``None`` leaves the
                head out.
        """
        encoded_FC, lengths = self.encoder(features, frames)
        ctc_sum, ctc_count = None, 0
        if spellings is not None:
            ctc_sum, ctc_count = self._ctc(encoded_FC, lengths, spellings)
        if layout is None:
            return SpeechLLMOutput(features.new_zeros(()), 0, ctc_sum, ctc_count)
        speech_EH, _ = self.adapter(encoded_FC, lengths)
        assert layout.packed is not None
        embedded_1LH = self.embed(speech_EH, layout)
        hidden_1LH = decode_packed(self.llm, embedded_1LH, layout.position_BL, layout.packed)
        hidden_NH = packing.Places(layout.predictor_N, hidden_1LH.shape[1]).take(hidden_1LH[0])
        head = self.llm.get_output_embeddings()
        loss_sum = functional.linear_cross_entropy(hidden_NH, head.weight, layout.label_N, chunk=CROSS_ENTROPY_CHUNK)
        return SpeechLLMOutput(loss_sum, len(layout.label_N), ctc_sum, ctc_count)

    def ctc_targets(self, spelling: str) -> list[int]:
        """Return the classes that spell a tagged transcript (``hello<male>``).

        Labels and words that the head knows are one class each; other words are spelled by their characters, and
        characters that it does not know are left out.
        """
        ids = self._ctc_ids
        words = [word for part in _MARK.split(spelling) for word in ([part] if part in ids else split_words(part))]
        return [ids[unit] for word in words for unit in ([word] if word in ids else word) if unit in ids]

    def _ctc(self, encoded_FC: Tensor, lengths: Sequence[int], spellings: Sequence[str]) -> tuple[Tensor, int]:
        if self.ctc_head is None:
            raise ValueError("this model has no CTC head: set model.ctc, or ctc_weight to 0")
        device, targets = encoded_FC.device, [self.ctc_targets(spelling) for spelling in spellings]
        rows = [i for i, target in enumerate(targets) if target]
        if not rows:  # ranks that share the head must each give it a gradient
            return self.ctc_head(encoded_FC[:1]).float().sum() * 0, 0
        log_probs_FU = self.ctc_head(encoded_FC).float().log_softmax(-1)
        longest = max(lengths)
        log_probs_BFU = packing.padded(lengths, longest, device).spread(log_probs_FU).view(len(lengths), longest, -1)
        flat = [unit for target in targets for unit in target]
        loss = F.ctc_loss(
            log_probs_BFU[rows].transpose(0, 1),
            torch.tensor(flat, device=device),
            torch.tensor([lengths[i] for i in rows], device=device),
            torch.tensor([len(targets[i]) for i in rows], device=device),
            blank=self.ctc_head.out_features - 1,
            reduction="sum",
            zero_infinity=True,
        )
        return loss, len(flat)

    def hear(self, features: Tensor, frames: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Turn sound into speech embeddings: (``[E, H]``, how many of each utterance).

        Args:
            features: float ``[B, T, M]`` log-mel.
            frames: mel frames of each utterance.
        """
        speech: tuple[Tensor, tuple[int, ...]] = self.adapter(*self.encoder(features, frames))
        return speech

    @torch.no_grad()
    def respond(
        self, speech_EH: Tensor, lengths: Sequence[int], prompts: Sequence[Sequence[int]], **settings: Any
    ) -> Tensor:
        """Answer a prompt about each utterance, in one left-padded batch.

        Args:
            speech_EH: of :meth:`hear`.
            lengths: speech embeddings of each utterance.
            prompts: token ids of each instruction.
            settings: what :meth:`transformers.GenerationMixin.generate` takes. ``repetition_penalty`` counts the
                answer's tokens only, and is 1 by default, whatever the LLM brings along.

        Returns:
            int64 ``[B, new tokens]``, the answers only.
        """
        layout = lay_out_left(prompts, lengths).to(speech_EH.device)
        # Given only embeddings, transformers' own penalty takes the first new tokens of a padded row for its padding.
        penalty = RepetitionPenaltyLogitsProcessor(settings.pop("repetition_penalty", 1.0))
        answer: Tensor = self.llm.generate(
            inputs_embeds=self.embed(speech_EH, layout),
            attention_mask=layout.mask_BL.long(),
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList([penalty, *settings.pop("logits_processor", ())]),
            **settings,
        )
        return answer

    def generate(
        self, features: Tensor, frames: Sequence[int], prompts: Sequence[Sequence[int]], **settings: Any
    ) -> Tensor:
        """Hear and respond: :meth:`hear`, then :meth:`respond`."""
        return self.respond(*self.hear(features, frames), prompts, **settings)

    def save_pretrained(
        self, save_directory: str | Path, state_dict: Mapping[str, Tensor] | None = None, **_: Any
    ) -> None:
        """Write ``config.json``, the weights, and LoRA in PEFT's own files.

        The base LLM is left out where ``config.llm_path`` says where it lies.

        Args:
            save_directory: folder to write to.
            state_dict: the weights, where the model itself does not hold them whole.
        """
        folder, left_out = Path(save_directory), self.left_out()
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        kept = {name: tensor for name, tensor in state.items() if name not in left_out}
        write_model(folder, self.config, kept, kept.__getitem__)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, llm_dtype: torch.dtype | Literal["auto"] = torch.float32, **settings: Any
    ) -> SpeechLLM:
        """Load what :meth:`save_pretrained` wrote, from a folder or a hub.

        Args:
            name_or_path: folder, or name on a hub.
            llm_dtype: of the base LLM; ``auto`` keeps that of its files, which takes no more memory than they do. All
                other parts are float32.
            settings: ``llm_path`` to take the base LLM from elsewhere; the rest goes to the download.

        Raises:
            ValueError: there is no model, a file of it is missing or damaged, or the weights do not fit the
                configuration.
        """
        try:
            config = SpeechLLMConfig.from_pretrained(name_or_path)
        except OSError as error:
            raise ValueError(f"{name_or_path} is no model directory, nor a model on a hub: {error}") from error
        config.llm_path = settings.pop("llm_path", config.llm_path)
        if not config.llm and config.llm_path is None:
            raise ValueError(
                f"{name_or_path} is no model directory of this project: its config.json names no LLM (a recipe can "
                "take a Whisper's encoder, as model.encoder_weights)"
            )
        state = read_weights(name_or_path, "model", **settings)
        llm = load_llm(config.llm_path, llm_dtype) if config.llm_path else None
        with no_init_weights():
            if llm is None:
                llm = build_llm(config.llm)  # memory that is never touched, and given back below
                llm.tie_weights()
            model = cls(config, llm)
        if config.lora is not None:
            ours = {peft_name(name): name for name in model.state_dict() if is_lora(name)}
            adapter = read_weights(name_or_path, "adapter_model", **settings)
            state |= {ours.get(name, name): tensor for name, tensor in adapter.items()}
        expected = {n: t.shape for n, t in model.state_dict().items() if n not in model.left_out()}
        faults = [f"{n} is missing" for n in sorted(expected.keys() - state.keys())]
        faults += [f"{n} is not part of the model" for n in sorted(state.keys() - expected.keys())]
        faults += [
            f"{n} has shape {tuple(state[n].shape)}, wanted {tuple(expected[n])}"
            for n in sorted(expected.keys() & state.keys())
            if state[n].shape != expected[n]
        ]
        if faults:
            raise ValueError(f"{name_or_path}: the weights do not fit config.json: {'; '.join(faults[:10])}")
        for name, tensor in state.items():
            kept = llm_dtype if name.startswith("llm.") and not is_lora(name) else torch.float32
            state[name] = tensor if kept == "auto" else tensor.to(kept)
        model.load_state_dict(state, strict=False, assign=True)
        if config.llm_path is None:
            model.llm.tie_weights()
        model.eval()
        return model

    def left_out(self) -> set[str]:
        """Name the tensors that ``model.safetensors`` does not hold: tied ones, and a base LLM kept elsewhere."""
        head, tokens = self.llm.get_output_embeddings(), self.llm.get_input_embeddings()
        left_out = {"llm.lm_head.weight"} if head.weight is tokens.weight else set()
        if self.config.llm_path is not None:
            left_out |= {name for name in self.state_dict() if name.startswith("llm.") and not is_lora(name)}
        return left_out


def write_model(
    folder: Path, config: SpeechLLMConfig, like: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> None:
    """Write what :meth:`SpeechLLM.from_pretrained` reads, tensor by tensor.

    Args:
        folder: to write to.
        config: of the model.
        like: by name in the state dict, a tensor of the shape and dtype of each that is to be stored.
        read: returns the values of one name.
    """
    config.save_pretrained(folder)
    write_weights(folder, "model", {name: like[name] for name in like if not is_lora(name)}, read)
    if config.lora is not None:
        lora = {peft_name(name): name for name in like if is_lora(name)}
        stored = {name: like[own] for name, own in lora.items()}
        write_weights(folder, "adapter_model", stored, lambda name: read(lora[name]))
        peft_config(LoraSettings(**config.lora)).save_pretrained(folder)


def peft_name(name: str) -> str:
    """Return PEFT's file name for one of our LoRA tensors."""
    return "base_model.model." + name.removeprefix("llm.").replace(".default", "")


def make_config(
    encoder: WhisperEncoderConfig,
    adapter: OsumAdapterConfig,
    llm: dict[str, Any],
    lora: LoraSettings | None,
    *,
    ctc_units: list[str] | None = None,
    llm_path: str | None = None,
    form: str = "osum",
    begin_of_text: str = "none",
) -> SpeechLLMConfig:
    """Make a model configuration of typed parts."""
    return SpeechLLMConfig(
        encoder={**asdict(encoder), "strides": list(encoder.strides)},  # as JSON holds them
        adapter={**asdict(adapter), "strides": list(adapter.strides)},
        llm=llm,
        lora=None if lora is None else lora_fields(lora),
        ctc_units=ctc_units,
        llm_path=llm_path,
        form=form,
        begin_of_text=begin_of_text,
    )


def lora_fields(lora: LoraSettings) -> dict[str, Any]:
    """Return LoRA settings as ``config.json`` holds them."""
    return {**asdict(lora), "targets": list(lora.targets)}
