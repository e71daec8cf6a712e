"""The op registry, what the ops mean, and that parity finds a wrong implementation."""

import math
import timeit

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_npu import backend, functional, parity
from osum_npu.op import REGISTRY, Op, force

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cpu():
    backend.load("cpu").activate()
    yield
    force("")


def scratch(name="attention"):
    """A copy of a registered op without implementations."""
    op = REGISTRY[name]
    return Op(op.reference, op.cases)


def planted(scale=1.0, drop_gradient=False, dtype=None, fill=None):
    """Attention that is right but for one planted fault."""

    def attention(query_BTHD, key_BSKD, value_BSKD, *, causal=False, mask_BTS=None, scale=None):
        scale = (query_BTHD.shape[-1] ** -0.5 if scale is None else scale) * wrong
        query = query_BTHD.detach() if drop_gradient else query_BTHD
        out = functional.attention.reference(query, key_BSKD, value_BSKD, causal=causal, mask_BTS=mask_BTS, scale=scale)
        out = out if fill is None else out.masked_fill(out == 0, fill)
        return out if dtype is None else out.to(dtype)

    wrong = scale
    return attention


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ({"scale": 1.001}, "value"),
        ({"fill": math.nan}, "value"),
        ({"drop_gradient": True}, "raised"),
        ({"dtype": torch.float64}, "raised"),
    ],
)
def test_parity_finds_a_planted_fault(fault, where):
    op = scratch()
    op.impl("cpu", dtypes=(torch.float32,))(planted(**fault))
    bad = [row for row in parity.check(op, op.implementations["cpu"], torch.float32, CPU) if not row.ok]
    assert bad
    assert all(bool(row.fault) == (where == "raised") for row in bad)


def test_parity_passes_the_same_implementation_without_the_fault():
    op = scratch()
    op.impl("cpu", dtypes=(torch.float32,))(planted())
    rows = parity.check(op, op.implementations["cpu"], torch.float32, CPU)
    assert len(rows) == len(list(op.cases(torch.Generator())))
    assert all(row.ok for row in rows)


def test_parity_finds_a_wrong_gradient_behind_a_right_value():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope / 2

    op = scratch("swiglu")
    op.impl("cpu", dtypes=(torch.float32,))(lambda gate, up: F.silu(gate) * Halved.apply(up))
    rows = parity.check(op, op.implementations["cpu"], torch.float32, CPU)
    assert all(row.forward_error < 1e-5 and row.gradient_error > 0.1 and not row.ok for row in rows)


def test_parity_leaves_out_cases_that_are_not_accepted():
    op = scratch()

    def unmasked(query_BTHD, key_BSKD, value_BSKD, *, causal=False, mask_BTS=None, scale=None):
        """No mask."""
        return mask_BTS is None

    op.impl("cpu", dtypes=(torch.float32,), accepts=unmasked)(planted())
    rows = parity.check(op, op.implementations["cpu"], torch.float32, CPU)
    assert rows
    assert not any("mask_BTS=[" in row.case for row in rows)


def test_relative_error_is_largest_difference_over_rms():
    want = torch.tensor([3.0, -4.0, 0.0, 0.0])  # rms 2.5
    assert parity.relative_error(want + torch.tensor([0, 0, 0.5, 0]), want) == pytest.approx(0.2)
    assert parity.relative_error(want.numpy(), want) == 0
    assert parity.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert parity.relative_error(torch.tensor([0, 1e-30]), torch.zeros(2)) == math.inf
    assert not parity.relative_error(np.array([math.nan, 0, 0, 0]), want) < math.inf
    with pytest.raises(ValueError, match=r"\[2\].*\[1\]"):
        parity.relative_error(torch.zeros(2), torch.zeros(1))


# -- choice of an implementation


def arguments(dtype=torch.float32):
    return [torch.randn(1, 3, 2, 16, dtype=dtype) for _ in range(3)]


def test_choice_goes_by_device_dtype_and_accepts():
    op = scratch()
    assert op.choose(*arguments()).provider == "reference"
    assert "cpu has no implementation" in op.choose(*arguments()).reason

    def full(query_BTHD, key_BSKD, value_BSKD, *, causal=False, mask_BTS=None, scale=None):
        """No causal attention."""
        return not causal

    op.impl("cpu", dtypes=(torch.float32,), accepts=full)(planted(scale=2))
    assert op.choose(*arguments()).provider == "cpu"
    assert "torch.float64" in op.choose(*arguments(torch.float64)).reason
    refused = op.choose(*arguments(), causal=True)
    assert refused.provider == "reference"
    assert "No causal attention" in refused.reason
    x = arguments()
    assert torch.equal(op(*x), op.reference(*x, scale=2 * 16**-0.5))
    assert torch.equal(op(*x, causal=True), op.reference(*x, causal=True))
    named = dict(zip(("value_BSKD", "key_BSKD", "query_BTHD"), x, strict=True))
    assert torch.equal(op(**named), op(*x[::-1]))


