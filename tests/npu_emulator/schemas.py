"""The recorded schemas of torch_npu's operators: reading them, binding a call to one, and comparing with a wheel.

As a script, in an environment where torch_npu loads, it writes the record: ``python schemas.py [FILE]``.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

RECORD = Path(__file__).with_name("schemas.json")
KEYS = ("PrivateUse1", "AutogradPrivateUse1", "AutocastPrivateUse1", "Meta")
"""Dispatch keys of which the record says whether the wheel has a kernel."""


@cache
def recorded() -> dict[str, Any]:
    """Return ``{"torch": …, "torch_npu": …, "ops": {name: {"schema": …, "kernels": […]}}}``."""
    record: dict[str, Any] = json.loads(RECORD.read_text("utf-8"))
    return record


@cache
def arguments(name: str) -> dict[str, tuple[bool, Any]]:
    """Return, by argument in the order of the schema, whether it is keyword-only, and its default or ``...``."""
    schema = torch._C.parse_schema(recorded()["ops"][name]["schema"])
    found = {}
    for a in schema.arguments:
        found[a.name] = (a.kwarg_only, a.default_value if a.has_default_value() else ...)
    return found


def bind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return every argument of a call by its name, defaults filled in.

    Raises:
        TypeError: the schema has no such argument, or wants one that is not given.
    """
    known = arguments(name)
    named = dict(zip((key for key, (keyword, _) in known.items() if not keyword), args)) | kwargs
    full = {key: named.pop(key, default) for key, (_, default) in known.items()}
    missing = [key for key, value in full.items() if value is ...]
    if named or missing:
        raise TypeError(f"{name}: no argument {sorted(named)}, missing {missing}")
    return full


def from_wheel(names: list[str]) -> dict[str, Any]:
    """Record the named operators of the torch_npu that is loaded.

    Raises:
        KeyError: it has no such operator.
    """
    import torch_npu

    found = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("npu::"):
            found[".".join(filter(None, (schema.name.removeprefix("npu::"), schema.overload_name)))] = str(schema)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = {n: {"schema": found[n], "kernels": [key for key in KEYS if has(f"npu::{n}", key)]} for n in names}
    versions = {"torch": torch.__version__, "torch_npu": torch_npu.__version__}
    return {**{name: version.split("+")[0] for name, version in versions.items()}, "ops": ops}


def drift(record: dict[str, Any], wheel: dict[str, Any]) -> list[str]:
    """Say in which operators a record differs from a wheel; each line names the rule ``schema-is-current``."""
    lines = []
    for name in sorted(record["ops"].keys() | wheel["ops"].keys()):
        ours, theirs = (side["ops"].get(name) for side in (record, wheel))
        if ours != theirs:
            lines.append(f"[schema-is-current] {name}: recorded {ours}, the wheel {wheel['torch_npu']} has {theirs}")
    return lines


if __name__ == "__main__":
    made = json.dumps(from_wheel(list(recorded()["ops"])), indent=1) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(made, "utf-8")
    else:
        print(made, end="")
