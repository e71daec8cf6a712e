"""Every op on every installed backend, in every dtype of it, against its reference: made from the registry."""

import os

import pytest

from osum_npu import backend, functional, parity  # noqa: F401  functional fills the registry
from osum_npu.op import REGISTRY

REQUIRED = set(filter(None, os.environ.get("OSUM_REQUIRE_BACKEND", "").split(",")))


def every_row():
    """One row an op and dtype; one skipped row for a backend that cannot run here, failing where it is required."""
    for name in sorted({*backend.installed(), *REQUIRED}):
        found = backend.load(name)
        if why := found.unavailable():
            marks = () if name in REQUIRED else pytest.mark.skip(reason=f"{name}: {why}")
            yield pytest.param(None, None, f"{why}. {found.mend}", id=name, marks=marks)
            continue
        device = found.activate()
        for dtype in found.dtypes:
            for op in REGISTRY.values():
                yield pytest.param(op, dtype, device, id=f"{op.name}-{name}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize(("op", "dtype", "device"), list(every_row()))
def test_values_and_gradients(op, dtype, device):
    if op is None:
        pytest.fail(f"OSUM_REQUIRE_BACKEND names a backend that cannot run here: {device}")
    implementation = parity.serving(op, dtype, device)
    rows = parity.check(op, implementation, dtype, device)
    assert rows, f"{op.name} by {implementation.provider} takes none of its cases"
    assert [row for row in rows if not row.ok] == []


def test_every_implementation_serves_an_op_in_a_dtype_of_its_backend():
    # A dtype that the backend does not list would never be tested above.
    for op in REGISTRY.values():
        for provider, implementation in op.implementations.items():
            if provider != "reference":
                assert set(implementation.dtypes) <= set(backend.load(provider).dtypes), (op.name, provider)