def test_registration_refuses_other_parameters_and_a_second_implementation():
    op = scratch("swiglu")
    with pytest.raises(ValueError, match="parameters"):
        op.impl("cpu", dtypes=(torch.float32,))(lambda up, gate: up)
    with pytest.raises(ValueError, match="parameters"):
        op.impl("cpu", dtypes=(torch.float32,))(lambda gate, up=None: gate)
    op.impl("cpu", dtypes=(torch.float32,))(lambda gate, up: gate)
    with pytest.raises(ValueError, match="already"):
        op.impl("cpu", dtypes=(torch.float32,))(lambda gate, up: gate)


def test_force_by_words_of_osum_ops(monkeypatch):
    assert functional.attention.choose(*arguments()).provider == "cpu"
    monkeypatch.setenv("OSUM_OPS", "attention=reference, swiglu=cpu")
    backend.load("cpu").activate()
    choice = functional.attention.choose(*arguments())
    assert choice.provider == "reference"
    assert "OSUM_OPS" in choice.reason
    with pytest.raises(ValueError, match=r"cannot run: cpu takes torch\.bfloat16, not torch\.float32"):
        functional.swiglu(torch.ones(2), torch.ones(2))
    assert functional.packed_attention.choose(*(x[0] for x in arguments()), lengths=(3,)).provider == "cpu"
    monkeypatch.setenv("OSUM_OPS", "")
    backend.load("cpu").activate()
    assert functional.attention.choose(*arguments()).provider == "cpu"


def test_a_forced_provider_of_another_device_is_an_error():
    op = functional.rotary
    op.impl("meta", dtypes=(torch.float32,))(op.reference)
    try:
        force("rotary=meta")
        with pytest.raises(ValueError, match="the tensors are on cpu"):
            op(*next(iter(op.cases(torch.Generator()))).values())
    finally:
        del op.implementations["meta"]


@pytest.mark.parametrize(
    ("words", "fault"),
    [("atention=cpu", "no op 'atention'"), ("attention=gpu", "not by 'gpu'"), ("attention", "not by ''")],
)
def test_force_refuses_unknown_words_and_changes_nothing(words, fault):
    with pytest.raises(ValueError, match=fault):
        force(f"swiglu=reference,{words}")
    assert functional.swiglu.forced == ""


def test_dispatch_costs_microseconds():
    x = arguments()
    seconds = min(timeit.repeat(lambda: functional.attention.choose(*x), number=1000, repeat=5)) / 1000
    assert seconds < 20e-6  # about one on a desktop


def test_dispatch_leaves_no_break_in_a_compiled_graph():
    def layer(x, weight):
        mixed = functional.attention(x, x, x, causal=True).flatten(2)
        return functional.swiglu(functional.rms_norm(mixed, weight, 1e-6), mixed)

    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(2, 5, 3, 16, dtype=dtype), torch.ones(48, dtype=dtype)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, weight), layer(x, weight))


# -- what the ops mean


