"""The processes of a training, which learn as one: gradients of a step add up over all of them.

Every rank computes its share of each step. Losses are divided by the tokens of all ranks, so the sum of the gradients
is that of one process. Here each rank holds the whole model; :mod:`osum_npu.training.sharding` divides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from osum_npu.launch import World

T = TypeVar("T")


class Ranks:
    """This process among the others. Alone, nothing is sent."""

    def __init__(self, world: World, collective: str, device: torch.device) -> None:
        """Join the others.

        Args:
            world: which of how many processes this one is.
            collective: backend of ``torch.distributed``.
            device: of this process.
        """
        self.rank, self.local_rank, self.size, self.device = world.rank, world.local_rank, world.world_size, device
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group(collective, rank=self.rank, world_size=self.size)
        self.readers = self.host_group()
        """For what the training's own thread reads from checkpoints."""

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.rank == 0

    def host_group(self) -> dist.ProcessGroup | None:
        """Return the same ranks once more, joined on the host; every rank has to call this in the same order.

        Each thread that sends needs its own: ranks whose threads take turns differently would mistake messages.
        """
        return dist.new_group(backend="gloo") if self.size > 1 else None

    def counts(self, *numbers: int) -> list[int]:
        """Add up integers over all ranks."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return [int(n) for n in total.tolist()]

    def most(self, number: int) -> int:
        """Return the largest of the ranks' integers."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def per_node(self) -> int:
        """Return how many ranks a node has.

        Raises:
            ValueError: nodes have different numbers of ranks, or ranks that do not follow each other.
        """
        local = self.gather([self.local_rank])
        count = max(local) + 1
        if local != [rank % count for rank in range(self.size)]:
            raise ValueError(
                f"sharding: hybrid wants equally many processes on every node, and ranks that follow each other there; "
                f"got the local ranks {', '.join(map(str, local))}; set sharding: full"
            )
        return count

    def add(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Bring the ranks' tensors of one shape together, on every rank, that of rank 0 first."""
        if self.size == 1:
            return [tensor]
        everyone = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(everyone, tensor)
        return everyone

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up gradients over all ranks; a parameter that no rank has used keeps none."""
        if self.size == 1:
            return
        for _, group in groupby(sorted(parameters, key=_dtype), key=_dtype):
            mine = list(group)
            used = torch.tensor([p.grad is not None for p in mine], dtype=mine[0].dtype, device=self.device)
            pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in mine]
            flat = torch.cat([used, *(piece.reshape(-1) for piece in pieces)])
            dist.all_reduce(flat)
            total = torch.split(flat[len(mine) :], [p.numel() for p in mine])
            for parameter, piece, anywhere in zip(mine, total, flat[: len(mine)].tolist()):
                parameter.grad = piece.view_as(parameter) if anywhere else None

    def gather(self, items: Sequence[T], group: dist.ProcessGroup | None = None) -> list[T]:
        """Bring the items of all ranks together, on every rank, those of rank 0 first."""
        if self.size == 1:
            return list(items)
        everyone: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, list(items), group)
        return [item for theirs in everyone for item in theirs]

    def leave(self) -> None:
        """Wait for the others, and part."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype)
