"""On what a comparison was made."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from osum_npu import __version__
from osum_npu.backend import Backend


def facts(backend: Backend, device: torch.device) -> dict[str, str]:
    """Return device, versions, date and commit, in words by name."""
    module = torch.get_device_module(device)
    own = {"backend": backend.name, "device": str(device)}
    if hasattr(module, "get_device_name"):
        own["device"] = f"{module.get_device_name(device)} ({device})"
    if backend.requires:
        own[backend.requires] = _version(backend.requires.replace("_", "-"))
    return {
        **own,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "osum-npu": f"{__version__}{_commit()}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _commit() -> str:
    """Return the commit where this is a checkout, with a plus sign where files were changed; else nothing."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return ""
    try:
        asked = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
        return ", commit " + subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
