"""Ten mistakes that people make with fused NPU operators, seeded one by one: each is caught, and its rule is named.

The callers are right. A mistake changes what reaches the operator, as a wrong line in the caller would; the rest of the
check does not know of it.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from npu_emulator import schemas
from npu_emulator.explain import explain

N, K, S, D = 4, 2, 9, 16
ENDS = [4, 9]
SCALE = D**-0.5


def randn(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def triangle():
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def plain_attention(q, k, v, allowed):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)


class Causal:
    """A decoder's attention, grouped heads."""

    operator = "npu_fusion_attention"

    def __init__(self):
        q, k, v = randn(2, N, S, D), randn(2, K, S, D, seed=1), randn(2, K, S, D, seed=2)
        self.args = (q, k, v, N, "BNSD")
        self.kwargs = {"atten_mask": triangle(), "scale": SCALE, "sparse_mode": 3}
        self.want = plain_attention(q, k, v, torch.ones(S, S, dtype=torch.bool).tril())


class Padded(Causal):
    """An encoder's attention to a padded batch, by a mask of its own."""

    def __init__(self):
        super().__init__()
        hidden = (torch.arange(S) >= torch.tensor([S, 5])[:, None])[:, None, None].expand(2, 1, S, S)
        self.kwargs = {"atten_mask": hidden, "scale": SCALE, "inner_precise": 2}
        self.want = plain_attention(*self.args[:3], ~hidden)


class Flat(Causal):
    """Attention of as many key heads as query heads, head axis folded away."""

    def __init__(self):
        q, k, v = (randn(2, N, S, D, seed=seed) for seed in range(3))
        self.args = (*(x.transpose(1, 2).flatten(2) for x in (q, k, v)), N, "BSH")
        self.kwargs = {"scale": SCALE}
        self.want = plain_attention(q, k, v, None).transpose(1, 2).flatten(2)


class Packed(Causal):
    """Two sequences laid end to end."""

    def __init__(self):
        q, k, v = randn(S, N, D), randn(S, K, D, seed=1), randn(S, K, D, seed=2)
        self.args = (q, k, v, N, "TND")
        lengths = {"actual_seq_qlen": ENDS, "actual_seq_kvlen": ENDS}
        self.kwargs = {"atten_mask": triangle(), "scale": SCALE, "sparse_mode": 3, **lengths}
        sequence = torch.arange(S) >= ENDS[0]
        allowed = (sequence[:, None] == sequence) & torch.ones(S, S, dtype=torch.bool).tril()
        self.want = plain_attention(*(x.transpose(0, 1) for x in (q, k, v)), allowed).transpose(0, 1)


class Norm:
    """A norm in half precision."""

    operator = "npu_rms_norm"

    def __init__(self):
        x, gamma = randn(3, 64, dtype=torch.bfloat16), 1 + 0.1 * randn(64, dtype=torch.bfloat16, seed=1)
        self.args, self.kwargs = (x, gamma), {"epsilon": 1e-6}
        self.want = F.rms_norm(x.float(), (64,), gamma.float(), 1e-6).bfloat16()


