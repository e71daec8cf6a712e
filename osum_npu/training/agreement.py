"""What the ranks of a run find out by comparing notes: who is slow, and whether their weights are still the same."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

import torch
from torch import nn

from osum_npu.training.meter import Meter
from osum_npu.training.ranks import Ranks

SLOW = 1.5
"""A rank is named that takes this many times as long as the median."""
_PARAMETERS = 8
"""Parameters that are compared at a time; the next time it is others."""
_ELEMENTS = 4096
"""Elements of each that are compared at a time."""


class Notes:
    """Compares the ranks of a run whenever a row of the log is due."""

    def __init__(self, ranks: Ranks, model: nn.Module) -> None:
        """Learn where the ranks run."""
        self.ranks, self.model = ranks, model
        self.hosts = ranks.gather([platform.node()])
        self.turn, self.same = 0, 0
        self.slow: int | None = None
        self.named: int | None = None

    def compare(self, meter: Meter, step: int) -> tuple[dict[str, float], str]:
        """Return fields of the row and a line about a rank that has become slow; begin to count anew.

        A rank is named when it is slow for two rows in succession, and not again as long as it stays so.

        Raises:
            ValueError: the ranks no longer have the same weights.
        """
        mine: dict[str, Any] = {"numbers": meter.read(), "digests": {}}
        if self.ranks.size > 1:
            mine["digests"] = digests(self.model, self.turn)
        everyone = [json.loads(line) for line in self.ranks.gather([json.dumps(mine)])]
        check_equal([rank["digests"] for rank in everyone], self.hosts, step, self.same)
        self.turn, self.same = self.turn + 1, step
        numbers = [rank["numbers"] for rank in everyone]
        row, before = meter.row(numbers), self.slow
        self.slow = straggler(numbers)
        meter.begin()
        words = ""
        if self.slow != before:
            self.named = None
        elif self.slow is not None and self.slow != self.named:
            self.named, words = self.slow, describe_straggler(numbers, self.hosts, self.slow)
        return row if self.slow is None else {**row, "slow_rank": self.slow}, words


def straggler(ranks: Sequence[Mapping[str, float]]) -> int | None:
    """Return the slowest rank, where it is slow.

    Args:
        ranks: of each rank, the seconds that it ``waited`` for data and ``computed`` by itself.
    """
    seconds = [numbers["waited"] + numbers["computed"] for numbers in ranks]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return slowest if seconds[slowest] > SLOW * median_low(seconds) else None


def describe_straggler(ranks: Sequence[Mapping[str, float]], hosts: Sequence[str], slow: int) -> str:
    """Say how slow a rank is and why, in a line."""
    usual = median_low(numbers["waited"] + numbers["computed"] for numbers in ranks) / ranks[0]["steps"]
    waited, computed = (ranks[slow][name] / ranks[slow]["steps"] for name in ("waited", "computed"))
    return (
        f"rank {slow} on {hosts[slow]} is slow: it waits {waited:.3g} s for data and computes {computed:.3g} s a step; "
        f"usual is {usual:.3g} s for both"
    )


@torch.no_grad()
def digests(model: nn.Module, turn: int) -> dict[str, str]:
    """Return digests of some parameters, exact to the bit, which all ranks must share.

    Sharded parameters are left out: each rank has another part.

    Args:
        model: whose parameters.
        turn: decides which ones, and which of their elements, so that all come round.
    """
    whole = [(name, p) for name, p in model.named_parameters() if not hasattr(p, "device_mesh")]
    found = {}
    for number in range(turn * _PARAMETERS, turn * _PARAMETERS + min(_PARAMETERS, len(whole))):
        times, place = divmod(number, len(whole))
        name, parameter = whole[place]
        flat = parameter.detach().reshape(-1)
        stride = -(-max(1, flat.numel()) // _ELEMENTS)
        sample = flat[times % stride :: stride].cpu().contiguous().view(torch.uint8)
        found[name] = hashlib.blake2b(sample.numpy().tobytes(), digest_size=8).hexdigest()
    return found


def check_equal(ranks: Sequence[Mapping[str, str]], hosts: Sequence[str], step: int, sound: int) -> None:
    """Make sure that the ranks share their weights.

    Args:
        ranks: :func:`digests` of each rank.
        hosts: where each runs.
        step: at which they were made.
        sound: the last step at which a comparison found no difference.

    Raises:
        ValueError: they do not; names a parameter, the ranks that differ from most, and what to do.
    """
    for name in ranks[0]:
        seen = [digests[name] for digests in ranks]
        if len(set(seen)) == 1:
            continue
        usual = max(seen, key=seen.count)
        odd = [f"{rank} ({hosts[rank]})" for rank, digest in enumerate(seen) if digest != usual]
        raise ValueError(
            f"step {step}: the ranks no longer have the same weights: {name} differs on rank {', '.join(odd)} from the "
            f"others. After step {sound} no checkpoint is to be trusted: remove later ones and start again; look into "
            "the memory and the software of these hosts"
        )
