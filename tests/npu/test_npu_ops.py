"""The NPU's implementations of ops, on the recorded schemas and strict references of the fused operators."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from npu_emulator import fake_torch_npu

from osum_npu import functional, op, parity

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SERVED = ("attention", "packed_attention", "rms_norm", "add_rms_norm", "rotary", "swiglu")


@pytest.fixture
def calls(monkeypatch):
    """The NPU's ops on a stand-in for torch_npu; the names of the fused operators that they call."""
    before = {name: dict(each.implementations) for name, each in op.REGISTRY.items()}
    ours = [name for name in sys.modules if name.startswith("osum_npu_ops.npu")]
    called = []

    def spy(name, original):
        def call(*args, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        return call

    with fake_torch_npu.installed() as torch_npu:
        for name in [name for name in vars(torch_npu) if name.startswith("npu_")]:
            monkeypatch.setattr(torch_npu, name, spy(name, getattr(torch_npu, name)))
        for name in ours:
            monkeypatch.delitem(sys.modules, name)
        import osum_npu_ops.npu  # noqa: F401

        yield called
    op.force("")
    for name, implementations in before.items():
        op.REGISTRY[name].implementations.clear()
        op.REGISTRY[name].implementations.update(implementations)
    for name in [name for name in sys.modules if name.startswith("osum_npu_ops.npu")]:
        del sys.modules[name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_values_and_gradients(calls, name, dtype):
    each = op.REGISTRY[name]
    rows = parity.check(each, each.implementations["npu"], dtype, CPU)
    assert len(rows) == len(list(each.cases(torch.Generator())))
    assert [row for row in rows if not row.ok] == []


def test_the_npu_serves_what_has_a_fused_operator_and_calls_it(calls):
    assert {name for name, each in op.REGISTRY.items() if "npu" in each.implementations} == set(SERVED)
    x = torch.randn(2, 3, 4, 16)
    compute = {name: op.REGISTRY[name].implementations["npu"].call for name in SERVED}
    compute["attention"](x, x, x, causal=True)
    compute["packed_attention"](x[0], x[0], x[0], lengths=(2, 1))
    compute["rms_norm"](x, torch.ones(16), 1e-6)
    compute["add_rms_norm"](x, x, torch.ones(16), 1e-6)
    compute["add_rms_norm"](x, x, torch.ones(16, requires_grad=True), 1e-6)  # the fused sum has no gradient
    compute["rotary"](x, x[:, :, 0].cos(), x[:, :, 0].sin())
    merged = torch.randn(3, 32)
    compute["swiglu"](*merged.chunk(2, -1))
    norms = ["npu_rms_norm", "npu_add_rms_norm", "npu_rms_norm"]
    assert calls == ["npu_fusion_attention"] * 2 + norms + ["npu_rotary_mul", "npu_swiglu"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 96), (1, 2), (3, 1112)])
