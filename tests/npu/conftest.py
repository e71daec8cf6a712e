"""The two tiers: a stand-in for torch_npu for plain torch, and the real wheel on the emulated device."""

import os

import pytest
import torch

EMULATED = "NPU_EMULATOR" in os.environ


def pytest_runtest_setup(item):
    marked = item.get_closest_marker("emulated_npu") is not None
    if marked and not EMULATED:
        pytest.skip("not on the emulated device: python tests/npu_emulator run -- pytest -m emulated_npu")
    if EMULATED and not marked:
        pytest.skip("the stand-in and the real torch_npu do not fit into one process")


@pytest.fixture(scope="module")
def npu():
    """The stand-in: recorded schemas, references, tensors on the CPU."""
    from npu_emulator import fake_torch_npu

    with fake_torch_npu.installed() as torch_npu:
        yield torch_npu


@pytest.fixture(scope="session")
def wheel():
    """The real torch_npu, its kernels emulated."""
    import torch_npu

    return torch_npu


@pytest.fixture
def calls(wheel):
    """Calls of each fused operator within this test."""
    from npu_emulator import kernels

    kernels.calls.clear()
    return kernels.calls


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whichever tests run."""
    torch.manual_seed(0)
