"""What every fused operator means, in plain torch with float32 inside, and what it refuses (``rules.RULES``).

A reference takes all arguments of its schema by name; :func:`call` binds a call as the dispatcher would. Attention has
modules of its own. ``FORWARD`` is what a program calls, ``BACKWARD`` what torch_npu's autograd formulas call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_emulator import attention, inference_attention, schemas
from npu_emulator.rules import FLOATS, Refused, require, require_dtypes, require_none, shape

INFERENCE_ONLY = frozenset(
    {
        "npu_fused_infer_attention_score",
        "npu_fused_infer_attention_score_v2",
        "npu_layer_norm_eval",
        "npu_add_rms_norm",
    }
)
"""Operators without a derivative in torch_npu; that of npu_add_rms_norm is registered as "not implemented"."""

WIDEST_ROTARY, MOST_ROTARY, MOST_ROTARY_GRADIENT, MOST_LABELS = 896, 1000, 1024, 200_000


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return ``input / rms * gamma`` over the dimensions of gamma, rounded once, and 1 / rms in float32."""
    _require_norm("npu_rms_norm", input, gamma)
    y, rstd = _rms_norm(input.float(), gamma.float(), epsilon)
    return y.to(input.dtype), rstd.detach()


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of ``x1 + x2``, 1 / rms, and the sum, in this order."""
    require_dtypes("npu_add_rms_norm", FLOATS, {"x1": x1, "x2": x2})
    require(x1.shape == x2.shape, "dimensions-fit", f"npu_add_rms_norm got x1 {shape(x1)}, x2 {shape(x2)}")
    total = x1 + x2
    _require_norm("npu_add_rms_norm", total, gamma)
    y, rstd = _rms_norm(total.float(), gamma.float(), epsilon)
    return y.to(total.dtype), rstd.detach(), total


def _require_norm(operator: str, x: Tensor, gamma: Tensor) -> None:
    require_dtypes(operator, FLOATS, {"input": x})
    require(gamma.dtype == x.dtype, "gamma-has-input-dtype", f"{operator} got gamma {gamma.dtype}, input {x.dtype}")
    require(2 <= x.dim() <= 8, "dimensions-fit", f"{operator} got input {shape(x)}, which wants 2 to 8 dimensions")
    fits = 1 <= gamma.dim() <= x.dim() and x.shape[-gamma.dim() :] == gamma.shape
    require(fits, "gamma-fits-input", f"{operator} got gamma {shape(gamma)}, input {shape(x)}")


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float | Tensor) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.square().mean(tuple(range(-gamma.dim(), 0)), keepdim=True) + epsilon)
    return x * rstd * gamma, rstd


def npu_layer_norm_eval(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Layer norm."""
    require_dtypes("npu_layer_norm_eval", FLOATS, {"input": input, "weight": weight, "bias": bias})
    return F.layer_norm(
        input.float(), normalized_shape, *(x if x is None else x.float() for x in (weight, bias)), eps
    ).to(input.dtype)


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None) -> Tensor:
    """Return ``r1 * input + r2 * quarter turn of input``."""
    require_none("npu_rotary_mul", {"rotate": rotate})
    require_dtypes("npu_rotary_mul", FLOATS, {"input": input, "cos": r1, "sin": r2})
    require(rotary_mode in ("half", "interleave"), "rotary-mode-is-known", f"npu_rotary_mul got {rotary_mode!r}")
    got = f"npu_rotary_mul got input {shape(input)}, cos {shape(r1)}, sin {shape(r2)} in mode {rotary_mode}"
    fits = input.dim() == r1.dim() == r2.dim() == 4 and r1.shape == r2.shape and r1.shape[3] == input.shape[3]
    require(fits and input.shape[3] % 2 == 0 and input.shape[3] < WIDEST_ROTARY, "rotary-shape", got)
    trains = r1.requires_grad or r2.requires_grad
    require(_rotary_layout(input, r1, rotary_mode, trains) != "", "rotary-shape", got)
    with torch.no_grad():
        bounded = max(r1.abs().max(), r2.abs().max()) <= 1.0 if r1.numel() else True
        require(bool(bounded), "rotary-table-is-cosine", f"npu_rotary_mul got {float(r1.abs().max()):.3g} as cosine")
        _require_rotary_pairs(r1, rotary_mode)
    return (r1.float() * input.float() + r2.float() * quarter_turn(input.float(), rotary_mode)).to(input.dtype)


