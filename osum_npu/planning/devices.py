"""Devices as data: ``devices.yaml``, or a user's own file in its form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from osum_npu.planning.tracer import Operator
from osum_npu.strict import STRICT

DEVICES = Path(__file__).with_name("devices.yaml")


@dataclass(frozen=True, config=STRICT)
class Reached:
    """Shares of the highest rates that a training reaches."""

    products: float = Field(gt=0, le=1)
    attention: float = Field(gt=0, le=1)
    bandwidth: float = Field(gt=0, le=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Device:
    """What one device has and can; ``devices.yaml`` explains each field."""

    backend: str
    memory: float = Field(gt=0)
    runtime: float = Field(ge=0)
    fragmentation: float = Field(ge=0)
    products: dict[str, float] = Field(min_length=1)
    bandwidth: float = Field(gt=0)
    reached: Reached
    launch: float = Field(ge=0)
    link: float = Field(gt=0)
    network: float = Field(gt=0)
    machine: int = Field(ge=1)
    fused: tuple[Literal["attention", "rms_norm", "add_rms_norm", "rotary", "swiglu"], ...]
    source: str
    functions: float | None = Field(default=None, gt=0)
    random: float | None = Field(default=None, gt=0)

    def seconds(self, operator: Operator) -> float:
        """Return how long an operator takes: its work or its bytes, whichever takes longer (Williams et al., 2009)."""
        bandwidth = self.bandwidth * self.reached.bandwidth
        if operator.kind in ("product", "attention"):
            share = self.reached.products if operator.kind == "product" else self.reached.attention
            rate = self.products.get(operator.dtype, self.products["float32"]) * share
            return self.launch + max(operator.flops / rate, operator.moved / bandwidth)
        slower = {"function": self.functions, "random": self.random}.get(operator.kind)
        return self.launch + operator.moved / (slower or bandwidth)

    def between(self, devices: int) -> float:
        """Return bytes a second in one direction between so many of them."""
        return self.link if devices <= self.machine else min(self.link, self.network)


def read_devices(extra: Path | None = None) -> dict[str, Device]:
    """Read the devices of this project and those of a file beside them.

    Raises:
        ValueError: the file cannot be read, or an entry of it is wrong; with a line for each fault.
    """
    found: dict[str, Device] = {}
    for path in (DEVICES, extra):
        if path is None:
            continue
        try:
            entries = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read as YAML: {error}") from error
        if not isinstance(entries, Mapping):
            raise ValueError(f"{path}: wanted devices by name, got {type(entries).__name__}")
        faults = []
        for name, entry in entries.items():
            if str(name).startswith("_"):  # only there to be merged into others
                continue
            try:
                found[str(name).lower()] = TypeAdapter(Device).validate_python(entry)
            except ValidationError as error:
                faults += [f"{path}: {name}.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        if faults:
            raise ValueError("\n".join(faults))
    return found


def find_device(name: str, devices: Mapping[str, Device]) -> tuple[str, Device]:
    """Return a device by its name in the table, or by the part of it behind the family (``910B``).

    Raises:
        ValueError: there is none of that name.
    """
    wanted = name.lower()
    for full, device in devices.items():
        if wanted in (full, full.partition("-")[2]):
            return full, device
    raise ValueError(f"there is no device {name!r}; known are {', '.join(devices)}; --devices-file brings others")
