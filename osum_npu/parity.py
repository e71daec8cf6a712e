"""Any implementation of an op against its reference: values and gradients.

There is one norm: the largest difference over the root-mean-square of the reference. An elementwise relative error
means nothing near zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osum_npu.op import REFERENCE, Implementation, Op

VANISHING = 1e-3
"""A gradient this much smaller than the largest of its case is made of rounding errors (one key alone leaves none to
the query, say) and is measured against the largest."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing computed, on one case."""

    level: str
    """``ops``, ``modules``, ``model`` or ``run``."""
    name: str
    """The op or module."""
    backend: str
    """Type of the device."""
    provider: str
    """Who computed it: a backend's name or ``reference``."""
    dtype: str
    case: str
    """The arguments, in words."""
    forward_error: float
    gradient_error: float
    """The worst of all inputs that have a gradient."""
    tolerance: tuple[float, float]
    """Allowed to values and to gradients."""
    fault: str = ""
    """What was raised, where nothing was computed; the errors are infinite then."""

    @property
    def ok(self) -> bool:
        """Whether both errors are within what is allowed."""
        return self.forward_error <= self.tolerance[0] and self.gradient_error <= self.tolerance[1]

    @classmethod
    def measured(cls, measure: Callable[[], tuple[float, float]], **what: Any) -> Row:
        """Fill in what ``measure`` returns or raises: a device that fails one thing is still asked for the others.

        Args:
            measure: returns the errors of values and of gradients.
            what: all other fields.
        """
        try:
            forward, gradient = measure()
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            return cls(forward_error=math.inf, gradient_error=math.inf, fault=fault, **what)
        return cls(forward_error=forward, gradient_error=gradient, **what)


def relative_error(got: Tensor | np.ndarray[Any, Any], want: Tensor | np.ndarray[Any, Any]) -> float:
    """Return the largest difference of ``got`` from ``want`` over the root-mean-square of ``want``.

    Args:
        got: any shape, dtype and device.
        want: the same shape.

    Returns:
        0 for empty or equal arrays, infinity where ``want`` is zero throughout and ``got`` is not, NaN for NaN.

    Raises:
        ValueError: the shapes differ.
    """
    got, want = _double(got), _double(want)
    return _ratio(_largest_difference(got, want), _rms(want))


Record = Callable[[str, Tensor], None]
"""Takes what a device computed, each tensor under a name of its own."""


def check(
    op: Op[..., Any],
    implementation: Implementation[..., Any],
    dtype: torch.dtype,
    device: torch.device,
    record: Record = lambda _name, _tensor: None,
) -> list[Row]:
    """Hold an implementation to its op's reference on all cases that it takes.

    The inputs are rounded to ``dtype``; from there the reference computes in float64 on the CPU.

    Args:
        op: the op.
        implementation: one of it, or its reference to see how that fares on ``device``.
        dtype: dtype of all floating inputs.
        device: where the implementation runs.
        record: gets all values and gradients that the implementation computed.

    Returns:
        One row a case; none where it takes no case.
    """
    rng = torch.Generator().manual_seed(0)
    rows = []
    for number, case in enumerate(op.cases(rng)):
        inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.items()}
        mine = _leaves(inputs, device, dtype)
        if implementation.refusal(dtype, **mine):
            continue
        tag = f"ops/{op.name}/{short(dtype)}/{number}"
        rows.append(
            Row.measured(
                partial(_errors, op, implementation, inputs, mine, rng, record, tag),
                level="ops",
                name=op.name,
                backend=device.type,
                provider=implementation.provider,
                dtype=short(dtype),
                case=f"{number}: " + ", ".join(f"{k}={_word(v)}" for k, v in case.items()),
                tolerance=implementation.tolerance[dtype],
            )
        )
    return rows


