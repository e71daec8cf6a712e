"""Decoders that compute with this project's ops against the same decoders of plain transformers."""

import copy
import os

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from osum_npu import backend, functional, op
from osum_npu.models.llm import ATTENTION, build_llm, load_llm, merge_projections, use_own_ops
from osum_npu.parity import relative_error

FORWARD, GRADIENT = 1e-5, 1e-4
LAYERS, VOCABULARY = 3, 97

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 20},
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "sliding window": {"model_type": "mistral", "sliding_window": 4},
}
PADDINGS = {"none": (9, 9, 9), "left": (11, 6, 1), "right": (11, 6, 1)}


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def attention_provider(request):
    backend.load("cpu").activate()
    op.force(f"attention={request.param}")
    yield
    op.force(os.environ.get(op.VARIABLE, ""))


def plain(family, attention="eager"):
    """A model of transformers with random weights in all its parts."""
    torch.manual_seed(0)
    settings = {**SIZES, **FAMILIES[family]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        deviation = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, mean=float(norm), std=0.3 if "embed" in name else deviation)
    return model


def ours(model):
    """The same model built as this project does it, with copies of the weights."""
    own = build_llm(model.config.to_dict()).eval()
    own.load_state_dict(model.state_dict())
    return own


def batch(padding):
    """Ids, mask and positions of three sequences."""
    lengths = torch.tensor(PADDINGS[padding])[:, None]
    places = torch.arange(int(lengths.max())).expand(3, -1)
    mask = places >= lengths.max() - lengths if padding == "left" else places < lengths
    ids = torch.randint(VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(1))
    return ids, mask.long(), (mask.cumsum(1) - 1).clamp(min=0)


def logits(model, ids, mask, positions):
    """Logits of all true positions, ``[N, V]``."""
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits[mask.bool()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients(family, padding, attention):
    theirs = plain(family, attention)
    mine = ours(theirs)
    got, want = logits(mine, *batch(padding)), logits(theirs, *batch(padding))
    assert relative_error(got, want) <= FORWARD

    slope = torch.randn_like(want)
    (got * slope).sum().backward()
    (want * slope).sum().backward()
    truth = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    errors = {name: relative_error(p.grad, truth.pop(name)) for name, p in mine.named_parameters()}
    assert truth == {}
    assert {name: error for name, error in errors.items() if not error <= GRADIENT} == {}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_equals_alone(family, padding):
    mine = ours(plain(family))
    ids, mask, positions = batch(padding)
    together = mine(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, inside, sequence in zip(together, mask.bool(), ids):
        alone = mine(input_ids=sequence[inside][None]).logits[0]
        assert relative_error(row[inside], alone) <= FORWARD


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_with_a_cache_gives_the_same_ids(family):
    theirs = plain(family)
    mine = ours(theirs)
    ids, mask, _ = batch("left")
    said = mine.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for row, sequence, inside in zip(said[:, ids.shape[1] :], ids, mask.bool()):
        sequence = sequence[inside]
        for token in row:  # no cache, no padding, no generate()
            assert token == theirs(input_ids=sequence[None], use_cache=False).logits[0, -1].argmax()
            sequence = torch.cat([sequence, token[None]])
    assert len(set(said[:, ids.shape[1] :].flatten().tolist())) > 5, "the text is too dull to tell anything"


@torch.no_grad()
def test_every_layer_computes_with_the_ops(monkeypatch):
    calls = []

    def spy(name):
        original = getattr(functional, name)

        def call(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(functional, name, call)

    mine = ours(plain("qwen3"))
    names = ("attention", "rotary", "rms_norm", "add_rms_norm", "swiglu")
    for name in names:
        spy(name)
    ids, mask, positions = batch("left")
    logits(mine, ids, mask, positions)
    assert [calls.count(name) for name in names] == [LAYERS, 2 * LAYERS, 3 * LAYERS + 1, LAYERS, LAYERS]
    calls.clear()
    mine.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert calls.count("attention") == 4 * LAYERS


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["attention", "rms_norm", "swiglu"])
def test_what_the_ops_return_is_what_is_used(name, padding, monkeypatch):
    mine = ours(plain("qwen2"))
    before = logits(mine, *batch(padding))
    original = getattr(functional, name)
    monkeypatch.setattr(functional, name, lambda *args, **kwargs: 1.1 * original(*args, **kwargs))
    assert relative_error(logits(mine, *batch(padding)), before) > 1e-2


def test_weights_are_shared_and_keep_their_names():
    theirs = plain("qwen3")
    before = {name: tensor.data_ptr() for name, tensor in theirs.state_dict().items()}
    mine = use_own_ops(theirs)
    assert mine is theirs
    assert {name: tensor.data_ptr() for name, tensor in mine.state_dict().items()} == before
    assert mine.config._attn_implementation == ATTENTION


OTHERS = {
    "gemma": {**SIZES, "model_type": "gemma", "head_dim": 12},
    "granite": {**SIZES, "model_type": "granite", "attention_multiplier": 0.6},
    "bitnet": {**SIZES, "model_type": "bitnet", "hidden_act": "silu"},
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
}


def other(settings):
    torch.manual_seed(0)
    settings = dict(settings)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_norms_and_feed_forwards_that_compute_something_else_are_left_alone(settings):
    theirs = other(settings)
    mine = use_own_ops(copy.deepcopy(theirs))
    for padding in PADDINGS:
        assert relative_error(logits(mine, *batch(padding)), logits(theirs, *batch(padding))) <= FORWARD


def test_an_attention_of_another_kind_is_refused():
    mine = use_own_ops(other({**SIZES, "model_type": "gemma2", "head_dim": 12}))
    with pytest.raises(ValueError, match="needs 'softcap'"):
        logits(mine, *batch("none"))


def test_loading_a_folder(tmp_path):
    theirs = plain("qwen2")
    theirs.save_pretrained(tmp_path)
    mine = load_llm(str(tmp_path)).eval()
    assert mine.config._attn_implementation == ATTENTION
    assert relative_error(logits(mine, *batch("left")), logits(theirs, *batch("left"))) <= FORWARD


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_projections_compute_the_same_and_keep_their_names(family):
    apart = use_own_ops(plain(family))
    merged = copy.deepcopy(apart)
    merge_projections(merged)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert relative_error(merged(ids).logits, apart(ids).logits) <= FORWARD
    assert merged.state_dict().keys() == apart.state_dict().keys()
    assert all(torch.equal(weight, merged.state_dict()[name]) for name, weight in apart.state_dict().items())
    taken = [module.gate_up is not None for module in merged.modules() if hasattr(module, "gate_up")]
    assert taken == [family != "llama with biases"] * LAYERS
