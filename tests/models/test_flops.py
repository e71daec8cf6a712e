"""The formula of floating-point operations against torch's own count of a step that is really computed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from osum_npu import op
from osum_npu.models.adapters import OsumAdapterConfig
from osum_npu.models.flops import Work, count_flops
from osum_npu.models.layout import lay_out
from osum_npu.models.lora import LoraSettings
from osum_npu.models.speech_llm import SpeechLLM, make_config
from osum_npu.models.whisper import WhisperEncoderConfig
from osum_npu.training.optimizer import part_of

FRAMES, COUNT, LABELS = 1280, 2, 7
NEAR = 0.02
"""Convolutions compute some places between the utterances, and rows are filled up, which no model needs."""
STAGES = {
    "all": ("encoder", "adapter", "llm", "lora", "ctc"),
    "encoder, adapter, lora": ("encoder", "adapter", "lora"),
    "adapter alone": ("adapter",),
    "lora alone": ("lora",),
    "llm alone": ("llm",),
    "encoder alone": ("encoder",),
}


def model(**sizes):
    llm = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **sizes,
    }
    torch.manual_seed(0)
    return SpeechLLM(
        make_config(
            WhisperEncoderConfig(width=48, layers=2, heads=3),
            OsumAdapterConfig(layers=2, heads=2, feed_forward=80),
            llm,
            LoraSettings(rank=4),
            ctc_units=list("abcde"),
        )
    )


@pytest.mark.parametrize("trainable", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("sizes", [{}, {"model_type": "qwen3", "head_dim": 24}], ids=["qwen2", "qwen3"])
def test_forward_and_backward_are_those_that_torch_counts(trainable, sizes):
    whole = model(**sizes)
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(part_of(name) in trainable)
    heard = whole.speech_length(FRAMES)
    layout = lay_out([[1] * 5] * COUNT, [heard] * COUNT, [[2] * LABELS] * COUNT)
    features = torch.randn(COUNT, FRAMES, 80)
    positions = list(layout.packed)
    spellings = ["abc"] * COUNT if "ctc" in trainable else None
    work = Work([FRAMES] * COUNT, positions, COUNT * LABELS, spelled=spellings is not None)
    counted = count_flops(whole.config, trainable, work).values()
    with op.references(), FlopCounterMode(display=False) as counter:
        output = whole(features, [FRAMES] * COUNT, layout, spellings)
        forward = counter.get_total_flops()
        loss = output.loss_sum if output.ctc_sum is None else output.loss_sum + output.ctc_sum
        loss.backward()
    # the output layer's gradients are made together with the loss
    early = count_flops(whole.config, trainable, work)["head"].backward
    assert forward == pytest.approx(sum(one.forward for one in counted) + early, rel=NEAR)
    assert counter.get_total_flops() == pytest.approx(sum(one.total for one in counted), rel=NEAR)


def test_a_stage_without_the_llm_counts_the_encoder_alone():
    counted = count_flops(model().config, ("encoder", "ctc"), Work([FRAMES], [], spelled=True))
    assert set(counted) == {"encoder", "ctc"}
