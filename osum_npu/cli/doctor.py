"""``osum-npu doctor``: what can run here, what computes, and the mend for what cannot."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from osum_npu.backend import Backend

PACKAGES = ("osum-npu", "torch", "transformers", "peft")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("doctor", help="say which devices can run here, and which implementation of each op")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; return 0 if the chosen backend can run, else 1."""
    with redirect_stdout(sys.stderr):  # a device's package may print what is no JSON
        report = diagnose()
    print(json.dumps(report, ensure_ascii=False, indent=2) if args.json else render(report))
    return 0 if report["runs"] else 1


def diagnose() -> dict[str, Any]:
    """Ask every installed backend, wake the chosen one, and list who computes each op on it."""
    from osum_npu import backend

    report: dict[str, Any] = {
        "versions": _versions(),
        "host": _host(),
        "backends": [_ask(name) for name in backend.installed()],
        "wanted": os.environ.get(backend.VARIABLE) or backend.AUTO,
        "chosen": None,
        "runs": False,
        "fault": "",
        "device": None,
        "ops": [],
        "providers": [],
        "self_test": None,
    }
    try:
        chosen = backend.current()
        report["chosen"] = chosen.name
        device = chosen.activate()
        report["device"] = _device(device)
        report["ops"] = _ops(chosen, device)
        report["providers"] = _others(chosen)
        report["self_test"] = _self_test(device)
        report["runs"] = report["self_test"]["ok"]
    except ValueError as fault:
        report["fault"] = str(fault)
    return report


def render(report: dict[str, Any]) -> str:
    """Write a report as text for people."""
    host = report["host"]
    lines = [
        "  ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"host: {host['cores']} cores, {host['threads']} threads, {host['memory_gib']} GiB memory",
        "",
        "backends",
    ]
    for each in report["backends"]:
        lines.append(f"  {each['name']:<8} {'can run' if not each['reason'] else 'cannot run: ' + each['reason']}")
        if each["reason"] and each["mend"]:
            lines.append(f"  {'':<8} {each['mend']}")
        lines += [f"  {'':<8} {name}: {value}" for name, value in each["facts"].items()]
    lines += ["", f"chosen: {report['chosen'] or 'none'} (OSUM_BACKEND={report['wanted']})"]
    if report["device"]:
        memory = report["device"]["memory_gib"]
        lines.append(f"device: {report['device']['name']}" + (f", {memory} GiB memory" if memory else ""))
    if report["fault"]:
        lines.append(f"fault: {report['fault']}")
    if report["ops"]:
        lines += ["", f"ops in {report['ops'][0]['dtype']}"]
        lines += [f"  {each['op']:<22} {each['provider']:<12} {each['reason']}" for each in report["ops"]]
    for each in report["providers"]:
        lines.append(
            f"  {each['op']:<22} {each['provider']:<12} {each['reason'] or 'can run, where OSUM_OPS names it'}"
        )
    if test := report["self_test"]:
        found = f"loss off by {test['loss_error']:.1e}, gradients by {test['gradient_error']:.1e}"
        lines += [
            "",
            f"self-test, a small model in float32: {'ok' if test['ok'] else 'FAILED'}, {test['fault'] or found}",
        ]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _host() -> dict[str, Any]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory_gib": round(memory / 2**30, 1)}


def _ask(name: str) -> dict[str, Any]:
    from osum_npu import backend

    try:
        found = backend.load(name)
    except ValueError as fault:
        return {"name": name, "reason": str(fault), "mend": "", "facts": {}}
    return {"name": name, "reason": found.unavailable(), "mend": found.mend, "facts": dict(found.diagnose())}


def _device(device: torch.device) -> dict[str, Any]:
    import torch

    described: dict[str, Any] = {"name": str(device), "memory_gib": None}
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        described["memory_gib"] = round(module.mem_get_info(device)[1] / 2**30, 1)
    return described


def _others(chosen: Backend) -> list[dict[str, str]]:
    """List providers behind the backend's own, which compute only where they are asked for."""
    from osum_npu.op import REGISTRY

    return [
        {"op": op.name, "provider": name, "reason": one.unavailable()}
        for op in REGISTRY.values()
        for name, one in op.implementations.items()
        if one.backend == chosen.name != name
    ]


def _self_test(device: torch.device) -> dict[str, Any]:
    """Compare loss and gradients of a small model with those of the host."""
    import torch

    from osum_npu.comparison.training import check_model

    (row,) = check_model(torch.float32, device, lambda _name, _tensor: None)
    return {
        "ok": row.ok,
        "loss_error": row.forward_error if row.ok else None,
        "gradient_error": row.gradient_error if row.ok else None,
        "fault": row.fault or ("" if row.ok else f"off by {row.forward_error:.1e} and {row.gradient_error:.1e}"),
    }


def _ops(chosen: Backend, device: torch.device) -> list[dict[str, str]]:
    """Ask each op about the first of its cases, in the dtype that training takes by default."""
    import torch

    from osum_npu import functional  # noqa: F401  registers the ops
    from osum_npu.op import REGISTRY

    dtype = chosen.dtypes[0]
    rows = []
    for op in REGISTRY.values():
        case = next(iter(op.cases(torch.Generator().manual_seed(0))))
        arguments = {
            name: x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x
            for name, x in case.items()
        }
        choice = op.choose(**arguments)
        rows.append(
            {
                "op": op.name,
                "dtype": str(dtype).removeprefix("torch."),
                "provider": choice.provider,
                "reason": choice.reason,
            }
        )
    return rows
