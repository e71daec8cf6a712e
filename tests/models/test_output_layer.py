"""An LLM whose logits are more than hidden states times the output layer's weight is not trained."""

import pytest
import tiny
import torch

from osum_npu.models.llm import build_llm, check_output_layer
from osum_npu.models.lora import LoraSettings, add_lora
from osum_npu.training.loop import train

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"initializer_range": 1.0}])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_plain_output_layer_passes_and_nothing_is_left_behind(model_type, settings):
    llm = build_llm({"model_type": model_type, **SIZES, **settings}).train()
    ids = torch.tensor([[3, 4, 5]])
    before, state = llm(input_ids=ids).logits, torch.get_rng_state()
    check_output_layer(llm)
    assert torch.equal(llm(input_ids=ids).logits, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert llm.training
    assert not any(parameter.grad is not None for parameter in llm.parameters())


def test_lora_and_bfloat16_pass():
    llm = build_llm({"model_type": "qwen2", **SIZES}).bfloat16()
    add_lora(llm, LoraSettings(rank=2))
    check_output_layer(llm)


@pytest.mark.parametrize(
    ("model_type", "settings", "fault"),
    [
        ("cohere", {"logit_scale": 0.0625}, "scales or caps its logits"),
        ("granite", {"logits_scaling": 8.0}, "scales or caps its logits"),
        ("gemma2", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": None}, "scales or caps its logits"),
        ("phi", {}, "output layer has a bias"),
    ],
)
def test_others_are_refused_by_what_they_do(model_type, settings, fault):
    llm = build_llm({"model_type": model_type, **SIZES, **settings})
    with pytest.raises(ValueError, match=rf"this LLM \({model_type}\) cannot be trained here: .*{fault}.*another LLM"):
        check_output_layer(llm)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("cohere", {"logit_scale": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
        ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    ],
)
def test_the_same_families_pass_where_they_change_nothing(model_type, settings):
    check_output_layer(build_llm({"model_type": model_type, **SIZES, **settings}))


def test_a_training_says_so_before_its_first_step(corpus, tmp_path):
    config = "model.llm.config={model_type: granite, logits_scaling: 8.0, hidden_size: 32, num_hidden_layers: 1}"
    with pytest.raises(ValueError, match="it scales or caps its logits"):
        train(tiny.recipe(corpus, tmp_path / "run", config))
    assert not (tmp_path / "run" / "log.jsonl").exists()
