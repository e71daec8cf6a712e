"""Attention and rotary positions in plain torch, and the arguments that ask the fused operators for the same.

Shared by the tests of the references and of the wheel on the emulated device. Nothing here calls a reference.
"""

import torch
import torch.nn.functional as F
from npu_emulator.explain import error

B, N, K, S, L, D = 2, 6, 2, 7, 12, 16  # batch, query heads, key heads, queries, keys, head width
SCALE = D**-0.5
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
VERSIONS = ("npu_fusion_attention", "npu_fusion_attention_v2", "npu_fusion_attention_v3")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ENDS, KEY_ENDS = [3, 3, 8, 9], [4, 4, 9, 14]  # sequences of 3, 0, 5, 1 queries and 4, 0, 5, 5 keys


def write(x, layout):
    """``[B, N, S, D]`` in a dense layout."""
    return {
        "BNSD": lambda: x,
        "BSND": lambda: x.transpose(1, 2),
        "BSH": lambda: x.transpose(1, 2).flatten(2),
        "SBH": lambda: x.permute(2, 0, 1, 3).flatten(2),
    }[layout]().contiguous()


def spelled(version, **options):
    """Options in the words of a version: the bands of versions 1 and 3 are spelled tockens."""
    if version == "npu_fusion_attention_v2":
        return options
    return {name.replace("_tokens", "_tockens"): value for name, value in options.items()}


def band_mask(queries, keys, first, last):
    """What query i may see: keys from i - first to i + last."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    return (j >= i - first) & (j <= i + last)


def plain(q, k, v, allowed=None):
    """torch's attention, keys repeated by hand."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


OWN = torch.rand(S, L, generator=torch.Generator().manual_seed(1)) < 0.6
OWN[:, 0] = True
PADDED = (torch.arange(L) < torch.tensor([L, 5])[:, None])[:, None, None].expand(B, 1, S, L)
SEEN = {
    "all": ({}, None),
    "own": ({"atten_mask": ~OWN}, OWN),
    "own, mode 1, uint8": ({"atten_mask": (~OWN).to(torch.uint8), "sparse_mode": 1}, OWN),
    "padded": ({"atten_mask": ~PADDED}, PADDED),
    "by head": ({"atten_mask": ~OWN.expand(B, N, S, L)}, OWN),
    "band in mode 0": (
        {"atten_mask": ~band_mask(S, L, 2, 3), "pre_tokens": 2, "next_tokens": 3},
        band_mask(S, L, 2, 3),
    ),
    "top left": ({"atten_mask": TRIANGLE, "sparse_mode": 2}, band_mask(S, L, L, 0)),
    "bottom right": ({"atten_mask": TRIANGLE, "sparse_mode": 3}, band_mask(S, L, L, L - S)),
    "band": (
        {"atten_mask": TRIANGLE, "sparse_mode": 4, "pre_tokens": 3, "next_tokens": 1},
        band_mask(S, L, 3 - (L - S), 1 + L - S),
    ),
}
"""Options of a call, and what a query may then see."""


def packed_plain(q, k, v, mode):
    """Attention of the sequences of ENDS and KEY_ENDS, one by one; mode 1 with OWN, mode 4 with a band of 2 and 0."""
    parts = []
    for a, b, c, d in zip([0, *ENDS], ENDS, [0, *KEY_ENDS], KEY_ENDS, strict=False):
        n, m = b - a, d - c
        allowed = {
            None: None,
            1: OWN[:n, :m],
            2: band_mask(n, m, m, 0),
            3: band_mask(n, m, m, m - n),
            4: band_mask(n, m, 2 - (m - n), m - n),
        }[mode]
        parts.append(plain(*(x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])), allowed)[0].transpose(0, 1))
    return torch.cat(parts)


def infer(npu, version, q, k, v, layout="BNSD", lengths=(None, None), lse=False, **options):
    """Inference attention in the words of a version."""
    if version == 1:
        words = ("num_heads", "scale", "actual_seq_lengths", "actual_seq_lengths_kv", "softmax_lse_flag")
        operator = npu.npu_fused_infer_attention_score
    else:
        words = ("num_query_heads", "softmax_scale", "actual_seq_qlen", "actual_seq_kvlen", "return_softmax_lse")
        operator = npu.npu_fused_infer_attention_score_v2
    named = dict(zip(words, (N, SCALE, *lengths, lse), strict=True))
    return operator(q, k, v, **{"input_layout": layout, "num_key_value_heads": K, **named, **options})


def complex_rotation(x, angle, interleaved):
    """Rotary positions as multiplication by e^(i·angle); angle has half the channels."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angle))
    return turned.flatten(-2) if interleaved else torch.cat((turned[..., 0], turned[..., 1]), -1)


def leaves(*tensors, dtype=torch.float32, device="cpu"):
    """The same numbers twice: rounded to a dtype on a device, and those rounded numbers in float32 on the host."""
    mine = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in tensors]
    return mine, [x.detach().to("cpu", torch.float32, copy=True).requires_grad_() for x in mine]


def agree(got, want, inputs, wanted_inputs, tolerance=1e-4):
    """Values, and the gradients of every input for one random slope."""
    assert error(got, want) <= tolerance
    slope = torch.randn_like(want)
    want.backward(slope)
    got.backward(slope.to(got.device, got.dtype))
    for mine, theirs in zip(inputs, wanted_inputs, strict=True):
        assert mine.grad.dtype == mine.dtype
        assert error(mine.grad, theirs.grad) <= tolerance


def on_npu(options):
    """Options with their tensors on the device."""
    return {name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def heads(dtype=torch.float32, width=D):
    """Query, key and value twice, as :func:`leaves` on the device."""
    shapes = [(B, N, S, D), (B, K, L, D), (B, K, L, width)]
    return leaves(*(torch.randn(shape) for shape in shapes), dtype=dtype, device="npu")
