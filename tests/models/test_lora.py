import copy

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from osum_npu.models.llm import build_llm
from osum_npu.models.lora import LoraSettings, add_lora, fold_lora, is_lora, peft_config
from osum_npu.parity import relative_error

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
SETTINGS = LoraSettings(rank=3, alpha=7, dropout=0.5)
IDS = torch.arange(14).reshape(2, 7)


def make():
    torch.manual_seed(0)
    return build_llm({"model_type": "qwen2", "num_key_value_heads": 2, **SIZES}).eval()


@torch.no_grad()
def test_it_changes_nothing_at_first():
    llm = make()
    before = llm(IDS).logits
    add_lora(llm, SETTINGS)
    assert torch.equal(llm.eval()(IDS).logits, before)


@torch.no_grad()
def test_update_is_alpha_over_rank_times_the_product():
    merged, llm = make(), make()
    add_lora(llm.eval(), SETTINGS)
    for name, parameter in llm.named_parameters():
        if is_lora(name):
            nn.init.normal_(parameter, std=0.3)
    state = dict(llm.eval().state_dict())
    for name, module in merged.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(SETTINGS.targets):
            down, up = (state[f"{name}.lora_{side}.default.weight"] for side in "AB")
            assert down.shape[0] == up.shape[1] == 3
            module.weight += 7 / 3 * up @ down
    assert relative_error(llm(IDS).logits, merged(IDS).logits) <= 1e-5
    assert relative_error(llm(IDS).logits, make()(IDS).logits) > 0.1


@torch.no_grad()
def test_folded_updates_compute_the_same_and_are_gone():
    llm = make()
    names = set(llm.state_dict())
    add_lora(llm, SETTINGS)
    for name, parameter in llm.named_parameters():
        if is_lora(name):
            parameter.normal_(std=0.1)
    llm.eval()
    want = llm(IDS).logits
    fold_lora(llm)
    assert set(llm.state_dict()) == names
    assert relative_error(llm(IDS).logits, want) <= 1e-5
    assert relative_error(make()(IDS).logits, want) > 1e-2


def test_gradients_reach_both_factors_and_dropout_acts_in_training():
    llm = make()
    add_lora(llm, SETTINGS)
    for name, parameter in llm.named_parameters():
        if is_lora(name):
            nn.init.normal_(parameter, std=0.3)
    llm.eval()(IDS).logits.square().sum().backward()
    factors = {name: p for name, p in llm.named_parameters() if is_lora(name)}
    assert len(factors) == 2 * len(SETTINGS.targets) * SIZES["num_hidden_layers"]
    assert [name for name, p in factors.items() if p.grad is None or not p.grad.any()] == []
    llm.train()
    assert not torch.equal(llm(IDS).logits, llm(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_computes_what_peft_s_own_does(dtype, autocast):
    """Also over weights of a narrower dtype, where the order of sums costs a unit in the last place."""
    computed = []
    for add in (lambda llm: add_lora(llm, SETTINGS), lambda llm: inject_adapter_in_model(peft_config(SETTINGS), llm)):
        layers = nn.ModuleDict({"q_proj": nn.Linear(24, 40)})
        add(layers.to(dtype))
        layer = layers["q_proj"]
        for number, (name, parameter) in enumerate(layer.named_parameters()):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).to(
                torch.float32 if is_lora(name) else dtype
            )
        layer.lora_dropout["default"] = nn.Dropout(0.5)
        x_BLC = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(9)).to(dtype).requires_grad_()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_BLC = layer.train()(x_BLC)
        y_BLC.float().square().sum().backward()
        learned = [p.grad for name, p in layer.named_parameters() if is_lora(name)]
        computed.append([y_BLC, x_BLC.grad, *learned])
    rough = autocast or dtype is torch.bfloat16
    for got, want in zip(*computed, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert relative_error(got, want) <= (5e-2 if rough else 1e-5)


def test_size_is_osum_s():
    with torch.device("meta"):
        llm = build_llm({"model_type": "qwen2", **QWEN2_7B})
        add_lora(llm, LoraSettings())
    sizes = {name: p.numel() for name, p in llm.named_parameters() if is_lora(name)}
    assert round(sum(sizes.values()) / 1e6, 2) == 15.14
    assert not any("up_proj" in name for name in sizes)


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="nonsense"):
        add_lora(copy.deepcopy(make()), LoraSettings(targets=("nonsense",)))
