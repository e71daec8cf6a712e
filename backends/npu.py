"""Huawei Ascend NPUs, by torch_npu."""

import os
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from osum_npu.backend import Backend

_ALLOCATORS = ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Two names of one setting; torch_npu ends the process where both are set."""


def full_precision() -> None:
    """Compute float32 in float32: by default convolutions round their input to hf32."""
    torch.npu.matmul.allow_hf32 = False  # type: ignore[attr-defined]
    torch.npu.conv.allow_hf32 = False  # type: ignore[attr-defined]


def fused_adamw(parameters: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
    """Learn by one kernel. Parameters and gradients move into one buffer each, so what learns cannot change later."""
    from torch_npu.optim import NpuFusedAdamW

    optimizer: torch.optim.Optimizer = NpuFusedAdamW(parameters, **options)

    def separate(*_: Any) -> None:
        """Give every first gradient memory of its own: the optimiser takes a gradient's whole storage for its size."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone(memory_format=torch.contiguous_format)
        first.remove()

    first = optimizer.register_step_pre_hook(separate)
    return optimizer


def profiler(folder: Path) -> Any:
    """Record host and device; when it stops, CANN writes trace and tables of operators into a folder of ``folder``."""
    from torch_npu import profiler

    return profiler.profile(on_trace_ready=profiler.tensorboard_trace_handler(str(folder)))


def _wanted() -> str:
    """Return the torch_npu that fits the installed torch: the same minor version."""
    major, minor = torch.__version__.split(".")[:2]
    return f"{major}.{minor}"


def _torch_npu() -> str:
    wanted = _wanted()
    try:
        found = version("torch-npu")
    except PackageNotFoundError:
        return f"not installed; torch {torch.__version__} needs: pip install 'torch-npu=={wanted}.*'"
    if found.startswith(f"{wanted}."):
        return f"{found}, fits torch {torch.__version__}"
    return f"{found} does not fit torch {torch.__version__}, which needs: pip install 'torch-npu=={wanted}.*'"


def _recorded(*files: Path) -> str:
    """Read a version that an installer of Ascend's software has left in one of some files."""
    for path in files:
        if path.is_file() and (
            found := re.search(r"(?im)^version\s*=\s*\[?([^\]\s]+)", path.read_text("utf-8", "ignore"))
        ):
            return found[1]
    return ""


def _cann() -> str:
    home = os.environ.get("ASCEND_HOME_PATH")
    if not home:
        return "ASCEND_HOME_PATH is not set: source CANN's set_env.sh"
    files = [Path(home) / "version.cfg", *sorted(Path(home).glob("*-linux/ascend_toolkit_install.info"))]
    return f"{_recorded(*files) or 'no version found'} in {home}"


def diagnose() -> Mapping[str, str]:
    """Say which versions must match, and what is set. The files that hold versions are known by use, not documented."""
    names = ("HCCL_", "ASCEND_", "PYTORCH_NPU_", "PYTORCH_ALLOC_", "TASK_QUEUE_", "CPU_AFFINITY_", "TORCH_NPU_")
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(names)}
    return {
        "torch_npu": _torch_npu(),
        "CANN": _cann(),
        "driver": _recorded(Path("/usr/local/Ascend/driver/version.info")) or "no version found",
        **settings,
    }


NPU = Backend(
    name="npu",
    collective="hccl",
    visible="ASCEND_RT_VISIBLE_DEVICES",
    requires="torch_npu",
    ops="osum_npu_ops.npu",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    priority=20,
    env={
        "HCCL_CONNECT_TIMEOUT": "600",  # ranks of a large job start minutes apart
        "TASK_QUEUE_ENABLE": "2",
        "CPU_AFFINITY_CONF": "1",
        # variable lengths of speech fragment memory that is cut into fixed blocks
        **({} if any(name in os.environ for name in _ALLOCATORS) else {_ALLOCATORS[0]: "expandable_segments:True"}),
    },
    wake=full_precision,
    adamw=fused_adamw,
    profiler=profiler,
    diagnose=diagnose,
    mend=(
        "Install CANN and source its set_env.sh, install the torch_npu of the same minor version as torch, and see "
        "that npu-smi info lists a device."
    ),
)
