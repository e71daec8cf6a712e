"""A backend of another distribution: built, installed by pip, and found."""

import json
import subprocess
import sys

import pytest
import tiny

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "osum-npu-moon"
version = "1"
[project.entry-points."osum_npu.backends"]
moon = "moon:MOON"
[tool.setuptools]
py-modules = ["moon", "moon_driver", "moon_ops"]
"""

FILES = {
    "pyproject.toml": PYPROJECT,
    "moon.py": (
        "import torch\n"
        "from osum_npu.backend import Backend\n"
        "MOON = Backend(name='moon', collective='gloo', requires='moon_driver', ops='moon_ops',\n"
        "               dtypes=(torch.float16,), priority=-1, mend='Wait for the night.')\n"
    ),
    "moon_driver.py": (
        "import os, types, torch\n"
        "if 'NIGHT' not in os.environ:\n"
        "    raise OSError('the moon is not up')\n"
        "torch.utils.rename_privateuse1_backend('moon')\n"
        "torch._register_device_module('moon', types.SimpleNamespace(\n"
        "    is_available=lambda: True, device_count=lambda: 1, set_device=lambda index: None))\n"
    ),
    "moon_ops.py": (
        "import torch\n"
        "from osum_npu import functional\n"
        "functional.swiglu.impl('moon', dtypes=(torch.float16,))(lambda gate, up: gate * up)\n"
    ),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder into which pip has installed the distribution."""
    source, target = tmp_path_factory.mktemp("moon"), tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (source / name).write_text(text, "utf-8")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return target


def test_doctor_lists_it_with_its_reason_and_others_are_unharmed(site):
    done = tiny.osum_npu("doctor", "--json", env={"PYTHONPATH": str(site), "OSUM_BACKEND": "cpu"})
    assert done.returncode == 0, done.stderr
    (moon,) = (each for each in json.loads(done.stdout)["backends"] if each["name"] == "moon")
    assert "the moon is not up" in moon["reason"]
    assert moon["mend"] == "Wait for the night."


def test_a_named_one_that_cannot_run_is_an_error(site):
    done = tiny.osum_npu("doctor", env={"PYTHONPATH": str(site), "OSUM_BACKEND": "moon"})
    assert done.returncode == 1
    assert "backend 'moon' cannot run here: import moon_driver failed: the moon is not up. Wait for" in done.stdout


def test_it_runs_where_it_can_and_brings_its_ops(site):
    code = (
        "from osum_npu import backend, functional as f; print(backend.current().activate(), *f.swiglu.implementations)"
    )
    env = {"PYTHONPATH": str(site), "OSUM_BACKEND": "moon", "NIGHT": "1"}
    done = tiny.python("-c", code, env=env)
    assert done.stdout.split() == ["moon:0", "reference", "moon"], done.stderr
