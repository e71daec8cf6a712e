"""The references of the fused operators against plain formulas and torch's own operators, and what they refuse.

Every call goes through the stand-in for torch_npu, so torch's dispatcher holds it to the recorded schema.
"""

import itertools
import re
from pathlib import Path

import npu_emulator
import plain_formulas as formulas
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from npu_emulator import references, schemas
from npu_emulator.explain import TOLERANCE, error
from npu_emulator.rules import RULES, Refused


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


q, k, m = (
    torch.randn(formulas.B, formulas.N, formulas.S, formulas.D),
    torch.randn(formulas.B, formulas.K, formulas.S, formulas.D),
    torch.randn(formulas.B, formulas.N, formulas.S, formulas.D),
)
t, u, ends = torch.randn(9, formulas.N, formulas.D), torch.randn(9, formulas.K, formulas.D), [4, 9]
h, c = torch.randn(2, 3, 5, 8), torch.rand(1, 1, 5, 4).repeat(1, 1, 1, 2)
pairs = c[..., :4].repeat_interleave(2, -1)
half, flat = (q.half(), k.half(), k.half()), q.transpose(1, 2).flatten(2)
logits, labels = torch.randn(4, 5), torch.arange(4)
WIDE = torch.randn(1, 1, 2, 770)
LOW = torch.ones(formulas.S, formulas.S, dtype=torch.bool).tril()
HOLE = torch.zeros(formulas.S, formulas.S, dtype=torch.bool).index_fill(0, torch.tensor([2]), True)


def attend(*args, version="", scale=formulas.SCALE, **options):
    return lambda npu: getattr(npu, "npu_fusion_attention" + version)(*args, scale=scale, **options)


def packed(query_ends, key_ends, *args, **options):
    return attend(
        *(args or (t, u, u)), formulas.N, "TND", actual_seq_qlen=query_ends, actual_seq_kvlen=key_ends, **options
    )


def infers(*args, **options):
    return lambda npu: formulas.infer(npu, 1, *(args or half), **options)


