"""A whole Whisper that answers tasks: OSUM's first stage, before its encoder is handed to an LLM.

The encoder is this project's, which takes utterances of any length and computes each as if it were alone; the decoder
is that of transformers. It is given Whisper's own start of a transcript and the task's tag, and learns the answer::

    <|startoftranscript|><|en|><|transcribe|><|notimestamps|><TRANSCRIBE> <EMOTION> | hello<happy><|endoftext|>

Tags and labels are plain text: OSUM writes them so, and the vocabulary stays Whisper's.

Shapes: B utterances or questions about them, T mel frames, M mel bins, F encoder frames, L positions, C channels,
N labelled positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperDecoder
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from osum_npu import functional, packing
from osum_npu.checkpoints.whisper import encoder_state
from osum_npu.models.llm import ATTENTION
from osum_npu.models.speech_llm import CROSS_ENTROPY_CHUNK, SpeechLLMOutput
from osum_npu.models.whisper import WhisperEncoder, WhisperEncoderConfig
from osum_npu.tasks import Task, Utterance

START_MARKS = ("<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|transcribe|>", "<|notimestamps|>")
"""What stands before every answer, as Whisper's tokenizer writes it."""
_CHINESE = ("zh", "cmn", "yue")
"""Codes that fall back to Whisper's ``zh``: before large-v3 it has no ``yue``."""


@dataclass(frozen=True)
class TranscriptStart:
    """Writes what the decoder is given before the answer."""

    languages: frozenset[str]
    """Codes that the tokenizer has a mark for."""

    @classmethod
    def of(cls, tokenizer: Any) -> TranscriptStart:
        """Take the languages that ``tokenizer`` has marks for.

        Raises:
            ValueError: it is not that of a Whisper.
        """
        known = tokenizer.get_vocab()
        if missing := [mark for mark in (START_MARKS[0], *START_MARKS[-2:]) if mark not in known]:
            raise ValueError(f"the tokenizer has no {missing[0]}; wanted that of a Whisper")
        return cls(frozenset(code for code in LANGUAGES if f"<|{code}|>" in known))

    def __call__(self, task: Task, utterance: Utterance) -> str:
        """Write the start for one utterance; a prompt of its own is not used.

        Raises:
            ValueError: Whisper does not know the utterance's language.
        """
        code = utterance.language.split("-")[0].lower()
        if code not in self.languages and code in _CHINESE:
            code = "zh"
        if code not in self.languages:
            raise ValueError(f"this Whisper has no mark for the language {utterance.language!r}")
        return f"<|startoftranscript|><|{code}|><|transcribe|><|notimestamps|>{task.tag}"


@dataclass(frozen=True)
class DecoderLayout:
    """A batch as the decoder reads it."""

    token_BL: Tensor
    """int64: start and answer, without the last token, which predicts nothing; padded on the right."""
    predictor_N: Tensor
    """int64: flat positions (in B × L) whose output predicts a label."""
    label_N: Tensor
    """int64: the labels."""
    about_B: Tensor
    """int64: which utterance each row is about."""

    def to(self, device: torch.device) -> DecoderLayout:
        """Copy to a device."""
        return DecoderLayout(**{name: value.to(device, non_blocking=True) for name, value in self.__dict__.items()})


