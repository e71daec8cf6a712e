"""Ops: each is its reference, until a backend brings a faster implementation.

The reference is the contract. An op also carries the cases by which any implementation is held to it, so the parity
tests are made from the registry. Implementations register when their backend is activated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

VARIABLE = "OSUM_OPS"
REFERENCE = "reference"

TOLERANCE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-4),
    torch.float16: (5e-3, 1e-2),
    torch.bfloat16: (3e-2, 6e-2),
}
"""Relative error (``osum_npu.parity``) allowed to values and to gradients, where an implementation names no other."""


@dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """One way to compute an op."""

    provider: str
    """Who brings it: a backend's name, ``reference``, or another package behind a backend."""
    backend: str
    """The backend whose tensors it takes; empty for any."""
    call: Callable[P, R]
    dtypes: tuple[torch.dtype, ...] = ()
    """Dtypes of the first argument that it takes; empty for any."""
    accepts: Callable[P, bool] | None = None
    """Whether it takes these arguments; its docstring says in words what it takes. None takes all."""
    tolerance: Mapping[torch.dtype, tuple[float, float]] = field(default_factory=lambda: TOLERANCE)
    unavailable: Callable[[], str] = lambda: ""
    """Says why it cannot run here, empty where it can; asked only where it is forced."""

    def refusal(self, dtype: torch.dtype, *args: P.args, **kwargs: P.kwargs) -> str:
        """Say why it does not take these arguments; empty where it does."""
        if self.dtypes and dtype not in self.dtypes:
            return f"{self.provider} takes {', '.join(map(str, self.dtypes))}, not {dtype}"
        if self.accepts is not None and not self.accepts(*args, **kwargs):
            return f"{self.provider} takes other arguments: {self.accepts.__doc__}"
        return ""


class Choice(NamedTuple):
    """Who computes a call, and why."""

    provider: str
    reason: str
    call: Callable[..., Any]


class Op(Generic[P, R]):
    """A named computation: its reference, its cases, its implementations.

    The device and the dtype of the first argument, a tensor, choose the implementation.

    Attributes:
        name: name of the reference function.
        reference: the contract.
        cases: keyword arguments to compare implementations on, from a random generator: float32 tensors on the host.
        implementations: by provider, the reference among them.
        forced: provider that ``OSUM_OPS`` names for this op; empty for the usual choice.
    """

    def __init__(self, reference: Callable[P, R], cases: Callable[[torch.Generator], Iterable[dict[str, Any]]]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.cases = cases
        self.implementations: dict[str, Implementation[P, R]] = {REFERENCE: Implementation(REFERENCE, "", reference)}
        self.forced = ""
        self._first = next(iter(inspect.signature(reference).parameters))
        update_wrapper(self, reference)

    def impl(
        self,
        backend: str,
        *,
        dtypes: tuple[torch.dtype, ...],
        accepts: Callable[P, bool] | None = None,
        tolerance: Mapping[torch.dtype, tuple[float, float]] | None = None,
        provider: str = "",
        unavailable: Callable[[], str] = lambda: "",
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register a backend's implementation.

        Args:
            backend: name of the backend, which is the type of its ``torch.device``.
            dtypes: dtypes of the first argument that it takes.
            accepts: called with the arguments of the op, says whether it takes them; its docstring says so in words.
            tolerance: relative errors of values and gradients by dtype, where they differ from ``TOLERANCE``.
            provider: who brings it, if not the backend itself; it then computes only where ``OSUM_OPS`` names it.
            unavailable: says why a provider cannot run here, empty where it can.

        Raises:
            ValueError: the provider has an implementation already, or the parameters are not those of the reference.
        """
        name = provider or backend

        def register(call: Callable[P, R]) -> Callable[P, R]:
            if name in self.implementations:
                raise ValueError(f"op {self.name!r} has an implementation by {name!r} already")
            want, got = _parameters(self.reference), _parameters(call)
            if want != got:
                raise ValueError(f"op {self.name!r} by {name!r} has parameters {got}, its reference has {want}")
            table = {**TOLERANCE, **(tolerance or {})}
            self.implementations[name] = Implementation(name, backend, call, dtypes, accepts, table, unavailable)
            return call

        return register

    def choose(self, *args: P.args, **kwargs: P.kwargs) -> Choice:
        """Say which implementation computes these arguments, and why.

        Raises:
            ValueError: ``OSUM_OPS`` forces a provider that cannot compute them.
        """
        x: Any = args[0] if args else kwargs[self._first]
        device = x.device.type
        implementation = self.implementations.get(self.forced or device)
        if implementation is None:
            refusal = f"{device} has no implementation"
        elif implementation.backend not in ("", device):
            refusal = f"the tensors are on {device}"
        else:
            refusal = implementation.refusal(x.dtype, *args, **kwargs)
            if not refusal:
                reason = f"forced by {VARIABLE}" if self.forced else "implementation of the device"
                return Choice(implementation.provider, reason, implementation.call)
        if self.forced:
            raise ValueError(f"{VARIABLE} forces op {self.name!r} to {self.forced!r}, which cannot run: {refusal}")
        return Choice(REFERENCE, refusal, self.reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute by the implementation of the first argument's device, else by the reference."""
        result: R = self.choose(*args, **kwargs).call(*args, **kwargs)
        return result


def _parameters(call: Callable[..., Any]) -> list[str]:
    """Write parameters as ``name`` or ``name=default``, with ``*`` before those that are keyword-only."""
    return [
        ("*" if p.kind is p.KEYWORD_ONLY else "") + p.name + ("" if p.default is p.empty else f"={p.default!r}")
        for p in inspect.signature(call).parameters.values()
    ]


REGISTRY: dict[str, Op[..., Any]] = {}
"""Every op by name."""


def op(*, cases: Callable[[torch.Generator], Iterable[dict[str, Any]]]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make an op of its reference and list it in ``REGISTRY``."""

    def make(reference: Callable[P, R]) -> Op[P, R]:
        if reference.__name__ in REGISTRY:
            raise ValueError(f"there is an op {reference.__name__!r} already")
        made = Op(reference, cases)
        REGISTRY[made.name] = made
        return made

    return make


@contextmanager
def references() -> Iterator[None]:
    """Compute every op by its reference, whatever else could."""
    before = {name: each.forced for name, each in REGISTRY.items()}
    try:
        for each in REGISTRY.values():
            each.forced = REFERENCE
        yield
    finally:
        for name, forced in before.items():
            REGISTRY[name].forced = forced


def force(choices: str) -> None:
    """Force ops to providers, by the words of ``OSUM_OPS``: ``attention=reference,rms_norm=cpu``; "" forces none.

    Raises:
        ValueError: no such op, or no such provider of it.
    """
    forced: dict[str, str] = {}
    for choice in filter(None, map(str.strip, choices.split(","))):
        name, _, provider = map(str.strip, choice.partition("="))
        if name not in REGISTRY:
            raise ValueError(f"{VARIABLE}={choices!r} names no op {name!r}; the ops are {', '.join(REGISTRY)}")
        providers = REGISTRY[name].implementations
        if provider not in providers:
            known = ", ".join(providers)
            raise ValueError(f"{VARIABLE}={choices!r}: op {name!r} is provided by {known}, not by {provider!r}")
        if reason := providers[provider].unavailable():
            raise ValueError(f"{VARIABLE}={choices!r}: {provider!r} cannot run here: {reason}")
        forced[name] = provider
    for each in REGISTRY.values():
        each.forced = forced.get(each.name, "")
