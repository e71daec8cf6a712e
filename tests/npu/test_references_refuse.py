"""What the references of the fused operators refuse, and by which rule.

Every call goes through the stand-in for torch_npu, so torch's dispatcher holds it to the recorded schema.
"""

import re
from pathlib import Path

import npu_emulator
import plain_formulas as formulas
import pytest
import torch
from npu_emulator.rules import RULES, Refused

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
