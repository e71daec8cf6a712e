"""Watches the operators of a step: what lives in memory at its fullest moment, and what each operator has to do.

It sees every operator below autograd, on real tensors or on fake ones, which have shapes and no numbers
(``torch._subclasses.fake_tensor``): so a step of any size is watched without its memory and in seconds.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import bmm_flop, flop_registry

Phase = Literal["forward", "backward", "update"]
Part = Literal["weights", "gradients", "optimiser", "activations", "logits"]
Kind = Literal["product", "attention", "function", "random", "move"]
"""What bounds an operator: matrix products and convolutions, attention, functions such as exp, random numbers, or the
bytes that it moves."""

aten = torch.ops.aten

_FUNCTIONS = ("gelu", "silu", "exp", "log", "softmax", "erf", "cos", "sin", "sigmoid", "tanh", "pow", "rsqrt", "ctc")
_RANDOM = ("bernoulli", "dropout", "rand", "normal_", "uniform_")
_FREE = ("empty", "new_empty", "_unsafe_view", "detach")
_GATHERS = ("embedding", "index", "gather", "index_select")
"""They read of their first argument only what they return."""


class Operator(NamedTuple):
    """One operator of a step."""

    phase: Phase
    kind: Kind
    dtype: str
    """Of what it makes."""
    flops: float
    """Operations of products and attention."""
    moved: float
    """Bytes read and written."""
    seconds: float
    """CPU time that it took on real tensors, where that was to be measured; else 0."""


@dataclass(frozen=True)
class Trace:
    """What was seen of a step."""

    operators: Sequence[Operator]
    peak: dict[Part, int]
    """Bytes by part at the moment when they are most."""

    @property
    def peak_bytes(self) -> int:
        """Bytes at that moment."""
        return sum(self.peak.values())


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators and the memory of their results while it is active."""

    def __init__(self, vocabulary: int, *, clock: bool = False) -> None:
        """Watch nothing yet.

        Args:
            vocabulary: of the LLM; tensors of that width are logits.
            clock: measure the time of each operator, on the CPU.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.clock = vocabulary, clock
        self.phase: Phase = "forward"
        self.operators: list[Operator] = []
        self._parts: dict[int, Part] = {}
        self._sizes: dict[int, int] = {}
        self._held: Counter[Part] = Counter()
        self._peak: Counter[Part] = Counter()
        self._most = 0

    def trace(self) -> Trace:
        """Return what was seen since the last :meth:`forget`."""
        return Trace(list(self.operators), dict(self._peak))

    def enter(self, phase: Phase) -> None:
        """Say which phase begins."""
        self.phase = phase

    def forget(self) -> None:
        """Begin anew with what lives now."""
        self.operators.clear()
        self._peak, self._most = Counter(self._held), self._held.total()

    def hold(self, tensor: Tensor, part: Part) -> None:
        """Count a tensor's memory as that of a part, whether it was seen before or not."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._add(storage, part)
        self._held[self._parts[key]] -= self._sizes[key]
        self._held[part] += self._sizes[key]
        self._parts[key] = part

    def _add(self, storage: Any, part: Part) -> None:
        key = storage._cdata
        self._sizes[key], self._parts[key] = storage.nbytes(), part
        self._held[part] += storage.nbytes()
        weakref.finalize(storage, self._drop, key)
        if (total := self._held.total()) > self._most:
            self._peak, self._most = Counter(self._held), total

    def _drop(self, key: int) -> None:
        if key in self._sizes:
            self._held[self._parts.pop(key)] -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute, and note what was computed."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor, which nothing computes
            return func(*args, **kwargs)
        fake = _STAND_INS.get(func) if args and isinstance(args[0], FakeTensor) else None
        began = time.thread_time()
        result = func(*args, **kwargs) if fake is None else fake(*args, **kwargs)
        seconds = time.thread_time() - began if self.clock else 0.0
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._add(storage, self._part_of(tensor))
        name = func.name().split("::")[-1].split(".")[0]
        if not func.is_view and not name.startswith(_FREE):
            self.operators.append(self._describe(func, name, args, kwargs, result, made, seconds))
        return result

    def _part_of(self, tensor: Tensor) -> Part:
        if self.phase == "update":
            return "optimiser"
        return "logits" if tensor.ndim == 2 and tensor.shape[-1] == self.vocabulary else "activations"

    def _describe(
        self, func: Any, name: str, args: Any, kwargs: Any, result: Any, made: Sequence[Tensor], seconds: float
    ) -> Operator:
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in _GATHERS:
            read = [*read[1:], *made]
        moved = sum(x.numel() * x.element_size() for x in (*read, *made))
        dtype = str((made or read)[0].dtype).removeprefix("torch.") if made or read else ""
        if "scaled_dot_product" in name:
            flops = _attention_flops(args, backward="backward" in name)
            return Operator(self.phase, "attention", dtype, flops, moved, seconds)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            return Operator(self.phase, "product", dtype, count(*args, **kwargs, out_val=result), moved, seconds)
        kind: Kind = "random" if name.startswith(_RANDOM) else "function" if _is_function(name) else "move"
        return Operator(self.phase, kind, dtype, 0.0, moved, seconds)


def _is_function(name: str) -> bool:
    return any(part in name for part in _FUNCTIONS)


def _attention_flops(args: Sequence[Any], *, backward: bool) -> float:
    """Count fused attention, whose backward pass makes the scores again: five products for two."""
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    batch, heads, length, width = query.shape
    keys = key.shape[-2]
    product = bmm_flop((batch * heads, length, width), (batch * heads, width, keys))
    return float(product) * (5 if backward else 2)


def _no(*_: Any) -> bool:
    """Answer what a step asks of the numbers in a tensor: whether nothing is padding."""
    return False


def _ctc(log_probs_TBV: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Return losses and forward variables of CTC, by shape."""
    steps, batch = log_probs_TBV.shape[:2]
    longest = targets.numel() // max(1, batch)
    return log_probs_TBV.new_empty(batch), log_probs_TBV.new_empty(batch, steps, 2 * longest + 1)


def _ctc_backward(_gradient: Tensor, log_probs_TBV: Tensor, *_: Any) -> Tensor:
    return log_probs_TBV.new_empty(log_probs_TBV.shape)  # contiguous, whatever the order of what it is a gradient of


_STAND_INS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _no,
    aten._ctc_loss.Tensor: _ctc,
    aten._ctc_loss.default: _ctc,
    aten._ctc_loss_backward.Tensor: _ctc_backward,
    aten._ctc_loss_backward.default: _ctc_backward,
}
"""What fake tensors cannot do: their numbers are not known."""
