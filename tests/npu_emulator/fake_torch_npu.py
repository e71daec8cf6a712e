"""A ``torch_npu`` for plain CPU torch: the recorded schemas in torch's dispatcher, the references behind them.

Keyword arguments are checked here, so that the broken rule has a name; kinds and types by torch itself on the real
schemas. torch differentiates the references. No wheel, no compiler. Tensors stay on the CPU, so code that asks
``tensor.device.type == "npu"`` needs the real wheel on the emulated device (README.md).

    with installed() as torch_npu:
        torch_npu.npu_swiglu(x)
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from npu_emulator import references, schemas
from npu_emulator.rules import require


@contextmanager
def installed(record: dict[str, Any] | None = None) -> Iterator[types.ModuleType]:
    """Define the operators of a record (by default the one beside this file) and put ``torch_npu`` among the modules.

    Raises:
        ImportError: a ``torch_npu`` is loaded already.
    """
    if "torch_npu" in sys.modules:
        raise ImportError("torch_npu is loaded already; the stand-in cannot take its place")
    record = record or schemas.recorded()
    module = types.ModuleType("torch_npu", __doc__)
    module.__version__ = f"{record['torch_npu']}+recorded"  # type: ignore[attr-defined]
    library = torch.library.Library("npu", "DEF")
    try:
        for name, operator in record["ops"].items():
            library.define(operator["schema"].removeprefix("npu::"))
            library.impl(name, _kernel(name), "CompositeImplicitAutograd")
            base = name.split(".")[0]
            setattr(module, base, _operator(base))
        sys.modules["torch_npu"] = module
        yield module
    finally:
        sys.modules.pop("torch_npu", None)
        library._destroy()


def _operator(name: str) -> Callable[..., Any]:
    packet = getattr(torch.ops.npu, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        known = [a.name for overload in packet.overloads() for a in getattr(packet, overload)._schema.arguments]
        unknown = ", ".join(kwargs.keys() - set(known))
        require(not unknown, "keyword-is-in-schema", f"{name} got {unknown}, takes {', '.join(dict.fromkeys(known))}")
        return packet(*args, **kwargs)

    return call


def _kernel(name: str) -> Callable[..., Any]:
    return partial(references.call, name)