def naive_attention(query, key, value, causal, mask, scale):
    """One query, one head, one sum at a time, in float64."""
    (B, T, H, D), (S, K) = query.shape, key.shape[1:3]
    out = np.zeros((B, T, H, D))
    for b, t, h in np.ndindex(B, T, H):
        kv = h // (H // K)
        seen = [
            s
            for s in range(S)
            if (not causal or s <= t + S - T) and (mask is None or mask[b, t if mask.shape[1] > 1 else 0, s])
        ]
        if seen:
            score = np.array([scale * query[b, t, h] @ key[b, s, kv] for s in seen])
            weight = np.exp(score - score.max())
            out[b, t, h] = (weight / weight.sum()) @ value[b, seen, kv]
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 2),
    st.booleans(), st.sampled_from(["none", "full", "row"]), st.sampled_from([None, 0.7]), st.integers(0, 999),
)  # fmt: skip
def test_attention_is_what_it_says(B, T, S, groups, K, causal, kind, scale, seed):
    rng = np.random.default_rng(seed)
    D = 4
    query, key, value = (rng.standard_normal((B, n, h, D)) for n, h in ((T, groups * K), (S, K), (S, K)))
    mask = None if kind == "none" else rng.random((B, T if kind == "full" else 1, S)) < 0.5
    want = naive_attention(query, key, value, causal, mask, D**-0.5 if scale is None else scale)
    x = [torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in (query, key, value)]
    options = {"causal": causal, "mask_BTS": None if mask is None else torch.tensor(mask), "scale": scale}
    for compute in (functional.attention.reference, functional.attention):
        got = compute(*x, **options)
        assert np.abs(got.detach().numpy() - want).max() < 1e-5
        gradients = torch.autograd.grad(got.sum(), x)
        assert all(g.isfinite().all() for g in gradients)
        dead = ~np.any(want != 0, axis=(2, 3))
        assert (gradients[0].numpy()[dead] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_do_not_see_each_other(causal):
    lengths = (4, 1, 6)
    x = [torch.randn(11, 2, 16) for _ in range(3)]
    before = functional.packed_attention(*x, lengths=lengths, causal=causal)
    alone = functional.attention(*(a[None, 5:] for a in x), causal=causal)[0]
    assert parity.relative_error(before[5:], alone) < 1e-5
    for a in x:
        a[:4] = torch.randn_like(a[:4])
    after = functional.packed_attention(*x, lengths=lengths, causal=causal)
    assert torch.equal(before[4:], after[4:])
    assert not torch.equal(before[:4], after[:4])


def test_packed_lengths_must_add_up():
    x = [torch.randn(5, 1, 16) for _ in range(3)]
    with pytest.raises(RuntimeError, match="split"):
        functional.packed_attention(*x, lengths=(2, 2))


def test_rms_norm_and_rotary_are_those_of_qwen2():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

    norm = Qwen2RMSNorm(48, eps=1e-6).to(torch.bfloat16)
    norm.weight.data = torch.randn(48).to(torch.bfloat16)
    x = (torch.randn(2, 5, 48) * 4).to(torch.bfloat16)
    assert torch.equal(functional.rms_norm.reference(x, norm.weight, 1e-6), norm(x))
    query, key = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    angle = torch.rand(2, 5, 8).repeat(1, 1, 2) * 6
    want = apply_rotary_pos_emb(query, key, angle.cos(), angle.sin(), unsqueeze_dim=2)
    for got, each in zip((query, key), want, strict=True):
        assert parity.relative_error(functional.rotary.reference(got, angle.cos(), angle.sin()), each) < 1e-6


def test_rms_norm_keeps_the_dtype_of_its_input():
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert functional.rms_norm(x, torch.ones(8), 1e-6).dtype == torch.bfloat16


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 8), st.integers(1, 30), st.integers(1, 25), st.booleans(), st.integers(0, 999)
)
def test_linear_cross_entropy_is_cross_entropy(N, C, V, chunk, trained, seed):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, C, generator=rng, dtype=torch.float64, requires_grad=trained)
    labels = torch.randint(V, (N,), generator=rng)
    leaves = [hidden, weight] if trained else [hidden]
    want = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    got = functional.linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    assert got.item() == pytest.approx(want.item(), rel=1e-12, abs=1e-12)
    pairs = zip(torch.autograd.grad(got * 0.3, leaves), torch.autograd.grad(want * 0.3, leaves), strict=True)
    assert all(torch.allclose(g, w, rtol=1e-10, atol=1e-12) for g, w in pairs)


def test_linear_cross_entropy_passes_finite_differences():
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, generator=rng, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    labels = torch.randint(7, (5,), generator=rng)
    assert torch.autograd.gradcheck(
        lambda h, w: functional.linear_cross_entropy(h, w, labels, chunk=2), (hidden, weight)
    )


def test_linear_cross_entropy_never_holds_more_than_a_chunk_of_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    N, C, V, chunk = 64, 4, 1000, 8

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    hidden, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    with Largest() as seen:
        functional.linear_cross_entropy(hidden, weight, torch.randint(V, (N,)), chunk=chunk).backward()
    assert seen.size == chunk * V


def test_linear_cross_entropy_in_bfloat16_sums_in_float32():
    hidden, weight = torch.randn(300, 16, dtype=torch.bfloat16), torch.randn(50, 16, dtype=torch.bfloat16)
    hidden.requires_grad_()
    labels = torch.randint(50, (300,))
    loss = functional.linear_cross_entropy(hidden, weight, labels, chunk=7)
    want = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-3)
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_linear_cross_entropy_refuses_an_ignored_label_and_no_chunk():
    hidden, weight = torch.randn(2, 4), torch.randn(5, 4)
    with pytest.raises((RuntimeError, IndexError)):
        functional.linear_cross_entropy(hidden, weight, torch.tensor([1, -100]), chunk=4)
    with pytest.raises(ValueError, match="chunk"):
        functional.linear_cross_entropy(hidden, weight, torch.tensor([1, 2]), chunk=0)