REFUSALS = [
    ("layout-is-known", attend(q, k, k, formulas.N, "BHSD")),
    ("layout-is-known", attend(q, k, k, formulas.N, "BNSD", softmax_layout="TND")),
    ("dimensions-fit", attend(q, k, k, formulas.N, "BSH")),
    ("dtype-is-supported", attend(q.double(), k.double(), k.double(), formulas.N, "BNSD")),
    ("dtypes-agree", attend(q.half(), k, k, formulas.N, "BNSD")),
    (
        "dtypes-agree",
        attend(q, k, k, formulas.N, "BNSD", pse=torch.zeros(1, formulas.N, formulas.S, formulas.S).half()),
    ),
    ("scale-is-passed", lambda npu: npu.npu_fusion_attention(q, k, k, formulas.N, "BNSD")),
    ("scale-is-passed", attend(q, k, k, formulas.N, "BNSD", scale=1.0)),
    ("head-count-is-the-shape's", attend(q, k, k, formulas.K, "BNSD")),
    ("head-count-is-the-shape's", attend(q, k, k, 0, "BNSD")),
    (
        "head-count-is-the-shape's",
        attend(flat, flat[..., : formulas.K * formulas.D], flat[..., : formulas.K * formulas.D], formulas.K, "BSH"),
    ),
    ("heads-are-a-multiple", attend(q[:, :5], k, k, 5, "BNSD")),
    ("head-width-fits", attend(q, k[..., :8], k[..., :8], formulas.N, "BNSD")),
    ("head-width-fits", attend(q[..., :8], k[..., :8], k, formulas.N, "BNSD")),
    ("head-width-fits", attend(WIDE, WIDE, WIDE, 1, "BNSD")),
    ("keys-fit-values", attend(q, k, k[:, :, :3], formulas.N, "BNSD")),
    ("keys-fit-values", attend(q, k[:1], k[:1], formulas.N, "BNSD")),
    ("keep-prob-is-a-probability", attend(q, k, k, formulas.N, "BNSD", keep_prob=0.0)),
    ("keep-prob-is-a-probability", attend(q, k, k, formulas.N, "BNSD", keep_prob=1.5)),
    ("mode-is-known", attend(q, k, k, formulas.N, "BNSD", sparse_mode=7)),
    ("mode-is-known", packed(ends, ends, sparse_mode=5)),
    ("mask-is-bool", attend(q, k, k, formulas.N, "BNSD", atten_mask=formulas.TRIANGLE.float(), sparse_mode=3)),
    ("mask-is-given", attend(q, k, k, formulas.N, "BNSD", sparse_mode=2)),
    ("mask-is-given", attend(q, k, k, formulas.N, "BNSD", sparse_mode=3)),
    ("mask-is-given", attend(q, k, k, formulas.N, "BNSD", sparse_mode=4)),
    ("mask-is-given", attend(q, k, k, formulas.N, "BNSD", sparse_mode=1)),
    (
        "mask-is-compressed",
        attend(q, k, k, formulas.N, "BNSD", atten_mask=formulas.TRIANGLE[: formulas.S, : formulas.S], sparse_mode=3),
    ),
    (
        "mask-is-upper-triangle",
        attend(q, k, k, formulas.N, "BNSD", atten_mask=formulas.TRIANGLE.roll(1, 1), sparse_mode=3),
    ),
    (
        "mask-is-upper-triangle",
        attend(q, k, k, formulas.N, "BNSD", atten_mask=torch.zeros_like(formulas.TRIANGLE), sparse_mode=2),
    ),
    ("mask-true-is-masked-out", attend(q, k, k, formulas.N, "BNSD", atten_mask=~formulas.TRIANGLE, sparse_mode=2)),
    ("mask-true-is-masked-out", attend(q, k, k, formulas.N, "BNSD", atten_mask=LOW, sparse_mode=1, inner_precise=2)),
    (
        "mask-shape",
        attend(q, k, k, formulas.N, "BNSD", atten_mask=torch.zeros(formulas.S, formulas.S + 1, dtype=torch.bool)),
    ),
    (
        "mask-shape",
        attend(q, k, k, formulas.N, "BNSD", atten_mask=torch.zeros(formulas.B, 1, 1, formulas.S, dtype=torch.bool)),
    ),
    (
        "mask-shape",
        attend(
            q, k, k, formulas.N, "BNSD", atten_mask=torch.zeros(formulas.B, formulas.S, formulas.S, dtype=torch.bool)
        ),
    ),
    ("mask-shape", packed(ends, ends, atten_mask=torch.zeros(9, 9, dtype=torch.bool))),
    ("row-sees-a-key", attend(q, k, k, formulas.N, "BNSD", atten_mask=HOLE)),
    ("row-sees-a-key", packed(ends, ends, atten_mask=HOLE[:5, :5], inner_precise=2)),
    ("band-needs-mask", attend(q, k, k, formulas.N, "BNSD", next_tockens=0)),
    ("band-fits-mask", attend(q, k, k, formulas.N, "BNSD", atten_mask=torch.zeros_like(HOLE), next_tockens=0)),
    (
        "band-is-not-empty",
        attend(
            q, k, k, formulas.N, "BNSD", atten_mask=formulas.TRIANGLE, sparse_mode=4, pre_tockens=-3, next_tockens=1
        ),
    ),
    (
        "queries-fit-keys",
        attend(
            q, k[:, :, :3], k[:, :, :3], formulas.N, "BNSD", version="_v2", atten_mask=formulas.TRIANGLE, sparse_mode=3
        ),
    ),
    ("padding-mask-is-none", attend(q, k, k, formulas.N, "BNSD", padding_mask=HOLE)),
    ("no-reference", attend(q, k, k, formulas.N, "BNSD", sink=torch.zeros(formulas.N))),
    ("no-reference", attend(q, k, k, formulas.N, "BNSD", atten_mask=HOLE, sparse_mode=5)),
    ("lengths-are-given", attend(t, u, u, formulas.N, "TND")),
    ("lengths-are-given", attend(q, k, k, formulas.N, "BNSD", actual_seq_qlen=[formulas.S] * formulas.B)),
    ("lengths-are-equally-many", packed(ends, [4, 6, 9])),
    ("lengths-are-cumulative", packed([6, 4, 9], [6, 4, 9])),
    ("no-leading-zero", packed([0, *ends], [0, *ends])),
    ("lengths-end-at-tokens", packed([4, 8], [4, 8])),
    ("lengths-end-at-tokens", packed([4, 10], ends)),
    ("lengths-are-few-enough", packed([1] * 1024 + [9], [1] * 1024 + [9])),
    ("dtype-is-supported", infers(q, k, k)),
    ("scale-is-passed", infers(scale=1.0)),
    ("inputs-are-contiguous", infers(half[0], half[1].transpose(2, 3).contiguous().transpose(2, 3), half[2])),
    ("head-count-is-the-shape's", infers(num_heads=formulas.K)),
    ("head-count-is-the-shape's", infers(num_key_value_heads=formulas.N)),
    ("head-width-fits", infers(*(x[..., :8].contiguous() for x in half))),
    ("lengths-are-counts", infers(lengths=(None, [formulas.S, formulas.S + 1]))),
    (
        "lengths-are-counts",
        infers(torch.cat([half[0]] * 2), *(torch.cat([x] * 2) for x in half[1:]), lengths=(None, [5, 5])),
    ),
    (
        "one-query-has-no-mode",
        infers(half[0][:, :, :1].contiguous(), *half[1:], sparse_mode=3, atten_mask=formulas.TRIANGLE),
    ),
    ("mask-shape", infers(atten_mask=torch.zeros(formulas.B, formulas.S, dtype=torch.bool))),
    ("mask-is-given", infers(sparse_mode=3)),
    ("mask-is-bool", infers(atten_mask=LOW.float())),
    ("row-sees-a-key", infers(atten_mask=HOLE)),
    ("no-reference", infers(block_table=torch.zeros(formulas.B, 1, dtype=torch.int32), block_size=128)),
    ("no-reference", lambda npu: formulas.infer(npu, 1, t.half(), u.half(), u.half(), "TND", (ends, ends))),
    ("inference-only", infers(half[0].clone().requires_grad_(), *half[1:])),
    ("inference-only", lambda npu: npu.npu_add_rms_norm(h, h, torch.ones(8).requires_grad_())),
    ("gamma-has-input-dtype", lambda npu: npu.npu_rms_norm(h.bfloat16(), torch.ones(8))),
    ("gamma-fits-input", lambda npu: npu.npu_rms_norm(h, torch.ones(5))),
    ("dimensions-fit", lambda npu: npu.npu_rms_norm(torch.ones(8), torch.ones(8))),
    ("dtype-is-supported", lambda npu: npu.npu_rms_norm(h.double(), torch.ones(8).double())),
    ("dimensions-fit", lambda npu: npu.npu_add_rms_norm(h, h[:1], torch.ones(8))),
    ("rotary-pairs", lambda npu: npu.npu_rotary_mul(h, c.cos(), c.sin(), "interleave")),
    ("rotary-pairs", lambda npu: npu.npu_rotary_mul(h, pairs.cos(), pairs.sin())),
    ("rotary-mode-is-known", lambda npu: npu.npu_rotary_mul(h, c.cos(), c.sin(), "quarter")),
    ("rotary-shape", lambda npu: npu.npu_rotary_mul(h, c[..., :4].cos(), c[..., :4].sin())),
    ("rotary-shape", lambda npu: npu.npu_rotary_mul(h, c[0].cos(), c[0].sin())),
    ("rotary-shape", lambda npu: npu.npu_rotary_mul(h, *(torch.rand(1, 3, 5, 8) for _ in range(2)))),
    ("rotary-shape", lambda npu: npu.npu_rotary_mul(h, *(torch.rand(2, 1, 5, 8) for _ in range(2)), "interleave")),
    ("rotary-shape", lambda npu: npu.npu_rotary_mul(h[..., :7], c[..., :7].cos(), c[..., :7].sin())),
    ("rotary-table-is-cosine", lambda npu: npu.npu_rotary_mul(h, c * 6, c * 6)),
    ("dtypes-agree", lambda npu: npu.npu_rotary_mul(h.bfloat16(), c.cos(), c.sin())),
    ("no-reference", lambda npu: npu.npu_rotary_mul(h, c.cos(), c.sin(), rotate=torch.eye(8))),
    ("swiglu-is-even", lambda npu: npu.npu_swiglu(h[..., :7])),
    ("dimensions-fit", lambda npu: npu.npu_swiglu(h, dim=4)),
    ("gelu-is-known", lambda npu: npu.npu_gelu(h, approximate="fast")),
    ("target-is-a-class", lambda npu: npu.npu_cross_entropy_loss(logits, torch.tensor([0, 1, -100, 2]))),
    ("target-is-a-class", lambda npu: npu.npu_cross_entropy_loss(logits, labels + 2)),
    ("dimensions-fit", lambda npu: npu.npu_cross_entropy_loss(logits, labels[:3])),
    ("reduction-is-known", lambda npu: npu.npu_cross_entropy_loss(logits, labels, reduction="max")),
    ("zloss-is-off", lambda npu: npu.npu_cross_entropy_loss(logits, labels, return_zloss=True)),
    (
        "loss-options-are-default",
        lambda npu: npu.npu_cross_entropy_loss(logits.clone().requires_grad_(), labels, label_smoothing=0.1),
    ),
    ("no-reference", lambda npu: npu.npu_apply_rotary_pos_emb(h, h, c.cos(), c.sin())),
]


