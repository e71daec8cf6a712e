"""The recorded schemas are those of the wheel."""

import pytest
import torch
from npu_emulator import schemas

pytestmark = pytest.mark.emulated_npu


def test_the_record_is_current(wheel):
    record = schemas.recorded()
    minors = [version.split(".")[:2] for version in (record["torch_npu"], wheel.__version__)]
    if minors[0] != minors[1]:
        pytest.skip(f"recorded from torch_npu {record['torch_npu']}, this is {wheel.__version__}")
    assert schemas.drift(record, schemas.from_wheel(list(record["ops"]))) == []


@pytest.mark.parametrize("name", schemas.recorded()["ops"])
def test_the_dispatcher_parses_the_record_to_the_same_schema(wheel, name):
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.npu, base), overload or "default")
    recorded = torch._C.parse_schema(schemas.recorded()["ops"][name]["schema"])
    assert str(operator._schema) == str(recorded)