def _rotary_layout(x: Tensor, table: Tensor, mode: str, trains: bool) -> str:
    """Return a layout in which the tables broadcast as documented and the limits hold; empty for none."""
    own = {"half": ("all", "batch", "none"), "interleave": ("none",)}[mode]
    for layout in ("BNSD", "BSND", "SBND"):
        B, N = x.shape[layout.index("B")], x.shape[layout.index("N")]
        if (B * N if mode == "interleave" else max(B, N)) >= MOST_ROTARY:
            continue
        if mode == "half" and trains and B * N > MOST_ROTARY_GRADIENT:
            continue
        for kept in own:
            kept_axes = {"all": "BNSD", "batch": "BSD", "none": "SD"}[kept]
            if all(table.shape[i] == (x.shape[i] if axis in kept_axes else 1) for i, axis in enumerate(layout)):
                return layout
    return ""


def _require_rotary_pairs(cos: Tensor, mode: str) -> None:
    """A table made for the other mode is refused; one that is made for neither (in a test) is taken as it is."""
    first, second = cos.chunk(2, -1)
    for_half, for_pairs = torch.equal(first, second), torch.equal(cos[..., ::2], cos[..., 1::2])
    fits = for_half == for_pairs or for_half == (mode == "half")
    require(fits, "rotary-pairs", f"npu_rotary_mul got mode {mode} with a table for the other one")


def quarter_turn(x: Tensor, mode: str) -> Tensor:
    """Turn pairs of channels by a quarter: ``half`` pairs i with i + D/2, ``interleave`` 2i with 2i + 1."""
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def npu_swiglu(input: Tensor, dim: int) -> Tensor:
    """Return ``silu(first half) * second half``."""
    require_dtypes("npu_swiglu", FLOATS, {"input": input})
    got = f"npu_swiglu got {shape(input)} with dim={dim}"
    require(1 <= input.dim() <= 8 and -input.dim() <= dim < input.dim(), "dimensions-fit", got)
    require(input.shape[dim] % 2 == 0, "swiglu-is-even", got)
    gate, up = input.float().chunk(2, dim)
    return (F.silu(gate) * up).to(input.dtype)


def npu_gelu(input: Tensor, approximate: str) -> Tensor:
    """GELU, exact or by tanh."""
    require_dtypes("npu_gelu", FLOATS, {"input": input})
    require(approximate in ("none", "tanh"), "gelu-is-known", f"npu_gelu got {approximate!r}")
    return F.gelu(input.float(), approximate=approximate).to(input.dtype)


def npu_fast_gelu(input: Tensor) -> Tensor:
    """Return ``x * sigmoid(1.702 x)``."""
    require_dtypes("npu_fast_gelu", FLOATS, {"input": input})
    return (input.float() * torch.sigmoid(1.702 * input.float())).to(input.dtype)


