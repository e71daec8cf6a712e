"""The references of the fused operators against plain formulas and torch's own operators.

Every call goes through the stand-in for torch_npu, so torch's dispatcher holds it to the recorded schema.
"""

import itertools

import plain_formulas as formulas
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from npu_emulator import references, schemas
from npu_emulator.explain import TOLERANCE, error


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("seen", formulas.SEEN)
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
@pytest.mark.parametrize("version", formulas.VERSIONS)
def test_training_attention(npu, version, layout, seen):
    mine, theirs = formulas.leaves(
        torch.randn(formulas.B, formulas.N, formulas.S, formulas.D),
        torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
        torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
    )
    options, allowed = formulas.SEEN[seen]
    inputs = [formulas.write(x, layout) for x in mine]
    got = getattr(npu, version)(
        *inputs, formulas.N, layout, scale=formulas.SCALE, **formulas.spelled(version, **options)
    )[0]
    assert got.shape == inputs[0].shape
    formulas.agree(got, formulas.write(formulas.plain(*theirs, allowed), layout), mine, theirs)


@pytest.mark.parametrize("dtype", formulas.DTYPES)
@pytest.mark.parametrize("seen", ["all", "bottom right"])
def test_training_attention_rounds_once(npu, dtype, seen):
    mine, theirs = formulas.leaves(
        torch.randn(formulas.B, formulas.N, formulas.S, formulas.D),
        torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
        torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
        dtype=dtype,
    )
    options, allowed = formulas.SEEN[seen]
    got = npu.npu_fusion_attention(*mine, formulas.N, "bnsd", scale=formulas.SCALE, **options)[0]
    assert got.dtype == dtype
    formulas.agree(got, formulas.plain(*theirs, allowed), mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("mode", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("version", formulas.VERSIONS)
def test_packed_training_attention(npu, version, mode):
    """Sequences of 3, 0, 5, 1 queries and 4, 0, 5, 5 keys; trailing zeros are entries that take no part."""
    mine, theirs = formulas.leaves(
        torch.randn(9, formulas.N, formulas.D),
        torch.randn(14, formulas.K, formulas.D),
        torch.randn(14, formulas.K, formulas.D),
    )
    ends, key_ends = [*formulas.ENDS, 0, 0], [*formulas.KEY_ENDS, 0, 0]
    if version == "npu_fusion_attention_v3":
        ends, key_ends = torch.tensor(ends), torch.tensor(key_ends)
    options = {"actual_seq_qlen": ends, "actual_seq_kvlen": key_ends}
    if mode is not None:
        options |= {"sparse_mode": mode, "atten_mask": ~formulas.OWN[:5, :5] if mode == 1 else formulas.TRIANGLE}
    if mode == 4:
        options |= {"pre_tokens": 2, "next_tokens": 0}
    got = getattr(npu, version)(*mine, formulas.N, "TND", scale=formulas.SCALE, **formulas.spelled(version, **options))[
        0
    ]
    formulas.agree(got, formulas.packed_plain(*theirs, mode), mine, theirs)


def test_values_may_be_narrower_than_keys(npu):
    mine, theirs = formulas.leaves(
        torch.randn(formulas.B, formulas.N, formulas.S, formulas.D),
        torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
        torch.randn(formulas.B, formulas.K, formulas.L, 8),
    )
    formulas.agree(
        npu.npu_fusion_attention(*mine, formulas.N, "BNSD", scale=formulas.SCALE)[0],
        formulas.plain(*theirs),
        mine,
        theirs,
    )


def test_softmax_statistics_are_those_of_the_scores(npu):
    q, k = torch.randn(9, formulas.N, formulas.D), torch.randn(9, formulas.N, formulas.D)
    lengths = {"actual_seq_qlen": [4, 9], "actual_seq_kvlen": [4, 9], "scale": formulas.SCALE}
    _, highest, total, *_ = npu.npu_fusion_attention(q, k, k, formulas.N, "TND", softmax_layout="TND", **lengths)
    assert highest.shape == total.shape == (9, formulas.N, 8)
    score = torch.einsum("snd,tnd->snt", q[:4], k[:4]) * formulas.SCALE
    assert error(highest[:4, :, 0] + total[:4, :, 0].log(), score.logsumexp(-1)) <= 1e-5
    by_heads = npu.npu_fusion_attention(q, k, k, formulas.N, "TND", **lengths)[1]
    assert torch.equal(by_heads.reshape(formulas.N, 9, 8).transpose(0, 1), highest), "by default N comes before T"


@pytest.mark.parametrize("pse_type", [0, 1])
def test_position_bias_is_added_before_or_after_the_scale(npu, pse_type):
    mine, theirs = formulas.leaves(
        torch.randn(formulas.B, formulas.N, formulas.S, formulas.D),
        torch.randn(formulas.B, formulas.N, formulas.L, formulas.D),
        torch.randn(formulas.B, formulas.N, formulas.L, formulas.D),
        torch.randn(1, formulas.N, formulas.S, formulas.L),
    )
    options = {"pse": mine[3], "pse_type": pse_type, "scale": formulas.SCALE}
    got = npu.npu_fusion_attention_v2(*mine[:3], formulas.N, "BNSD", **options)[0]
    bias = theirs[3] * formulas.SCALE if pse_type else theirs[3]
    formulas.agree(got, F.scaled_dot_product_attention(*theirs[:3], attn_mask=bias), mine, theirs)


def test_dropout_keeps_the_mean_and_its_seed_decides(npu):
    q, k, v = torch.randn(1, 4, 64, formulas.D), torch.randn(1, 4, 64, formulas.D), torch.ones(1, 4, 64, formulas.D)
    drop = lambda **seed: npu.npu_fusion_attention(q, k, v, 4, "BNSD", scale=formulas.SCALE, keep_prob=0.8, **seed)  # noqa: E731
    out, _, _, _, drawn, offset, numels = drop()
    assert drawn != 0
    assert numels > 0
    assert abs(out.mean() - 1) < 0.02, "what is kept is divided by keep_prob"
    assert out.std() > 0.05
    assert torch.equal(drop(seed=drawn, offset=offset)[0], out)
    assert not torch.equal(drop(seed=drawn, offset=offset + 1)[0], out)
    assert npu.npu_fusion_attention(q, k, v, 4, "BNSD", scale=formulas.SCALE)[4:] == (0, 0, 0)


@pytest.mark.parametrize("version", formulas.VERSIONS)
def test_gradient_operators_are_the_gradients(npu, version):
    """They get seed and offset back, so that the same probabilities are dropped."""
    mine, _ = formulas.leaves(
        torch.randn(formulas.B, formulas.N, formulas.S, formulas.D),
        torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
        torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
    )
    options = {"atten_mask": formulas.TRIANGLE, "sparse_mode": 3, "keep_prob": 0.7}
    out, highest, total, _, drawn, offset, *_ = getattr(npu, version)(
        *mine, formulas.N, "BNSD", scale=formulas.SCALE, **options
    )
    slope = torch.randn_like(out)
    out.backward(slope)
    backward = getattr(npu, version.replace("attention", "attention_grad"))
    statistics = {"softmax_max": highest, "softmax_sum": total, "attention_in": out, "scale_value": formulas.SCALE}
    found = backward(*mine, slope, formulas.N, "BNSD", **statistics, **options, seed=drawn, offset=offset)
    for gradient, x in zip(found, mine):
        assert error(gradient, x.grad) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(lambda lengths: lengths[0] > 0),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
def test_packed_sequences_are_as_if_alone(lengths, key_heads, groups, causal):
    ends, formulas.heads = list(itertools.accumulate(lengths)), key_heads * groups
    q = torch.randn(ends[-1], formulas.heads, 8)
    k, v = torch.randn(2, ends[-1], key_heads, 8)
    options = {"scale": 0.3, "actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    if causal:
        options |= {"atten_mask": formulas.TRIANGLE, "sparse_mode": 3}
    got = references.call("npu_fusion_attention", q, k, v, formulas.heads, "TND", **options)[0]
    for start, end in zip([0, *ends], ends):
        for i in range(start, end):
            own = slice(start, i + 1 if causal else end)
            for head in range(formulas.heads):
                weight = torch.softmax(k[own, head // groups] @ q[i, head] * 0.3, 0)
                assert torch.allclose(got[i, head], weight @ v[own, head // groups], atol=1e-5)


@pytest.mark.parametrize("seen", formulas.SEEN)
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
@pytest.mark.parametrize("version", [1, 2])
def test_inference_attention(npu, version, layout, seen):
    if seen == "by head":
        pytest.skip("not a mask of inference attention")
    q, k, v = (
        x.half()
        for x in (
            torch.randn(formulas.B, formulas.N, formulas.S, formulas.D),
            torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
            torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
        )
    )
    options, allowed = formulas.SEEN[seen]
    got, lse = formulas.infer(npu, version, *(formulas.write(x, layout) for x in (q, k, v)), layout, **options)
    assert (
        error(got, formulas.write(formulas.plain(q.float(), k.float(), v.float(), allowed), layout))
        <= TOLERANCE[torch.half]
    )
    assert torch.equal(lse, torch.zeros(1))


@pytest.mark.parametrize("queries", [1, formulas.S])
@pytest.mark.parametrize("dtype", formulas.DTYPES[1:])
def test_inference_lengths_are_counts(npu, queries, dtype):
    q, k, v = (
        x.to(dtype)
        for x in (
            torch.randn(formulas.B, formulas.N, queries, formulas.D),
            torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
            torch.randn(formulas.B, formulas.K, formulas.L, formulas.D),
        )
    )
    got, lse = formulas.infer(npu, 1, q, k, v, lengths=(None, [formulas.L, 5]), lse=True)
    seen = (torch.arange(formulas.L) < torch.tensor([formulas.L, 5])[:, None])[:, None, None]
    assert error(got, formulas.plain(q.float(), k.float(), v.float(), seen)) <= TOLERANCE[dtype]
    score = q.float() @ k.float().repeat_interleave(formulas.N // formulas.K, 1).transpose(2, 3) * formulas.SCALE
    assert error(lse, score.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True)) <= 1e-4
    assert torch.equal(formulas.infer(npu, 1, q, k, v, lengths=(None, [5]))[0][1], got[1]), (
        "one length serves the batch"
    )
    by_mask = formulas.infer(npu, 2, q, k, v, atten_mask=~seen.expand(formulas.B, 1, queries, formulas.L))[0]
    assert error(by_mask, got.float()) <= TOLERANCE[dtype]


def test_inference_queries_past_their_length_are_zero(npu):
    q, k = (
        torch.randn(formulas.B, formulas.N, formulas.S, formulas.D).half(),
        torch.randn(formulas.B, formulas.K, formulas.L, formulas.D).half(),
    )
    got = formulas.infer(npu, 1, q, k, k, lengths=([formulas.S, 3], None))[0]
    assert got[1, :, 3:].eq(0).all()
    assert torch.equal(got[1, :, :3], formulas.infer(npu, 1, q, k, k)[0][1, :, :3])
    assert torch.equal(
        formulas.infer(npu, 1, q, k, k, "BNSD_BSND")[0], formulas.infer(npu, 1, q, k, k)[0].transpose(1, 2)
    )


@pytest.mark.parametrize("dtype", formulas.DTYPES)
def test_rms_norm(npu, dtype):
    mine, theirs = formulas.leaves(torch.randn(2, 5, 48) * 3, 1 + 0.3 * torch.randn(48), dtype=dtype)
    y, rstd = npu.npu_rms_norm(*mine, epsilon=1e-5)
    assert rstd.shape == (2, 5, 1)
    assert rstd.dtype == torch.float32
    formulas.agree(y, F.rms_norm(theirs[0], (48,), theirs[1], 1e-5), mine, theirs, TOLERANCE[dtype])


def test_add_rms_norm_returns_the_sum_last(npu):
    x, y, gamma = torch.randn(3, 16), torch.randn(3, 16), torch.randn(16)
    normal, _, total = npu.npu_add_rms_norm(x, y, gamma)
    assert torch.equal(total, x + y)
    assert error(normal, F.rms_norm(x + y, (16,), gamma, 1e-6)) <= 1e-5


def test_layer_norm(npu):
    x, weight, bias = torch.randn(3, 16), torch.randn(16), torch.randn(16)
    assert torch.allclose(npu.npu_layer_norm_eval(x, [16], weight, bias), F.layer_norm(x, (16,), weight, bias))


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize(
    ("shape", "tables"),
    [
        ((2, 3, 5, 8), (1, 1, 5, 8)),
        ((2, 5, 3, 8), (1, 5, 1, 8)),
        ((5, 2, 3, 8), (5, 1, 1, 8)),
        ((2, 3, 1, 8), (1, 1, 1, 8)),
        ((2, 3, 5, 8), (2, 1, 5, 8)),
        ((2, 5, 3, 8), (2, 5, 1, 8)),
        ((2, 3, 5, 8), (2, 3, 5, 8)),
    ],
)
def test_rotary(npu, mode, shape, tables):
    if mode == "interleave" and tables[0] == 2:
        pytest.skip("interleave takes one table for the batch")
    angle = torch.rand(*tables[:3], 4) * 6
    wide = angle.repeat_interleave(2, -1) if mode == "interleave" else angle.repeat(1, 1, 1, 2)
    mine, theirs = formulas.leaves(torch.randn(shape))
    got = npu.npu_rotary_mul(*mine, wide.cos(), wide.sin(), mode)
    formulas.agree(got, formulas.complex_rotation(theirs[0], angle, mode == "interleave"), mine, theirs)


@pytest.mark.parametrize("dtype", formulas.DTYPES)
@pytest.mark.parametrize("dim", [-1, 0])
def test_swiglu(npu, dtype, dim):
    mine, theirs = formulas.leaves(torch.randn(6, 10), dtype=dtype)
    gate, up = theirs[0].tensor_split(2, dim)
    formulas.agree(npu.npu_swiglu(*mine, dim=dim), gate * gate.sigmoid() * up, mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(npu, approximate):
    mine, theirs = formulas.leaves(torch.randn(5, 7) * 2)
    formulas.agree(
        npu.npu_gelu(*mine, approximate=approximate), F.gelu(theirs[0], approximate=approximate), mine, theirs
    )


@pytest.mark.parametrize("name", ["fast_gelu", "npu_fast_gelu"])
def test_fast_gelu(npu, name):
    mine, theirs = formulas.leaves(torch.randn(5, 7) * 2)
    formulas.agree(getattr(npu, name)(*mine), theirs[0] / (1 + torch.exp(-1.702 * theirs[0])), mine, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(npu, reduction):
    mine, theirs = formulas.leaves(torch.randn(6, 9))
    labels = torch.tensor([0, 8, 3, 3, 1, 7])
    loss, log_prob, *_ = npu.npu_cross_entropy_loss(*mine, labels, reduction=reduction)
    want = F.cross_entropy(*theirs, labels, reduction=reduction).reshape(-1)
    assert error(log_prob, theirs[0].detach().log_softmax(-1)) <= 1e-5
    formulas.agree(loss, want, mine, theirs)


@pytest.mark.parametrize("name", [name for name in schemas.recorded()["ops"] if "backward" in name])
def test_backward_operators_are_the_gradients(npu, name):
    forward = name.removesuffix("_backward")
    x, gamma, angle = torch.randn(2, 4, 3, 8), torch.randn(8), torch.rand(1, 4, 1, 4).repeat(1, 1, 1, 2)
    logits, labels = torch.randn(6, 9), torch.tensor([0, 8, 3, 3, 1, 7])
    given = {
        "npu_rms_norm": (x, gamma),
        "npu_rotary_mul": (x, angle.cos(), angle.sin()),
        "npu_cross_entropy_loss": (logits, labels),
    }.get(forward, (x,))
    trained = [y.clone().requires_grad_() if y.is_floating_point() else y for y in given]
    result = getattr(npu, forward)(*trained)
    first, *rest = result if isinstance(result, tuple) else (result,)
    slope = torch.randn_like(first)
    first.backward(slope)
    saved = {"npu_rms_norm": (x, gamma, rest[0] if rest else None), "npu_cross_entropy_loss": (rest[:1] or [0])[0]}
    if forward == "npu_cross_entropy_loss":
        found = npu.npu_cross_entropy_loss_backward(slope, saved[forward].detach(), labels)
    else:
        found = getattr(npu, name)(slope, *saved.get(forward, given))
    found = found if isinstance(found, tuple) else (found,)
    for gradient, y in zip(found, [y for y in trained if y.is_floating_point()], strict=True):
        assert error(gradient, y.grad) <= 1e-5


def test_every_reference_has_a_recorded_schema():
    assert (references.FORWARD | references.BACKWARD).keys() <= schemas.recorded()["ops"].keys()