@pytest.mark.parametrize(("rule", "call"), REFUSALS, ids=[f"{rule} {i}" for i, (rule, _) in enumerate(REFUSALS)])
def test_refused_by_its_rule(npu, rule, call):
    with pytest.raises(Refused) as refusal:
        call(npu)
    assert refusal.value.rule == rule
    assert str(refusal.value).startswith(f"[{rule}] {RULES[rule]}; ")


def test_every_rule_is_enforced_or_named():
    sources = "".join(path.read_text("utf-8") for path in Path(npu_emulator.__file__).parent.glob("*.py"))
    used = set(re.findall(r'"([a-z\'-]+)"', sources.replace('": (', '":').replace('": "', '":')))
    assert sorted(RULES.keys() - used) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda npu: npu.npu_fusion_attention_v2(q, k, k, formulas.N, "BNSD", None, scale=formulas.SCALE),
        lambda npu: npu.npu_fusion_attention(q, k, k, formulas.N, "BNSD", atten_mask=[[True]]),
        lambda npu: npu.npu_fusion_attention(t, u, u, formulas.N, "TND", actual_seq_qlen=torch.tensor(ends)),
        lambda npu: npu.npu_fusion_attention_v3(t, u, u, formulas.N, "TND", actual_seq_qlen=ends),
        lambda npu: npu.npu_fused_infer_attention_score(*half, formulas.N),
    ],
)
def test_the_dispatcher_refuses_what_the_schema_does_not_have(npu, call):
    with pytest.raises((RuntimeError, TypeError)) as refusal:
        call(npu)
    assert not isinstance(refusal.value, Refused)


@pytest.mark.parametrize(
    "call",
    [
        lambda npu: npu.npu_fusion_attention(q, k, k, formulas.N, "BNSD", scale=formulas.SCALE, is_causal=True),
        lambda npu: npu.npu_rms_norm(h, torch.ones(8), eps=1e-6),
    ],
)
def test_a_keyword_that_the_schema_does_not_have_breaks_a_rule(npu, call):
    with pytest.raises(Refused, match=r"\[keyword-is-in-schema\]"):
        call(npu)


def test_every_reference_has_a_recorded_schema():
    assert (references.FORWARD | references.BACKWARD).keys() <= schemas.recorded()["ops"].keys()
