"""Kernels for the real torch_npu on the emulated device: the CPU's for aten, the references for fused operators.

What stays the wheel's own: Python, allocator, streams, argument parsing, autograd formulas, autocast lists, and the
routing of ``scaled_dot_product_attention``. ``calls`` counts fused operators; NPU_EMULATOR_CALL_LOG names a file to
which every process appends one JSON line at its exit: ``{"argv": […], "fused": {name: calls}, "aten": calls}``.
"""

from __future__ import annotations

import atexit
import collections
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from npu_emulator import build, references, schemas
from npu_emulator.rules import require

VARIABLE = "NPU_EMULATOR"
CALL_LOG = "NPU_EMULATOR_CALL_LOG"

OWN = frozenset(
    {
        "_pin_memory",
        "_reshape_alias",
        "_resize_output_",
        "alias",
        "as_strided",
        "as_strided_",
        "detach",
        "empty.memory_format",
        "empty_strided",
        "is_pinned",
        "record_stream",
        "resize_",
        "resize_as_",
        "scaled_dot_product_attention",
        "set_",
        "set_.source_Storage",
        "set_.source_Storage_storage_offset",
        "set_.source_Tensor",
        "squeeze",
        "transpose",
        "unfold",
        "unsqueeze",
        "view",
        "view_as_complex",
        "view_as_real",
    }
)
"""Kernels of torch_npu that stay: they touch no device memory, or end in a fused operator."""
COMPOSITES = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")

HOST_TENSORS = ("actual_seq", "seed", "offset")
"""Starts of the names of arguments that may be tensors on the host."""

calls: collections.Counter[str] = collections.Counter()
"""Calls of each fused operator by this process."""

_libraries: list[torch.library.Library] = []
_groups: list[Any] = []


def alias(x: Any) -> Any:
    """See a device tensor's memory as a CPU tensor; anything else as it is."""
    return torch.ops.npu_emulator.alias(x) if isinstance(x, Tensor) and x.device.type == "npu" else x


def to_npu(x: Any, device: torch.device) -> Any:
    """Copy a CPU tensor to the device, strides kept; anything else as it is."""
    if not isinstance(x, Tensor) or x.device.type != "cpu":
        return x
    return torch.ops.npu_emulator.to_npu(x.contiguous() if 0 in x.stride() else x, device)


def install() -> None:
    """Put the kernels behind the torch_npu that is loaded; once a process."""
    if _libraries:
        return
    torch.ops.load_library(str(Path(os.environ[VARIABLE]) / build.FALLBACK))
    warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel.*")
    _install_aten()
    _install_fused()
    _install_random()
    _install_hccl()
    if CALL_LOG in os.environ:
        atexit.register(_write_calls)


def _install_aten() -> None:
    """Replace every kernel that torch_npu has for the device."""
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    boxed = []
    for schema in torch._C._jit_get_all_schemas():
        name = ".".join(filter(None, (schema.name.removeprefix("aten::"), schema.overload_name)))
        if not schema.name.startswith("aten::") or name in OWN:
            continue
        try:
            keys = {key for key in (*COMPOSITES, "CPU", "PrivateUse1", "AutogradPrivateUse1") if _has(name, key)}
        except RuntimeError:  # a schema of TorchScript, unknown to the dispatcher
            continue
        if "PrivateUse1" not in keys:
            continue
        operator = getattr(
            getattr(torch.ops.aten, schema.name.removeprefix("aten::")), schema.overload_name or "default"
        )
        if {"CompositeImplicitAutograd", "AutogradPrivateUse1"} <= keys:
            # torch_npu has an autograd function of its own here, around a kernel that is not there: decompose it
            for key in ("AutogradPrivateUse1", "PrivateUse1"):
                library.impl(name, _decomposed(operator), key)
        elif "CPU" in keys:
            boxed.append(name)
        elif keys & set(COMPOSITES):
            library.impl(name, _composite(operator), "PrivateUse1")
    torch.ops.npu_emulator.replace_operators(boxed)


def _has(name: str, key: str) -> bool:
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)
    return found


