"""The training step of the systems that this project's is measured against: padded, with all logits.

Written from what is known of ASLP-lab/OSUM (wenet/llm_asr): batches are padded to their longest; attention is a plain
product with a float32 softmax; prompt, speech and answer are padded one by one and then joined, so padding lies in the
middle; the LLM keeps all hidden states and makes float32 logits of the whole vocabulary at every position.

It computes with the weights of one of this project's models, so both losses can be held against each other.

Shapes: B utterances, T mel frames, F encoder frames, E speech embeddings, L positions, C channels, H heads, D head
width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from osum_npu.models.lora import LoraSettings, add_lora
from osum_npu.models.speech_llm import SpeechLLM

IGNORED = -100
"""Label of what is not predicted."""


class PaddedReference(nn.Module):
    """Encoder, adapter and LLM as the references compute them."""

    def __init__(self, model: SpeechLLM) -> None:
        """Copy the weights of a model with Whisper's strides, OSUM's adapter and LoRA."""
        super().__init__()
        self.encoder, self.adapter = copy.deepcopy(model.encoder), copy.deepcopy(model.adapter)
        self.marks = nn.Parameter(model.marks.detach().clone())
        config = dict(model.config.llm)
        self.llm = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config), attn_implementation="eager"
        )
        add_lora(self.llm, LoraSettings(**model.config.lora))
        self.llm.load_state_dict(model.llm.state_dict())
        for name, parameter in self.llm.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def forward(
        self, mel_BTM: Tensor, frames_B: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return the mean loss over the labels."""
        speech_BEC, embeddings_B = self._adapt(*self._encode(mel_BTM, frames_B))
        embed, device = self.llm.get_input_embeddings(), mel_BTM.device
        prompt_BL, prompt_inside = _pad(prompts, device)
        answer_BL, answer_inside = _pad(answers, device)
        marks_B1C = self.marks[:, None, None].expand(-1, len(prompts), 1, -1)
        embedded_BLC = torch.cat([embed(prompt_BL), marks_B1C[0], speech_BEC, marks_B1C[1], embed(answer_BL)], dim=1)
        one = torch.ones(len(prompts), 1, dtype=torch.bool, device=device)
        speech_inside = torch.arange(speech_BEC.shape[1], device=device) < embeddings_B[:, None]
        inside_BL = torch.cat([prompt_inside, one, speech_inside, one, answer_inside], dim=1)
        label_BL = torch.full(inside_BL.shape, IGNORED, device=device)
        label_BL[:, -answer_BL.shape[1] :] = answer_BL.masked_fill(~answer_inside, IGNORED)
        output = self.llm(
            inputs_embeds=embedded_BLC,
            attention_mask=inside_BL,
            position_ids=(inside_BL.cumsum(1) - 1).masked_fill(~inside_BL, 1),
            labels=label_BL,
            output_hidden_states=True,
            use_cache=False,
        )
        loss: Tensor = output.loss
        return loss

    def _encode(self, mel_BTM: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        encoder = self.encoder
        x_BCF = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel_BTM.transpose(1, 2)))))
        x_BFC = x_BCF.transpose(1, 2) + encoder.positional_embedding[: x_BCF.shape[2]]
        length_B = (frames_B - 1) // 2 + 1
        inside_BF = torch.arange(x_BFC.shape[1], device=x_BFC.device) < length_B[:, None]
        for block in encoder.blocks:
            attn = block.attn
            y_BFC = block.attn_ln(x_BFC)
            x_BFC = x_BFC + attn.out(
                _attend(attn.query(y_BFC), attn.key(y_BFC), attn.value(y_BFC), attn.heads, inside_BF)
            )
            x_BFC = x_BFC + block.mlp(block.mlp_ln(x_BFC))
        return encoder.ln_post(x_BFC), length_B

    def _adapt(self, x_BFC: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
        adapter = self.adapter
        x_BCE = x_BFC.transpose(1, 2)
        for conv in adapter.down.conv:
            x_BCE = F.gelu(conv(F.pad(x_BCE, (2, 0))))
            length_B = (length_B - 1) // conv.stride[0] + 1
        x_BEC = adapter.embed_norm(adapter.embed(x_BCE.transpose(1, 2))) * math.sqrt(adapter.width)
        x_BEC = x_BEC + adapter.positions[: x_BEC.shape[1]]
        inside_BE = torch.arange(x_BEC.shape[1], device=x_BEC.device) < length_B[:, None]
        for block in adapter.blocks:
            y_BEC = block.norm1(x_BEC)
            mixed = _attend(block.query(y_BEC), block.key(y_BEC), block.value(y_BEC), block.heads, inside_BE)
            x_BEC = x_BEC + block.out(mixed)
            x_BEC = x_BEC + block.feed_forward(block.norm2(x_BEC))
        return adapter.projection(adapter.after_norm(x_BEC)), length_B


def _attend(query_BTC: Tensor, key_BTC: Tensor, value_BTC: Tensor, heads: int, inside_BT: Tensor) -> Tensor:
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query_BTC, key_BTC, value_BTC))
    score_BHTT = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).float()
    outside = ~inside_BT[:, None, None]
    weight_BHTT = score_BHTT.masked_fill(outside, -torch.inf).softmax(-1).masked_fill(outside, 0.0)
    return (weight_BHTT.to(value.dtype) @ value).transpose(1, 2).flatten(2)


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    ids_BL = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    inside_BL = torch.arange(ids_BL.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return ids_BL.to(device), inside_BL.to(device)