class WhisperEncoderDecoder(nn.Module):
    """Whisper's encoder and decoder, which learn answers."""

    def __init__(self, config: WhisperConfig, dropout: float = 0.0) -> None:
        """Build with random weights.

        Args:
            config: sizes, as transformers holds them.
            dropout: of encoder and decoder, in training.

        Raises:
            ValueError: the sizes are not Whisper's: feed-forward layers are four times as wide as the model.
        """
        super().__init__()
        if config.encoder_ffn_dim != 4 * config.d_model:
            raise ValueError(f"encoder_ffn_dim must be 4 × d_model, {4 * config.d_model}, not {config.encoder_ffn_dim}")
        config.dropout = dropout
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)
        self.encoder = WhisperEncoder(
            WhisperEncoderConfig(
                n_mels=config.num_mel_bins,
                width=config.d_model,
                layers=config.encoder_layers,
                heads=config.encoder_attention_heads,
                max_frames=config.max_source_positions,
                dropout=dropout,
            )
        )
        self.decoder = WhisperDecoder(config)
        self.decoder.set_attn_implementation(ATTENTION)

    @classmethod
    def from_pretrained(cls, name_or_path: str, dropout: float = 0.0) -> WhisperEncoderDecoder:
        """Load a folder of Hugging Face's form, or a name on a hub.

        Raises:
            ValueError: there is none, or it is no Whisper.
        """
        try:
            kind = AutoConfig.from_pretrained(name_or_path).model_type
            if kind != "whisper":
                raise ValueError(f"{name_or_path} is a model of type {kind!r}; wanted a Whisper")
            whisper = WhisperForConditionalGeneration.from_pretrained(name_or_path, dtype=torch.float32)
        except OSError as error:
            raise ValueError(
                f"the Whisper {name_or_path!r} cannot be loaded: {error}; wanted a folder of Hugging Face's form, or a "
                "name on a hub"
            ) from error
        model = cls(whisper.config, dropout)
        model.encoder.load_state_dict(encoder_state(whisper.state_dict()))
        model.decoder.load_state_dict(whisper.model.decoder.state_dict())
        model.generation_config = whisper.generation_config
        return model

    @property
    def max_answer_tokens(self) -> int:
        """Longest answer: half of the decoder's positions, as in openai-whisper; the start has the others."""
        return int(self.config.max_target_positions) // 2

    def layout(
        self,
        _frames: Sequence[int],
        starts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        about: Sequence[int | None],
        _after: Sequence[Sequence[int]] = (),
    ) -> DecoderLayout:
        """Arrange a batch.

        Args:
            _frames: mel frames of each utterance; the decoder's places do not depend on them.
            starts: token ids that the decoder is given.
            answers: token ids that it learns, end mark included.
            about: which utterance each start is about.
            _after: what a form puts before an answer; a Whisper has none.
        """
        rows = [torch.tensor([*start, *answer[:-1]]) for start, answer in zip(starts, answers)]
        token_BL = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.config.pad_token_id)
        places = [
            i * token_BL.shape[1] + torch.arange(len(start) - 1, len(start) - 1 + len(answer))
            for i, (start, answer) in enumerate(zip(starts, answers))
        ]
        labels = torch.tensor([label for row in answers for label in row])
        return DecoderLayout(token_BL, torch.cat(places), labels, torch.tensor(about))

    def forward(
        self, features: Tensor, frames: Sequence[int], layout: DecoderLayout, _spellings: None = None
    ) -> SpeechLLMOutput:
        """Compute the loss of a batch; logits exist at label positions only.

        Args:
            features: float ``[B, T, M]`` log-mel, zero behind each end.
            frames: mel frames of each utterance.
            layout: of :meth:`layout`, on the model's device.
            _spellings: for the CTC head, which this model does not have.
        """
        encoded_FC, lengths = self.encoder(features, frames)
        longest, device = max(lengths), features.device
        encoded_BFC = packing.padded(lengths, longest, device).spread(encoded_FC).view(len(lengths), longest, -1)
        inside_BF = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        encoded_BFC, inside_BF = encoded_BFC[layout.about_B], inside_BF[layout.about_B]
        hidden_BLC = self._decode(layout.token_BL, encoded_BFC, inside_BF[:, None, None])
        hidden_NC = hidden_BLC.flatten(0, 1)[layout.predictor_N]
        weight_VC = self.decoder.embed_tokens.weight
        loss_sum = functional.linear_cross_entropy(hidden_NC, weight_VC, layout.label_N, chunk=CROSS_ENTROPY_CHUNK)
        return SpeechLLMOutput(loss_sum, len(layout.label_N), None, 0)

    def _decode(self, token_BL: Tensor, encoded_BFC: Tensor, inside_B11F: Tensor) -> Tensor:
        """Run the decoder's layers; its own forward would let it attend to the encoder's padding."""
        decoder = self.decoder
        x_BLC = decoder.embed_tokens(token_BL) + decoder.embed_positions(token_BL)
        x_BLC = F.dropout(x_BLC, decoder.dropout, self.training)
        for layer in decoder.layers:
            x_BLC = layer(x_BLC, None, encoded_BFC, encoder_attention_mask=inside_B11F, use_cache=False)
        return decoder.layer_norm(x_BLC)  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write a folder that transformers loads as ``WhisperForConditionalGeneration``.

        Args:
            save_directory: folder to write to.
            state_dict: the weights, where the model itself does not hold them whole.
        """
        whisper = WhisperForConditionalGeneration(self.config)
        own = self.state_dict() if state_dict is None else state_dict
        for name, tensor in encoder_state(whisper.state_dict()).items():
            tensor.copy_(own[f"encoder.{name}"])  # shares its memory with the whole
        decoder = {name.removeprefix("decoder."): own[name] for name in own if name.startswith("decoder.")}
        whisper.model.decoder.load_state_dict(decoder)
        whisper.generation_config = self.generation_config
        # Whisper's own list suppresses < and >, without which there is no label
        whisper.generation_config.suppress_tokens = None
        whisper.save_pretrained(save_directory)