def test_swiglu_of_a_merged_projection_is_one_kernel_with_the_gate_first(calls, shape, dtype):
    rng = torch.Generator().manual_seed(0)
    merged = torch.randn(shape, generator=rng).to(dtype).requires_grad_()
    slope = torch.randn((*shape[:-1], shape[-1] // 2), generator=rng)
    whole = merged * 1  # a projection's output is no leaf
    got = functional.swiglu.implementations["npu"].call(*whole.chunk(2, -1))
    got.backward(slope.to(dtype))
    exact = merged.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    want = F.silu(gate) * up
    want.backward(slope.to(dtype).double())
    forward, backward = functional.swiglu.implementations["npu"].tolerance[dtype]
    assert calls == ["npu_swiglu"]
    assert parity.relative_error(got, want) <= forward
    assert parity.relative_error(merged.grad, exact.grad) <= backward


def other_way_round(x):
    gate, up = x.chunk(2, -1)
    return up, gate


def with_a_gap(x):
    return x[..., :4], x[..., 8:12]


def of_two_tensors(x):
    return x[..., :8].clone(), x[..., 8:].clone()


@pytest.mark.parametrize("halves", [other_way_round, with_a_gap, of_two_tensors])
def test_swiglu_of_anything_else_is_not_taken_for_a_merged_projection(calls, halves):
    gate, up = halves(torch.randn(3, 16) * 1)
    got = functional.swiglu.implementations["npu"].call(gate, up)
    assert calls == []
    assert parity.relative_error(got, F.silu(gate) * up) <= 1e-6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_new_token_on_a_cache_takes_the_operator_for_inference(calls, dtype, masked):
    B, S, H, K, D = 3, 21, 8, 2, 32
    query = torch.randn(B, H, 1, D, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(B, K, S, D, dtype=dtype).transpose(1, 2) for _ in range(2))  # as transformers caches
    mask = torch.arange(S) >= torch.tensor([0, 3, S])[:, None, None] if masked else None  # the last sees nothing
    compute = functional.attention.implementations["npu"].call
    with torch.no_grad():
        got = compute(query, key, value, causal=True, mask_BTS=mask)
    assert calls == ["npu_fused_infer_attention_score"]
    want = functional.attention.reference(query.double(), key.double(), value.double(), mask_BTS=mask)
    assert parity.relative_error(got, want) <= parity_tolerance(dtype)
    calls.clear()
    compute(query.requires_grad_(), key, value)
    with torch.no_grad():
        compute(query, key.contiguous(), value)  # not as a cache lies in memory
        compute(query.float(), key.float(), value.float())
    assert calls == ["npu_fusion_attention"] * 3


def parity_tolerance(dtype):
    return functional.attention.implementations["npu"].tolerance[dtype][0]


def test_packed_sequences_of_no_length_leave_no_leading_zero(calls):
    x = [torch.randn(5, 2, 16) for _ in range(3)]
    compute = functional.packed_attention.implementations["npu"].call
    for lengths in ((0, 0, 3, 2), (3, 0, 2), (3, 2, 0)):
        want = functional.packed_attention.reference(*x, lengths=(3, 2), causal=True)
        assert parity.relative_error(compute(*x, lengths=lengths, causal=True), want) <= 1e-5


def test_what_the_operators_refuse_is_not_accepted(calls):
    x = torch.randn(1, 2, 4, 16)
    wide = torch.randn(1, 2, 1, 1024)
    tests = {
        "attention": [((wide, wide, wide), {}), ((x, x[:, :, :3], x[:, :, :3]), {}), ((x, x.half(), x), {})],
        "packed_attention": [((x[0], x[0], x[0]), {"lengths": (0,) * 1023 + (1, 1)})],
        "rms_norm": [((x[0, 0, 0], x[0, 0, 0], 1e-6), {})],
        "rotary": [((wide, wide[:, :, 0], wide[:, :, 0]), {})],
    }
    for name, refused in tests.items():
        implementation = op.REGISTRY[name].implementations["npu"]
        for args, kwargs in refused:
            assert "npu takes other arguments" in implementation.refusal(args[0].dtype, *args, **kwargs)
            assert "float64" in implementation.refusal(torch.float64, *args, **kwargs)


# -- MindSpeed, behind torch_npu


def mindspeed(monkeypatch, **operators):
    """Put a package among the modules that has MindSpeed's layout."""
    for name in ("mindspeed", "mindspeed.ops", *(f"mindspeed.ops.{module}" for module in operators)):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module, call in operators.items():
        name = "npu_fusion_attention" if module == "fusion_attention_v2" else module
        setattr(sys.modules[f"mindspeed.ops.{module}"], name, call)


def without_device(monkeypatch):
    """Let the first tiny call be made on the host, where the stand-in's operators are."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **kwargs: zeros(*size, **kwargs))


def test_mindspeed_that_is_forced_and_missing_is_an_error(calls):
    with pytest.raises(
        ValueError, match=r"OSUM_OPS='attention=mindspeed': 'mindspeed' cannot run here: .*from its source"
    ):
        op.force("attention=mindspeed")
    assert functional.attention.forced == ""


def test_mindspeed_computes_only_where_it_is_forced(calls, monkeypatch):
    import torch_npu

    mindspeed(
        monkeypatch,
        fusion_attention_v2=lambda *args, **kwargs: torch_npu.npu_fusion_attention_v2(*args, **kwargs),
        npu_rotary_position_embedding=lambda x, cos, sin, mode: torch_npu.npu_rotary_mul(
            x, cos, sin, rotary_mode=("half", "interleave")[mode]
        ),
    )
    without_device(monkeypatch)
    op.force("attention=mindspeed,rotary=mindspeed")
    calls.clear()
    for name in ("attention", "rotary"):
        each = op.REGISTRY[name]
        rows = parity.check(each, each.implementations["mindspeed"], torch.float32, CPU)
        assert rows
        assert [row for row in rows if not row.ok] == []
    assert set(calls) == {"npu_fusion_attention_v2", "npu_rotary_mul"}
    with pytest.raises(ValueError, match="forces op 'rotary' to 'mindspeed', which cannot run: the tensors are on cpu"):
        functional.rotary(*next(iter(functional.rotary.cases(torch.Generator()))).values())
