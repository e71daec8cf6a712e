"""Muon: momentum whose matrices are made orthogonal before each step.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon/; the scale of the steps after Liu et al., arXiv
2502.16982, which also shares the work among ranks: each makes some of the matrices orthogonal and sends them to the
others. Matrices of one shape are computed together: on a device that is a handful of launches a step instead of some
for each matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from osum_npu import backend
from osum_npu.training.ranks import Ranks

_POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x³ and x⁵, which push singular values towards 1 fastest from zero."""
_ITERATIONS = 5


def orthogonalize(x_NRC: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Bring the singular values of matrices near 1 by Newton-Schulz iterations.

    Args:
        x_NRC: N matrices of no more rows than columns, any dtype.
        dtype: of the iterations.

    Returns:
        Of that dtype and the same shape. Singular values lie near 1, within a third, but for those below a tenth of the
        norm.
    """
    a, b, c = _POLYNOMIAL
    x_NRC = x_NRC.to(dtype)
    x_NRC = x_NRC / x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram_NRR = x_NRC @ x_NRC.mT
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=a)
    return x_NRC


class Muon(torch.optim.Optimizer):
    """Learns matrices; a step changes each by about as much as AdamW's would at the same rate."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        *,
        ranks: Ranks | None = None,
        dtype: torch.dtype | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        """Take the matrices.

        Args:
            matrices: each with two axes.
            lr: learning rate.
            ranks: all of which hold the same matrices and gradients, and share the work; by default this one does all.
            dtype: in which they are made orthogonal; by default what the device trains fastest in, which is bfloat16
                but on a host that would have to emulate it.
            weight_decay: share of a matrix, times the rate, that a step takes away.
            momentum: share of the past in the running mean of gradients.

        Raises:
            ValueError: a parameter is no matrix.
        """
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            if wrong := [list(p.shape) for p in group["params"] if p.ndim != 2]:
                raise ValueError(f"Muon learns matrices; a parameter has the shape {wrong[0]}")

        self.ranks = ranks
        self.dtype = dtype or backend.current().training_dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change all matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            if learned := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self._step(learned, group["lr"], group["weight_decay"], group["momentum"])

    def _step(self, parameters: list[Tensor], rate: float, weight_decay: float, momentum: float) -> None:
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, means, momentum)  # Nesterov's look ahead
        if self.ranks is None or self.ranks.size == 1:
            updates = orthogonalize_all(ahead, self.dtype)
        else:
            updates = orthogonalize_shared(ahead, self.ranks, self.dtype)
        torch._foreach_mul_(updates, [-rate * 0.2 * max(p.shape) ** 0.5 for p in parameters])
        torch._foreach_mul_(parameters, 1 - rate * weight_decay)
        torch._foreach_add_(parameters, updates)


def orthogonalize_all(matrices: Sequence[Tensor], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Make matrices of any shapes orthogonal, in ``dtype``; those of one shape, or of its transpose, together.

    Returns:
        In the same order, of the same shapes and dtypes.
    """
    alike: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        alike[tuple(sorted(matrix.shape)), matrix.dtype, matrix.device].append(i)
    made = list(matrices)
    for places in alike.values():
        tall = [matrices[i].shape[0] > matrices[i].shape[1] for i in places]
        wide = orthogonalize(torch.stack([matrices[i].mT if t else matrices[i] for i, t in zip(places, tall)]), dtype)
        for i, t, x in zip(places, tall, wide.to(matrices[places[0]].dtype)):
            made[i] = x.mT if t else x
    return made


def orthogonalize_shared(matrices: Sequence[Tensor], ranks: Ranks, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Do the same by ranks that all hold the same matrices; each makes some and receives the others."""
    owners = share_out([_work(matrix) for matrix in matrices], ranks.size)
    mine = orthogonalize_all([matrix for matrix, owner in zip(matrices, owners) if owner == ranks.rank], dtype)
    lengths = [sum(m.numel() for m, owner in zip(matrices, owners) if owner == rank) for rank in range(ranks.size)]
    # what orthogonalize returns is of this dtype, so nothing is lost when it is sent as such
    sent = matrices[0].new_zeros(max(lengths), dtype=dtype)
    if mine:
        torch.cat([x.flatten().to(dtype) for x in mine], out=sent[: lengths[ranks.rank]])
    received, taken = ranks.collect(sent), [0] * ranks.size
    made: list[Tensor] = []
    for matrix, owner in zip(matrices, owners):
        start, taken[owner] = taken[owner], taken[owner] + matrix.numel()
        made.append(received[owner][start : taken[owner]].view_as(matrix).to(matrix.dtype))
    return made


def share_out(work: Sequence[int], ranks: int) -> list[int]:
    """Give each piece of work to a rank, the largest first, each to the one that has least; return the ranks."""
    loads, owners = [0] * ranks, [0] * len(work)
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += work[i]
    return owners


def _work(matrix: Tensor) -> int:
    """Return the multiplications of one iteration."""
    rows, columns = sorted(matrix.shape)
    return rows * rows * (2 * columns + rows)