class Rotary:
    """Positions turned into queries as Qwen does it."""

    operator = "npu_rotary_mul"

    def __init__(self):
        x, angle = randn(2, S, N, D), torch.rand(1, S, 1, D // 2).repeat(1, 1, 1, 2)
        self.args, self.kwargs = (x, angle.cos(), angle.sin()), {}
        turned = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
        self.want = x * angle.cos() + turned * angle.sin()


class Gate:
    """A gated activation."""

    operator = "npu_swiglu"

    def __init__(self):
        gate, up = randn(3, 8), randn(3, 8, seed=1)
        self.args, self.kwargs = (torch.cat((gate, up), -1),), {}
        self.want = F.silu(gate) * up


CASES = (Causal, Padded, Flat, Packed, Norm, Rotary, Gate)


def verdict(npu, case):
    """Run a caller against its plain formula. Returns "" where they agree, or what is wrong."""
    try:
        result = getattr(npu, case.operator)(*case.args, **case.kwargs)
    except Exception as refusal:
        return str(refusal)
    got = result[0] if isinstance(result, tuple) else result
    torch_agrees = torch.allclose(got, case.want, rtol=2e-2 if got.dtype == torch.bfloat16 else 1e-4, atol=1e-5)
    told = explain(case.operator, got, *case.args, **case.kwargs)
    assert torch_agrees == (told == ""), "the plain formula and the reference disagree"
    return told


def seed_mistake(npu, monkeypatch, operator, mistake):
    """Change what reaches an operator."""
    real = getattr(npu, operator)

    def called(*args, **kwargs):
        args, kwargs = list(args), dict(kwargs)
        mistake(args, kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(npu, operator, called)


def renamed(args, kwargs):
    kwargs["next_tokens"] = 0


def inverted(args, kwargs):
    kwargs["atten_mask"] = ~kwargs["atten_mask"]


def inverted_full(args, kwargs):
    kwargs.update(atten_mask=torch.ones(S, S, dtype=torch.bool).tril(), sparse_mode=1)


def mask_as_weights(args, kwargs):
    kwargs["atten_mask"] = kwargs["atten_mask"].float() * -1e4


def unscaled(args, kwargs):
    del kwargs["scale"]


def unmasked(args, kwargs):
    del kwargs["atten_mask"]


def not_causal(args, kwargs):
    kwargs.update(atten_mask=None, sparse_mode=0)


def interleaved(args, kwargs):
    kwargs["rotary_mode"] = "interleave"


def interleaved_throughout(args, kwargs):
    kwargs["rotary_mode"] = "interleave"
    args[1:3] = (x[..., : D // 2].repeat_interleave(2, -1) for x in args[1:3])


def up_first(args, kwargs):
    args[0] = args[0].roll(8, -1)


def wide_gamma(args, kwargs):
    args[1] = args[1].float()


def leading_zero(args, kwargs):
    kwargs.update({name: [0, *kwargs[name]] for name in ("actual_seq_qlen", "actual_seq_kvlen")})


def heads_of_the_keys(args, kwargs):
    args[3] = K


def twice_the_heads(args, kwargs):
    args[3] = 2 * N


def one_sequence(args, kwargs):
    kwargs.update(actual_seq_qlen=[S], actual_seq_kvlen=[S])


@pytest.mark.parametrize("case", CASES)
def test_right_callers_pass(npu, case):
    assert verdict(npu, case()) == ""


@pytest.mark.parametrize(
    ("case", "mistake", "named"),
    [
        (Causal, renamed, "[keyword-is-in-schema]"),
        (Causal, inverted, "[mask-true-is-masked-out]"),
        (Causal, inverted_full, "[mask-true-is-masked-out]"),
        (Padded, inverted, "[mask-true-is-masked-out]"),
        (Causal, mask_as_weights, "[mask-is-bool]"),
        (Causal, unscaled, "[scale-is-passed]"),
        (Packed, unscaled, "[scale-is-passed]"),
        (Causal, unmasked, "[mask-is-given]"),
        (Causal, not_causal, "[causal]"),
        (Packed, not_causal, "[causal]"),
        (Padded, unmasked, "[mask-is-given]"),
        (Rotary, interleaved, "[rotary-pairs]"),
        (Rotary, interleaved_throughout, "[rotary-pairs]"),
        (Gate, up_first, "[gate-comes-first]"),
        (Norm, wide_gamma, "[gamma-has-input-dtype]"),
        (Packed, leading_zero, "[no-leading-zero]"),
        (Packed, one_sequence, "[sequences-stay-apart]"),
        (Causal, heads_of_the_keys, "[head-count-is-the-shape's]"),
        (Flat, twice_the_heads, "[head-count-is-the-shape's]"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mistake_is_caught_and_its_rule_is_named(npu, monkeypatch, case, mistake, named):
    right = case()
    seed_mistake(npu, monkeypatch, right.operator, mistake)
    assert verdict(npu, right).startswith(named)


def stale_record():
    """The record of an older wheel: version 1 has since changed a keyword."""
    record = copy.deepcopy(schemas.recorded())
    entry = record["ops"]["npu_fusion_attention"]
    entry["schema"] = entry["schema"].replace("pre_tockens", "pre_tokens")
    return record


def test_a_stale_schema_is_caught_and_its_rule_is_named():
    (line,) = schemas.drift(stale_record(), schemas.recorded())
    assert line.startswith("[schema-is-current] npu_fusion_attention: recorded")
    assert schemas.drift(schemas.recorded(), schemas.recorded()) == []


def test_a_caller_of_another_schema_is_refused():
    """In a process of its own: the operators are defined once a process."""
    program = """
import torch
from npu_emulator import fake_torch_npu
from test_seeded_mistakes import Causal, stale_record

with fake_torch_npu.installed(stale_record()) as npu:
    case = Causal()
    npu.npu_fusion_attention(*case.args, **case.kwargs, pre_tockens=2048)
"""
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent)))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert "[keyword-is-in-schema]" in done.stderr
    assert "npu_fusion_attention got pre_tockens" in done.stderr


def test_what_nothing_explains_is_said_to_be_unexplained():
    case = Causal()
    told = explain(case.operator, torch.randn_like(case.want), *case.args, **case.kwargs)
    assert "no known misreading" in told
