"""Attention of the torch_npu wheel on the emulated device against plain torch on the CPU."""

import plain_formulas as formulas
import pytest
import torch
import torch.nn.functional as F
from npu_emulator.explain import TOLERANCE, error

pytestmark = pytest.mark.emulated_npu


@pytest.mark.parametrize("seen", ["all", "padded", "own, mode 1, uint8", "top left", "bottom right", "band"])
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
@pytest.mark.parametrize("version", formulas.VERSIONS)
def test_training_attention(wheel, took, version, layout, seen):
    mine, theirs = formulas.heads()
    options, allowed = formulas.SEEN[seen]
    inputs = [formulas.write(x, layout) for x in mine]
    got = getattr(wheel, version)(
        *inputs, formulas.N, layout, scale=formulas.SCALE, **formulas.spelled(version, **formulas.on_npu(options))
    )[0]
    assert got.device.type == "npu"
    formulas.agree(got, formulas.write(formulas.plain(*theirs, allowed), layout), mine, theirs)
    took({version: 1, version.replace("attention", "attention_grad"): 1})


@pytest.mark.parametrize("dtype", formulas.DTYPES)
@pytest.mark.parametrize("seen", ["all", "bottom right"])
@pytest.mark.parametrize("version", formulas.VERSIONS)
def test_training_attention_in_a_dtype(wheel, version, seen, dtype):
    mine, theirs = formulas.heads(dtype)
    options, allowed = formulas.SEEN[seen]
    got = getattr(wheel, version)(*mine, formulas.N, "BNSD", scale=formulas.SCALE, **formulas.on_npu(options))[0]
    assert got.dtype == dtype
    formulas.agree(got, formulas.plain(*theirs, allowed), mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("mode", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("version", formulas.VERSIONS)
def test_packed_training_attention(wheel, version, mode):
    shapes = [(9, formulas.N, formulas.D), (14, formulas.K, formulas.D), (14, formulas.K, formulas.D)]
    mine, theirs = formulas.leaves(*(torch.randn(shape) for shape in shapes), device="npu")
    ends, key_ends = formulas.ENDS, formulas.KEY_ENDS
    if version == "npu_fusion_attention_v3":
        ends, key_ends = torch.tensor(formulas.ENDS), torch.tensor(formulas.KEY_ENDS)
    options = {"actual_seq_qlen": ends, "actual_seq_kvlen": key_ends}
    if mode is not None:
        options |= {
            "sparse_mode": mode,
            "atten_mask": (~formulas.OWN[:5, :5] if mode == 1 else formulas.TRIANGLE).npu(),
        }
    if mode == 4:
        options |= {"pre_tokens": 2, "next_tokens": 0}
    got = getattr(wheel, version)(
        *mine, formulas.N, "TND", scale=formulas.SCALE, **formulas.spelled(version, **options)
    )[0]
    formulas.agree(got, formulas.packed_plain(*theirs, mode), mine, theirs)


@pytest.mark.parametrize("version", formulas.VERSIONS)
def test_dropout_of_forward_and_backward_is_the_same(wheel, version):
    """With v = identity the output shows which probabilities were kept; the gradient must come through those alone."""
    q = torch.randn(1, 2, 8, 8).npu()
    v = torch.eye(8).expand(1, 2, 8, 8).contiguous().npu().requires_grad_()
    kept = getattr(wheel, version)(q, q, v, 2, "BNSD", scale=formulas.SCALE, keep_prob=0.5)[0]
    assert 0.2 < kept.detach().eq(0).float().mean() < 0.8
    kept.sum().backward()
    assert error(v.grad, kept.detach().cpu().sum(-2, keepdim=True).transpose(2, 3).expand(1, 2, 8, 8)) <= 1e-5


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
@pytest.mark.parametrize("seen", ["all", "padded", "bottom right", "band"])
@torch.no_grad()
def test_inference_attention(wheel, version, layout, seen):
    mine, theirs = formulas.heads(torch.bfloat16)
    options, allowed = formulas.SEEN[seen]
    got, _ = formulas.infer(
        wheel, version, *(formulas.write(x, layout) for x in mine), layout, **formulas.on_npu(options)
    )
    assert error(got, formulas.write(formulas.plain(*theirs, allowed), layout)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", formulas.DTYPES[1:])
@torch.no_grad()
def test_a_step_of_decoding(wheel, dtype):
    shapes = [
        (formulas.B, formulas.N, 1, formulas.D),
        (formulas.B, formulas.K, formulas.L, formulas.D),
        (formulas.B, formulas.K, formulas.L, formulas.D),
    ]
    mine, theirs = formulas.leaves(*(torch.randn(shape) for shape in shapes), dtype=dtype, device="npu")
    got, lse = formulas.infer(wheel, 1, *mine, lengths=(None, [formulas.L, 5]), lse=True)
    assert error(got, formulas.plain(*theirs, formulas.SEEN["padded"][1][:, :, :1])) <= TOLERANCE[dtype]
    assert lse.shape == (formulas.B, formulas.N, 1, 1)


@pytest.mark.parametrize("dtype", formulas.DTYPES)
@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, None),
        ({"is_causal": True}, formulas.SEEN["top left"][1]),
        ({"attn_mask": formulas.SEEN["padded"][1]}, formulas.SEEN["padded"][1]),
        ({"attn_mask": formulas.SEEN["padded"][1][:, :, :1]}, formulas.SEEN["padded"][1]),
    ],
    ids=["full", "causal", "mask", "mask that broadcasts"],
)
def test_scaled_dot_product_attention_is_fused(wheel, took, dtype, options, allowed):
    mine, theirs = formulas.heads(dtype)
    got = F.scaled_dot_product_attention(*mine, enable_gqa=True, **formulas.on_npu(options))
    formulas.agree(got, formulas.plain(*theirs, allowed), mine, theirs, TOLERANCE[dtype])
    took({"npu_fusion_attention_v3": 1, "npu_fusion_attention_grad_v3": 1})


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (
            (formulas.B, formulas.N, formulas.S, formulas.D),
            {"attn_mask": torch.zeros(formulas.B, 1, formulas.S, formulas.S)},
        ),
        ((formulas.N, formulas.S, formulas.D), {}),
        ((1, 1, 2, 800), {}),
    ],
    ids=["float mask", "3-d", "too wide"],
)
def test_scaled_dot_product_attention_that_is_not_fused(wheel, took, shape, options):
    mine, theirs = formulas.leaves(*(torch.randn(shape) for _ in range(3)), device="npu")
    got = F.scaled_dot_product_attention(*mine, **formulas.on_npu(options))
    formulas.agree(got, F.scaled_dot_product_attention(*theirs, **options), mine, theirs)
    took({})
