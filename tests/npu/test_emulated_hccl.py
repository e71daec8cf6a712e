"""Two processes on two devices over "hccl" (emulated: gloo underneath) agree with one process on the CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulated_npu

PROGRAM = Path(__file__).with_name("hccl_program.py")


@pytest.fixture(scope="module")
def output():
    """What the two processes print; they share one run, as starting it takes the longest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", PROGRAM]
    env = {**os.environ, "NPU_EMULATOR_DEVICES": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=140)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "what",
    [
        *("collectives", "average", "bfloat16", "refused dtypes", "bitwise", "gather", "objects"),
        *("host tensors", "ddp", "fsdp2"),
    ],
)
def test_both_processes_agree_with_one(output, what):
    assert sorted(line for line in output if line.startswith(f"{what}:")) == [f"{what}: 0 ok", f"{what}: 1 ok"]