def _decomposed(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    return lambda *args, **kwargs: operator.decompose(*args, **kwargs)


def _composite(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """Run an operator that is a composite on the CPU, whose parts the boxed kernel cannot reach below it."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        device = torch.device("npu", torch.npu.current_device())
        pairs: list[tuple[Tensor, Tensor]] = []

        def enter(x: Any) -> Any:
            nonlocal device
            if isinstance(x, torch.device) and x.type == "npu":
                device = x if x.index is not None else device
                return torch.device("cpu")
            if not isinstance(x, Tensor) or x.device.type != "npu":
                return x
            device = x.device
            known = [twin for ours, twin in pairs if ours is x]
            if not known:
                # an empty vector may be an out= argument that is to be resized, which borrowed memory cannot be
                twin = torch.empty(0, dtype=x.dtype) if x.shape == (0,) else alias(x)
                pairs.append((x, twin))
                known = [twin]
            return known[0]

        def leave(x: Any) -> Any:
            for ours, twin in pairs:
                if x is twin:
                    if ours.shape != x.shape:
                        ours.resize_(x.shape)
                        alias(ours).copy_(x)
                    return ours
            return x if stays else to_npu(x, device)

        stays = kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "npu"
        inner_args, inner_kwargs = pytree.tree_map(enter, (args, kwargs))
        if "pin_memory" in inner_kwargs:
            inner_kwargs["pin_memory"] = False
        return pytree.tree_map(leave, operator(*inner_args, **inner_kwargs))

    return kernel


def _install_fused() -> None:
    library = torch.library.Library("npu", "IMPL")
    _libraries.append(library)
    for name in references.FORWARD | references.BACKWARD:
        library.impl(name, _fused(name), "PrivateUse1")


def _fused(name: str) -> Callable[..., Any]:
    """Make a device kernel of a reference. It sees which inputs require a gradient, and records none."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        recording = torch.is_grad_enabled()
        given = schemas.bind(name, args, kwargs)
        tensors = {key: x for key, x in given.items() if isinstance(x, Tensor)}
        devices = {x.device for key, x in tensors.items() if not key.startswith(HOST_TENSORS)}
        words = ", ".join(f"{key} on {x.device}" for key, x in tensors.items())
        require(len(devices) == 1, "one-device", f"{name} got {words}")
        (device,) = devices

        def enter(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            own = alias(x).detach()
            return own.requires_grad_() if recording and x.requires_grad else own

        named = {key: enter(x) for key, x in given.items()}
        references.require_no_gradient(name, named)
        with torch.no_grad():
            result = references.call(name, **named)
        if isinstance(result, tuple):  # older wheels have operators with fewer results; later ones are added behind
            result = result[: len(getattr(torch.ops.npu, name).default._schema.returns)]
        return pytree.tree_map(lambda x: to_npu(x, device), result)

    return kernel


def _install_random() -> None:
    """Let the device's default generator be the CPU's, so that one seed makes a run equal to the CPU's.

    Generators of one's own, ``torch.Generator("npu")``, keep their state apart.
    """
    random = torch.npu.random
    get = lambda device="npu": torch.random.default_generator.get_state()  # noqa: E731
    put = lambda state, device="npu": torch.random.default_generator.set_state(state.cpu())  # noqa: E731
    seed = lambda number: torch.random.default_generator.manual_seed(int(number)) and None  # noqa: E731
    replaced: dict[str, Callable[..., Any]] = {
        "get_rng_state": get,
        "set_rng_state": put,
        "get_rng_state_all": lambda: [get() for _ in range(torch.npu.device_count())],
        "set_rng_state_all": lambda states: put(states[0]),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "seed": lambda: torch.random.default_generator.seed() and None,
        "seed_all": lambda: torch.random.default_generator.seed() and None,
        "initial_seed": torch.random.default_generator.initial_seed,
    }
    for name, function in replaced.items():
        for module in (random, torch.npu):
            setattr(module, name, function)


def _install_hccl() -> None:
    """Put gloo in the place of ``hccl``.

    The collectives of torch.distributed are operators of the dispatcher, so a boxed kernel carries them to the CPU; it
    refuses what HCCL refuses.
    """
    import torch.distributed as dist

    if not dist.is_available():
        return

    class Gloo(dist.ProcessGroupGloo):
        """Gloo for the calls that torch_npu makes past the dispatcher: its dist.gather is an all-gather."""

        def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *options: Any) -> Any:
            return super().allgather([list(map(alias, group)) for group in outputs], list(map(alias, inputs)), *options)

    def make(*given: Any) -> Gloo:
        _groups.append(Gloo(*given))  # else C++ alone holds it, and answers as the base class
        return _groups[-1]

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("c10d::")}
    collectives = [name.removeprefix("c10d::") for name in sorted(names) if has(name, "PrivateUse1")]
    torch.ops.npu_emulator.replace_collectives(collectives)
    dist.Backend._plugins["HCCL"] = dist.Backend._BackendPlugin(make, False)


def _write_calls() -> None:
    line = {"argv": sys.argv, "fused": dict(calls), "aten": torch.ops.npu_emulator.operator_calls()}
    with open(os.environ[CALL_LOG], "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
