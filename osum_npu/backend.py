"""What the project asks of a device, and the choice of one.

All that torch already answers alike on every device is asked of torch: ``torch.accelerator``,
``torch.get_device_module``, ``torch.autocast(device_type)``. A :class:`Backend` holds only what torch cannot say.
Backends are entry points of the group ``osum_npu.backends``: those of this project and any other package's alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from osum_npu import launch, op

VARIABLE = "OSUM_BACKEND"
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One kind of device."""

    name: str
    """Type of its ``torch.device``; what ``OSUM_BACKEND``, the ops and its entry point call it."""
    collective: str
    """Its backend of ``torch.distributed``."""
    visible: str = ""
    """Environment variable that says which devices a process may see; empty where there is none."""
    requires: str = ""
    """Module whose import brings the device to torch; empty where torch knows it by itself."""
    ops: str = ""
    """Module whose import registers the backend's implementations of ops."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """Dtypes it computes in; the first is the default."""
    fastest: Callable[[], torch.dtype] | None = None
    """Says which of them a training computes in by default, where that is a matter of the machine; None: the first."""
    priority: int = 0
    """Among the backends that can run here, ``auto`` takes the highest."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables set before the device wakes, unless the user has set them."""
    wake: Callable[[], None] = lambda: None
    """Called before its first use in a process, to set what has no environment variable."""
    adamw: Callable[..., torch.optim.Optimizer] | None = None
    """Its own AdamW, with torch's arguments, for a training of one process and one stage; None where it has none."""
    profiler: Callable[[Path], Any] | None = None
    """Makes a profiler with ``start`` and ``stop`` that writes into a folder; torch's own where it is None."""
    diagnose: Callable[[], Mapping[str, str]] = dict
    """Says, by name, what else decides how it runs: versions that must match, settings. Works where it cannot run."""
    mend: str = ""
    """What to do where it cannot run."""

    @property
    def training_dtype(self) -> torch.dtype:
        """What a training computes in by default on this machine."""
        return self.fastest() if self.fastest else self.dtypes[0]

    def unavailable(self) -> str:
        """Say why this backend cannot run here; empty where it can.

        Where its module is installed, the backend's environment variables are set first: the import may read them.
        """
        if self.requires and find_spec(self.requires) is None:
            return f"import {self.requires} failed: No module named {self.requires!r}"
        for key, value in self.env.items():
            os.environ.setdefault(key, value)
        if self.requires:
            try:
                import_module(self.requires)
            except Exception as fault:  # a device's package without its driver raises anything, not ImportError alone
                return f"import {self.requires} failed: {fault}"
        try:
            available = torch.get_device_module(self.name).is_available()
        except RuntimeError:  # no device of that name in this torch
            available = False
        if available:
            return ""
        mask = f" with {self.visible}={os.environ[self.visible]!r}" if self.visible in os.environ else ""
        return f"torch {torch.__version__} sees no {self.name} device{mask}"

    def activate(self) -> torch.device:
        """Wake this process's device, load the backend's ops, heed ``OSUM_OPS``.

        Returns:
            The device with the index of this process's local rank, or 0 where the process sees a single one.

        Raises:
            ValueError: the backend cannot run here, has too few devices for this process, or ``OSUM_OPS`` is wrong.
        """
        if reason := self.unavailable():
            raise ValueError(f"backend {self.name!r} cannot run here: {reason}. {self.mend}".rstrip())
        self.wake()
        if self.ops:
            import_module(self.ops)
        op.force(os.environ.get(op.VARIABLE, ""))
        if self.name == "cpu":
            return torch.device("cpu")
        module = torch.get_device_module(self.name)
        count = module.device_count()
        index = launch.read().local_rank if count > 1 else 0  # a launcher may show each process its own device alone
        if index >= count:
            mask = f" ({self.visible}={os.environ[self.visible]})" if self.visible in os.environ else ""
            raise ValueError(
                f"process {index} of this machine has no device: {count} of {self.name} are visible{mask}; "
                "start fewer processes a machine"
            )
        module.set_device(index)
        return torch.device(self.name, index)


@cache
def installed() -> Mapping[str, EntryPoint]:
    """List the backends that this environment brings, by name, none imported yet."""
    return {entry.name: entry for entry in sorted(entry_points(group="osum_npu.backends"))}


def load(name: str) -> Backend:
    """Import one backend; no other is imported.

    Raises:
        ValueError: none is called that, or what is called that is no backend.
    """
    if name not in installed():
        known = ", ".join(installed()) or "none: install this project with pip, an editable install will do"
        raise ValueError(f"there is no backend {name!r}; installed are {known}")
    entry = installed()[name]
    try:
        backend = entry.load()
    except Exception as fault:  # it may be another package's
        raise ValueError(f"backend {name!r} ({entry.value}) does not load: {fault}; mend or uninstall it") from fault
    if not isinstance(backend, Backend) or backend.name != name:
        raise ValueError(f"entry point {name!r} ({entry.value}) wanted a Backend of that name, got {backend!r}")
    return backend


def current() -> Backend:
    """Return the backend that ``OSUM_BACKEND`` names, or for ``auto`` the best that can run here.

    A named one is returned though it may be unable to run; :meth:`Backend.activate` then says why.

    Raises:
        ValueError: ``OSUM_BACKEND`` names none that is installed.
    """
    name = os.environ.get(VARIABLE) or AUTO
    if name == AUTO:
        able = [backend for backend in map(load, installed()) if not backend.unavailable()]
        if able:
            return max(able, key=lambda backend: backend.priority)
        name = "cpu"
    try:
        return load(name)
    except ValueError as fault:
        raise ValueError(f"{VARIABLE}={name}: {fault}") from None