def _errors(
    op: Op[..., Any],
    implementation: Implementation[..., Any],
    inputs: dict[str, Any],
    mine: dict[str, Any],
    rng: torch.Generator,
    record: Record,
    tag: str,
) -> tuple[float, float]:
    """Run one case by the implementation on ``mine`` and by the reference on ``inputs``."""
    theirs = _leaves(inputs, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        dtypes = [each.dtype for each in _outputs(op.reference(**inputs))]
    wanted, gotten = _outputs(op.reference(**theirs)), _outputs(implementation.call(**mine))
    errors = compare(gotten, wanted, mine, theirs, dtypes, rng)
    record_all(record, tag, gotten, mine)
    return errors


def record_all(record: Record, tag: str, values: Sequence[Tensor], inputs: Mapping[str, Any]) -> None:
    """Record values, and the gradients of inputs."""
    for i, value in enumerate(values):
        record(f"{tag}/value{i}", value)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.grad is not None:
            record(f"{tag}/gradient of {name}", x.grad)


def serving(op: Op[..., Any], dtype: torch.dtype, device: torch.device) -> Implementation[..., Any]:
    """Return the implementation that serves ``dtype`` on ``device``: the device's own, or else the reference."""
    own = op.implementations.get(device.type)
    return own if own is not None and dtype in own.dtypes else op.implementations[REFERENCE]


def compare(
    gotten: Sequence[Tensor],
    wanted: Sequence[Tensor],
    mine: Mapping[str, Any],
    theirs: Mapping[str, Any],
    dtypes: Sequence[torch.dtype],
    rng: torch.Generator,
) -> tuple[float, float]:
    """Compare values, send the same random slopes back through both, and compare the gradients.

    Args:
        gotten: results.
        wanted: those of the reference, in float64.
        mine: by name, what ``gotten`` was computed from; its leaves get their gradients.
        theirs: likewise of ``wanted``.
        dtypes: those that ``gotten`` must have.
        rng: draws the slopes.

    Returns:
        The worst relative error of the values, and of the gradients.

    Raises:
        ValueError: a result has another dtype or shape, or no gradient reached an input.
    """
    if (found := [each.dtype for each in gotten]) != list(dtypes):
        raise ValueError(f"the result is {_words(found)}, that of the reference {_words(dtypes)}")
    forward = float(np.max([relative_error(got, want) for got, want in zip(gotten, wanted, strict=True)]))
    slopes = [torch.randn(want.shape, generator=rng).to(got.dtype) for got, want in zip(gotten, wanted)]
    torch.autograd.backward(wanted, [slope.double() for slope in slopes])
    torch.autograd.backward(gotten, [slope.to(got.device) for got, slope in zip(gotten, slopes)])
    names = [name for name, x in theirs.items() if isinstance(x, Tensor) and x.requires_grad]
    truths = {name: theirs[name].grad for name in names}
    largest = max(_rms(truth) for truth in truths.values())
    errors = []
    for name, truth in truths.items():
        gradient = mine[name].grad
        if gradient is None:
            raise ValueError(f"no gradient reached {name}")
        scale = _rms(truth)
        difference = _largest_difference(_double(gradient), truth)
        errors.append(_ratio(difference, largest if scale < VANISHING * largest else scale))
    return forward, float(np.max(errors))  # which keeps a NaN, as max() does not


def _outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def short(dtype: torch.dtype) -> str:
    """Write a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _words(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(str, dtypes))


def _leaves(inputs: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Copy the tensors to ``device``, those with gradients as fresh leaves in ``dtype``."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x.to(device)
        return x.detach().clone().to(device, dtype).requires_grad_()

    return {name: leaf(x) for name, x in inputs.items()}


def _double(x: Tensor | np.ndarray[Any, Any]) -> Tensor:
    return torch.as_tensor(x).detach().cpu().double()  # to the host first: not every device has float64


def _largest_difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        raise ValueError(f"shape {list(got.shape)} is not that of the reference, {list(want.shape)}")
    return (got - want).abs().max().item() if want.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _ratio(difference: float, scale: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / scale if scale else math.inf


def _word(x: Any) -> str:
    return f"{list(x.shape)}" if isinstance(x, Tensor) else str(x)
