"""What the host's record does beyond naming itself."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from osum_npu import backend
{before}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(8, 2**20)
before = faults()
for _ in range(20):
    torch.ones(8, 2**20)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets an option of glibc")
def test_memory_is_kept_for_the_next_tensor():
    """Page faults of twenty tensors of 32 MB, one after the other, with and without the record's setting."""

    def count(before):
        out = subprocess.run(
            [sys.executable, "-c", FAULTS.format(before=before)], capture_output=True, text=True, check=True
        )
        return int(out.stdout)

    # a busy machine takes some back now and then
    assert count("backend.load('cpu').activate()") < 0.5 * count("")