def npu_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale_for_zloss: float,
    return_zloss: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss (``[1]``, or ``[N]`` unreduced), log-probabilities ``[N, C]``, and two empty tensors."""
    operator = "npu_cross_entropy_loss"
    require_dtypes(operator, FLOATS, {"input": input})
    got = f"{operator} got input {shape(input)}, target {shape(target)} {target.dtype}"
    fits = input.dim() == 2 and target.shape == input.shape[:1] and target.dtype == torch.int64
    require(fits and 0 < len(target) <= MOST_LABELS, "dimensions-fit", got)
    require(reduction in ("mean", "sum", "none"), "reduction-is-known", f"{operator} got {reduction!r}")
    lowest, highest, C = int(target.min()), int(target.max()), input.shape[1]
    got = f"{operator} got targets {lowest} to {highest} with {C} classes and ignore_index={ignore_index}"
    require(lowest >= 0 and highest < C and ignore_index < C, "target-is-a-class", got)
    require(not lse_square_scale_for_zloss and not return_zloss, "zloss-is-off", f"{operator} got one")
    changed = {
        "weight": weight is not None,
        "ignore_index": ignore_index != -100,
        "label_smoothing": label_smoothing != 0,
    }
    barred = [name for name, other in changed.items() if other and (reduction == "mean" or name == "label_smoothing")]
    words = f"{operator} got {', '.join(barred)} with reduction={reduction} and an input that requires a gradient"
    require(not (barred and input.requires_grad), "loss-options-are-default", words)
    loss = F.cross_entropy(input.float(), target, weight, None, ignore_index, None, reduction, label_smoothing)
    empty = input.new_empty(0)
    return loss.to(input.dtype).reshape(-1), F.log_softmax(input.float(), -1).to(input.dtype), empty, empty.clone()


FORWARD: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention": attention.npu_fusion_attention,
    "npu_fusion_attention_v2": attention.npu_fusion_attention_v2,
    "npu_fusion_attention_v3": attention.npu_fusion_attention_v3,
    "npu_fused_infer_attention_score": inference_attention.npu_fused_infer_attention_score,
    "npu_fused_infer_attention_score_v2": inference_attention.npu_fused_infer_attention_score_v2,
    "npu_rms_norm": npu_rms_norm,
    "npu_add_rms_norm": npu_add_rms_norm,
    "npu_layer_norm_eval": npu_layer_norm_eval,
    "npu_rotary_mul": npu_rotary_mul,
    "npu_swiglu": npu_swiglu,
    "npu_gelu": npu_gelu,
    "npu_fast_gelu": npu_fast_gelu,
    "fast_gelu": npu_fast_gelu,
    "npu_cross_entropy_loss": npu_cross_entropy_loss,
}


def _gradients(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], slope: Tensor) -> tuple[Tensor, ...]:
    """Differentiate ``call(*inputs)`` by torch."""
    with torch.enable_grad():
        leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
        return torch.autograd.grad(call(*leaves), leaves, slope)


def npu_rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the input, and that of gamma in float32; epsilon is read back from rstd."""
    x = input.float()
    epsilon = rstd.float() ** -2 - x.square().mean(tuple(range(-gamma.dim(), 0)), keepdim=True)
    dx, dgamma = _gradients(lambda x, g: _rms_norm(x, g, epsilon)[0], (x, gamma.float()), dy.float())
    return dx.to(input.dtype), dgamma


def npu_rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input, of the cosines and of the sines."""
    found = _gradients(lambda *x: npu_rotary_mul(*x, rotary_mode, None), (input, r1, r2), grad)
    return found[0], found[1], found[2]


def npu_cross_entropy_loss_backward(
    grad_loss: Tensor,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_zloss: Tensor | None,
    lse_for_zloss: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale_for_zloss: float,
) -> Tensor:
    """Return the gradient of the input; log_softmax of log-probabilities is themselves."""
    options = (weight, None, ignore_index, None, reduction, label_smoothing)
    loss = lambda x: F.cross_entropy(x, target, *options).reshape(-1)  # noqa: E731
    return _gradients(loss, (log_prob.float(),), grad_loss.float())[0].to(log_prob.dtype)


BACKWARD: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention_grad": attention.npu_fusion_attention_grad,
    "npu_fusion_attention_grad_v2": attention.npu_fusion_attention_grad_v2,
    "npu_fusion_attention_grad_v3": attention.npu_fusion_attention_grad_v3,
    "npu_rms_norm_backward": npu_rms_norm_backward,
    "npu_rotary_mul_backward": npu_rotary_mul_backward,
    "npu_swiglu_backward": lambda grad_output, input, dim: _gradients(
        lambda x: npu_swiglu(x, dim), (input,), grad_output
    )[0],
    "npu_gelu_backward": lambda grad_output, input, approximate: _gradients(
        lambda x: npu_gelu(x, approximate), (input,), grad_output
    )[0],
    "npu_fast_gelu_backward": lambda grad, input: _gradients(npu_fast_gelu, (input,), grad)[0],
    "npu_cross_entropy_loss_backward": npu_cross_entropy_loss_backward,
}


def require_no_gradient(name: str, named: dict[str, Any]) -> None:
    """An operator without a gradient is given nothing that asks for one."""
    if name in INFERENCE_ONLY and torch.is_grad_enabled():
        trains = [key for key, x in named.items() if isinstance(x, Tensor) and x.requires_grad]
        require(not trains, "inference-only", f"{name} got {', '.join(trains)} with requires_grad")


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Compute an operator by its reference.

    Raises:
        Refused: the call breaks a rule, or the operator has no reference.
        TypeError: the call does not fit the recorded schema.
    """
    named = schemas.bind(name, args, kwargs)
    require_no_gradient(name, named)
    reference = FORWARD.get(name) or BACKWARD.get(name)
    if reference is None:
        raise Refused("no-reference", f"{name} is not emulated")
    return reference(**named)
