"""Three tiers: a stand-in for torch_npu, the real wheel on the emulated device, and the same tests on hardware."""

import os

import pytest
import torch

EMULATED = "NPU_EMULATOR" in os.environ
HARDWARE = not EMULATED and "npu" in os.environ.get("OSUM_REQUIRE_BACKEND", "").replace(" ", "").split(",")


def pytest_runtest_setup(item):
    if item.get_closest_marker("emulated_npu") is None:
        if EMULATED or HARDWARE:
            pytest.skip("the stand-in and the real torch_npu do not fit into one process")
    elif HARDWARE and item.get_closest_marker("emulator_only"):
        pytest.skip("looks into the emulator, or wants an answer that hardware does not give")
    elif not (EMULATED or HARDWARE):
        pytest.skip("not on the emulated device: python tests/npu_emulator run -- pytest -m emulated_npu")


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
def took(wheel):
    """Asserts which fused operators this test has called, and how often; on hardware nobody counts."""
    if HARDWARE:
        return lambda expected: None
    from npu_emulator import kernels

    kernels.calls.clear()

    def check(expected):
        assert kernels.calls == expected

    return check


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whichever tests run."""
    torch.manual_seed(0)
