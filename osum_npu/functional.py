"""The ops of the models: what each one means, in plain torch.

Each function here is the contract that a backend's faster way is held to (``osum_npu.parity``), and what runs where
there is none. References compute in float32 (float64 for float64 input) and return the dtype of their input.

Shapes: B batch, T queries (or tokens), S keys, H query heads, K key heads (H is a multiple of K), D head width,
C channels, N labelled tokens, V vocabulary. One sequence of packed tokens has no B.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from osum_npu.op import op


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _attention_cases(rng: Generator) -> Iterator[dict[str, Any]]:
    shapes = [  # B, T, S, H, K, D
        (2, 7, 7, 4, 4, 48),
        (1, 1, 1, 1, 1, 16),
        (2, 33, 33, 6, 2, 64),
        (2, 3, 17, 4, 1, 32),
        (1, 9, 4, 2, 2, 128),
        (3, 1, 13, 8, 4, 24),
    ]
    for B, T, S, H, K, D in shapes:
        query = torch.randn(B, H, T, D, generator=rng).transpose(1, 2)  # as transformers lays it out
        key, value = (torch.randn(B, S, K, D, generator=rng) for _ in range(2))
        inputs = {"query_BTHD": query, "key_BSKD": key, "value_BSKD": value}
        some = torch.rand(B, T, S, generator=rng) < 0.6
        some[-1, 0] = False  # a query that may attend to nothing
        padding = torch.arange(S) >= torch.arange(B)[:, None, None]  # left padding by 0, 1, 2 … keys
        for causal in (False, True):
            for mask in (None, some, padding):
                yield {**inputs, "causal": causal, "mask_BTS": mask}
    yield {**inputs, "causal": True, "mask_BTS": torch.zeros(B, T, S, dtype=torch.bool)}
    yield {**inputs, "scale": 0.5}


@op(cases=_attention_cases)
def attention(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    causal: bool = False,
    mask_BTS: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention; query head ``h`` reads key head ``h // (H // K)``.

    Args:
        query_BTHD: queries.
        key_BSKD: keys.
        value_BSKD: values.
        causal: query i sees key j only where ``j <= i + S - T``: the last query sees every key.
        mask_BTS: boolean, ``[B, T, S]`` or ``[B, 1, S]``; True where a query may attend. Holds besides ``causal``.
        scale: factor of the scores; ``1 / sqrt(D)`` by default.

    Returns:
        ``[B, T, H, D]``. A query that may attend to nothing gets zero, and passes no gradient.
    """
    B, T, H, D = query_BTHD.shape
    S, K = key_BSKD.shape[1:3]
    query_BTKGD = _wide(query_BTHD).reshape(B, T, K, H // K, D)
    score_BKGTS = torch.einsum("btkgd,bskd->bkgts", query_BTKGD, _wide(key_BSKD))
    score_BKGTS = score_BKGTS * (D**-0.5 if scale is None else scale)
    allowed = torch.ones(T, S, dtype=torch.bool, device=query_BTHD.device)
    if causal:
        allowed = allowed.tril(S - T)
    if mask_BTS is not None:
        allowed = allowed & mask_BTS[:, None, None]
    # The lowest finite score instead of -inf, and zero after the softmax: a row without any key stays free of NaN.
    score_BKGTS = score_BKGTS.masked_fill(~allowed, torch.finfo(score_BKGTS.dtype).min)
    weight_BKGTS = score_BKGTS.softmax(-1).masked_fill(~allowed, 0.0)
    out_BTKGD = torch.einsum("bkgts,bskd->btkgd", weight_BKGTS, _wide(value_BSKD))
    return out_BTKGD.flatten(2, 3).to(query_BTHD.dtype)


def _packed_attention_cases(rng: Generator) -> Iterator[dict[str, Any]]:
    shapes = [((5, 1, 11), 4, 4, 48), ((1,), 1, 1, 16), ((3, 0, 19, 2), 6, 2, 64), ((13, 13), 4, 1, 128)]
    for lengths, H, K, D in shapes:
        query = torch.randn(sum(lengths), H, D, generator=rng)
        key, value = (torch.randn(sum(lengths), K, D, generator=rng) for _ in range(2))
        inputs = {"query_THD": query, "key_TKD": key, "value_TKD": value, "lengths": lengths}
        yield inputs
        yield {**inputs, "causal": True, "scale": 0.2}


@op(cases=_packed_attention_cases)
def packed_attention(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    *,
    lengths: tuple[int, ...],
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Self-attention of sequences laid end to end; none sees another.

    Args:
        query_THD: queries of all sequences.
        key_TKD: keys, likewise.
        value_TKD: values, likewise.
        lengths: tokens of each sequence, on the host; they add up to T.
        causal: each token sees its own sequence up to itself.
        scale: factor of the scores; ``1 / sqrt(D)`` by default.

    Returns:
        ``[T, H, D]``.
    """
    parts = zip(*(torch.split(x[None], list(lengths), 1) for x in (query_THD, key_TKD, value_TKD)), strict=True)
    return torch.cat([attention.reference(q, k, v, causal=causal, scale=scale)[0] for q, k, v in parts])


def _rms_norm_cases(rng: Generator) -> Iterator[dict[str, Any]]:
    for *shape, C in [(2, 7, 64), (1, 1, 3584), (5, 3, 2, 48), (1, 1)]:
        x, weight = torch.randn(*shape, C, generator=rng) * 3, 1 + 0.3 * torch.randn(C, generator=rng)
        yield {"x": x, "weight": weight, "eps": 1e-6 if C > 1 else 0.5}  # one channel alone has a gradient by eps only


@op(cases=_rms_norm_cases)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, as Qwen2 does it.

    Args:
        x: ``[…, C]``.
        weight: ``[C]``.
        eps: added to the mean square.

    Returns:
        ``[…, C]`` in the dtype of ``x``: normalised in float32, rounded, then multiplied by ``weight``.
    """
    return _rms_norm(x, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normal.to(x.dtype)).to(x.dtype)


def _add_rms_norm_cases(rng: Generator) -> Iterator[dict[str, Any]]:
    for case in _rms_norm_cases(rng):
        yield {"x": case["x"], "residual": torch.randn(case["x"].shape, generator=rng), **case}


@op(cases=_add_rms_norm_cases)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a layer's output to its residual stream and norm the sum.

    Args:
        x: ``[…, C]``.
        residual: ``[…, C]``.
        weight: ``[C]``, as of :func:`rms_norm`.
        eps: likewise.

    Returns:
        (normed sum, sum), both ``[…, C]`` in the dtype of ``x``.
    """
    total = residual + x
    return _rms_norm(total, weight, eps), total


def _rotary_cases(rng: Generator) -> Iterator[dict[str, Any]]:
    for B, T, H, D in [(2, 7, 4, 48), (1, 1, 1, 16), (3, 33, 2, 128)]:
        angle_BTD = torch.rand(B, T, D // 2, generator=rng).mul(6.3).repeat(1, 1, 2)
        x_BTHD = torch.randn(B, T, H, D, generator=rng)
        yield {"x_BTHD": x_BTHD, "cos_BTD": angle_BTD.cos(), "sin_BTD": angle_BTD.sin()}
        yield {"x_BTHD": x_BTHD, "cos_BTD": angle_BTD[:1].cos(), "sin_BTD": angle_BTD[:1].sin()}


@op(cases=_rotary_cases)
def rotary(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Turn channel i with channel i + D/2 by the angle of its position, as LLaMA and Qwen2 do it.

    Args:
        x_BTHD: queries or keys; D is even.
        cos_BTD: cosines, ``[B, T, D]`` or ``[1, T, D]``, each half of D the same.
        sin_BTD: sines, likewise.

    Returns:
        ``[B, T, H, D]``.
    """
    x, cos, sin = _wide(x_BTHD), _wide(cos_BTD).unsqueeze(2), _wide(sin_BTD).unsqueeze(2)
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x_BTHD.dtype)


def _swiglu_cases(rng: Generator) -> Iterator[dict[str, Any]]:
    for shape in [(2, 7, 96), (1, 1), (3, 1111)]:
        yield {"gate": torch.randn(shape, generator=rng) * 2, "up": torch.randn(shape, generator=rng)}


@op(cases=_swiglu_cases)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gated activation ``silu(gate) * up``, two tensors of one shape."""
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


_CLASSES = 512
"""Rows of a projection in one product on a CPU: up to twice as fast there as one product with all of them."""


def _logits(hidden_NC: Tensor, weight_VC: Tensor) -> Tensor:
    """Return ``hidden @ weight.T``."""
    if not hidden_NC.is_cpu or hidden_NC.dtype is torch.bfloat16 or torch.is_autocast_enabled("cpu"):
        return hidden_NC @ weight_VC.T
    product_NV = hidden_NC.new_empty(len(hidden_NC), len(weight_VC))
    for start in range(0, len(weight_VC), _CLASSES):
        rows = slice(start, start + _CLASSES)
        torch.mm(hidden_NC, weight_VC[rows].T, out=product_NV[:, rows])
    return product_NV


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients together with the loss, so that the logits of a chunk are made once and dropped at once."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, chunk: int, gradients: bool
    ) -> Tensor:
        wide = torch.promote_types(hidden_NC.dtype, torch.float32)
        to_hidden, to_weight = (gradients and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden_NC, dtype=wide) if to_hidden else None
        weight_gradient = torch.zeros_like(weight_VC, dtype=wide) if to_weight else None
        loss = torch.zeros((), dtype=wide, device=hidden_NC.device)
        for start in range(0, len(labels_N), chunk):
            hidden, labels = hidden_NC[start : start + chunk], labels_N[start : start + chunk, None]
            product = _logits(hidden, weight_VC)
            logits = product.to(wide)
            normaliser = logits.logsumexp(-1, keepdim=True)
            loss += (normaliser - logits.gather(1, labels)).sum()
            if to_hidden or to_weight:
                probability = logits.sub_(normaliser).exp_()
                slope = probability.scatter_add_(1, labels, probability.new_full(labels.shape, -1.0)).to(product.dtype)
            if hidden_gradient is not None:
                hidden_gradient[start : start + chunk] = slope @ weight_VC
            if weight_gradient is not None:
                weight_gradient += slope.T @ hidden
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtypes = hidden_NC.dtype, weight_VC.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (g * slope).to(dtype) for g, dtype in gradients), None, None, None


def _linear_cross_entropy_cases(rng: Generator) -> Iterator[dict[str, Any]]:
    for N, C, V, chunk in [(7, 16, 33, 3), (1, 8, 5, 64), (64, 48, 600, 16)]:
        yield {
            "hidden_NC": torch.randn(N, C, generator=rng),
            "weight_VC": torch.randn(V, C, generator=rng) * C**-0.5,
            "labels_N": torch.randint(V, (N,), generator=rng),
            "chunk": chunk,
        }


@op(cases=_linear_cross_entropy_cases)
def linear_cross_entropy(hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, *, chunk: int) -> Tensor:
    """Sum over N of the cross entropy of ``hidden @ weight.T``, never holding more than ``chunk`` rows of logits.

    The products are made in the dtype of the input, the cross entropy in float32.

    Args:
        hidden_NC: last hidden states at the labelled tokens alone.
        weight_VC: rows of the output projection; its gradient is computed only where it is asked for.
        labels_N: class of each row, in ``[0, V)``; there is no ignored label.
        chunk: rows at once, in the forward and in the backward pass.

    Returns:
        Scalar in float32.

    Raises:
        ValueError: ``chunk`` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, not {chunk}")
    gradients = torch.is_grad_enabled()  # asked here: inside an autograd function it is always off
    loss: Tensor = _LinearCrossEntropy.apply(hidden_NC, weight_VC, labels_N, chunk, gradients)  # type: ignore[no-untyped-call]
    return loss
