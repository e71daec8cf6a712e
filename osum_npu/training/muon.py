"""Muon: momentum whose matrices are made orthogonal before each step.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon/; the scale of the steps after Liu et al., arXiv
2502.16982. Matrices of one shape are computed together: on a device that is a handful of launches a step instead of
some for each matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x³ and x⁵, which push singular values towards 1 fastest from zero."""
_ITERATIONS = 5


def orthogonalize(x_NRC: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1 by Newton-Schulz iterations, in bfloat16.

    Args:
        x_NRC: N matrices of no more rows than columns, any dtype.

    Returns:
        bfloat16, the same shape. Singular values lie near 1, within a third, but for those below a tenth of the norm.
    """
    a, b, c = _POLYNOMIAL
    x_NRC = x_NRC.bfloat16()
    x_NRC = x_NRC / x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram_NRR = x_NRC @ x_NRC.mT
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=a)
    return x_NRC


class Muon(torch.optim.Optimizer):
    """Learns matrices; a step changes each by about as much as AdamW's would at the same rate."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, *, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        """Take the matrices.

        Args:
            matrices: each with two axes.
            lr: learning rate.
            weight_decay: share of a matrix, times the rate, that a step takes away.
            momentum: share of the past in the running mean of gradients.

        Raises:
            ValueError: a parameter is no matrix.
        """
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            if wrong := [list(p.shape) for p in group["params"] if p.ndim != 2]:
                raise ValueError(f"Muon learns matrices; a parameter has the shape {wrong[0]}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change all matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            alike: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = tuple(sorted(parameter.shape))
                    alike[shape, parameter.dtype, parameter.device].append(parameter)
            for parameters in alike.values():
                self._step(parameters, group["lr"], group["weight_decay"], group["momentum"])

    def _step(self, parameters: list[Tensor], rate: float, weight_decay: float, momentum: float) -> None:
        """Change matrices of one shape, or of its transpose."""
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, means, momentum)  # Nesterov's look ahead
        wide = orthogonalize(torch.stack([x.mT if x.shape[0] > x.shape[1] else x for x in ahead]))
        updates = [x.mT if p.shape[0] > p.shape[1] else x for x, p in zip(wide.to(parameters[0].dtype), parameters)]
        torch._foreach_mul_(parameters, 1 - rate * weight_decay)
        torch._foreach_add_(parameters, updates, alpha=-rate * 0.2 * max(parameters[0].shape) ** 0.5)
