"""The choice of a device, its reasons in words, and `osum-npu doctor`."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from osum_npu import backend, functional, op
from osum_npu.backend import Backend

GHOST = Backend(
    name="ghost",
    collective="ghoul",
    requires="no_such_driver",
    priority=99,
    env={"GHOST_LIGHT": "on"},
    mend="Dim the light.",
)
WRONG = "no backend"
STRANGER = Backend(name="meta", collective="gloo")


@pytest.fixture
def plugins(monkeypatch):
    """Backends of other packages beside our own."""

    def entry(name, value):
        return EntryPoint(name, value, "osum_npu.backends")

    entries = {
        "cpu": entry("cpu", "osum_npu_backends.cpu:CPU"),
        "ghost": entry("ghost", f"{__name__}:GHOST"),
        "wrong": entry("wrong", f"{__name__}:WRONG"),
        "stranger": entry("stranger", f"{__name__}:STRANGER"),
        "broken": entry("broken", "no_such_package:BACKEND"),
    }

    def install(*names):
        monkeypatch.setattr(backend, "installed", lambda: {name: entries[name] for name in names})

    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.delenv(op.VARIABLE, raising=False)
    return install


def test_this_project_brings_cpu_cuda_and_npu():
    assert {"cpu", "cuda", "npu"} <= set(backend.installed())
    assert backend.load("cpu").dtypes[0] == torch.float32
    assert backend.load("cuda").dtypes[0] == backend.load("npu").dtypes[0] == torch.bfloat16


CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    not CPUINFO.exists() or "\nflags" not in CPUINFO.read_text(),
    reason="wants the flags of an x86 processor from Linux",
)
def test_a_cpu_trains_in_bfloat16_where_it_has_instructions_for_it():
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    has = bool({"avx512_bf16", "amx_bf16"} & set(flags))
    cpu = backend.load("cpu")
    assert cpu.training_dtype == (torch.bfloat16 if has else torch.float32)
    assert cpu.diagnose()["training"].startswith("bfloat16" if has else "float32")


def test_other_devices_train_in_their_first_dtype():
    assert backend.load("npu").training_dtype == backend.load("cuda").training_dtype == torch.bfloat16


def test_cpu_activates_and_brings_its_ops():
    assert backend.load("cpu").activate() == torch.device("cpu")
    assert "cpu" in functional.attention.implementations


def test_auto_takes_the_highest_that_can_run(plugins, monkeypatch):
    plugins("cpu", "ghost")
    assert backend.current().name == "cpu"
    monkeypatch.setenv(backend.VARIABLE, "auto")
    assert backend.current().name == "cpu"
    monkeypatch.setattr(Backend, "unavailable", lambda self: "")
    assert backend.current().name == "ghost"


def test_a_named_backend_never_falls_back(plugins, monkeypatch):
    plugins("cpu", "ghost")
    monkeypatch.setenv(backend.VARIABLE, "ghost")
    monkeypatch.delenv("GHOST_LIGHT", raising=False)
    chosen = backend.current()
    assert chosen is GHOST
    with pytest.raises(ValueError, match=r"'ghost' cannot run here: import no_such_driver failed: .*Dim the light\."):
        chosen.activate()
    assert "GHOST_LIGHT" not in os.environ  # only what is installed is prepared for


def test_environment_defaults_are_set_before_the_driver_and_give_way_to_the_user(monkeypatch, tmp_path):
    (tmp_path / "late_driver.py").write_text("import os; raise OSError(os.environ['GHOST_LIGHT'])", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    late = replace(GHOST, requires="late_driver")
    monkeypatch.setenv("GHOST_LIGHT", "")
    del os.environ["GHOST_LIGHT"]
    with pytest.raises(ValueError, match="late_driver failed: on"):
        late.activate()
    os.environ["GHOST_LIGHT"] = "off"
    with pytest.raises(ValueError, match="late_driver failed: off"):
        late.activate()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu", "OSUM_BACKEND=gpu: there is no backend 'gpu'; installed are cpu, wrong, broken, stranger"),
        ("wrong", "OSUM_BACKEND=wrong: .*wanted a Backend of that name, got 'no backend'"),
        ("stranger", "wanted a Backend of that name, got Backend.name='meta'"),
        ("broken", "does not load: No module named 'no_such_package'; mend or uninstall it"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(plugins, monkeypatch, name, words):
    plugins("cpu", "wrong", "broken", "stranger")
    monkeypatch.setenv(backend.VARIABLE, name)
    with pytest.raises(ValueError, match=words):
        backend.current()


def test_nothing_installed_says_how_to_install(plugins):
    plugins()
    with pytest.raises(ValueError, match="install this project with pip"):
        backend.current()


def test_an_unknown_device_is_unavailable_and_no_crash():
    assert Backend(name="xyzzy", collective="").unavailable().endswith("sees no xyzzy device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_says_why_it_cannot_run_and_the_mend(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=r"sees no cuda device with CUDA_VISIBLE_DEVICES=''\. Install a CUDA build"):
        backend.load("cuda").activate()


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_npu_says_what_is_missing_and_nothing_runs_on_the_host_instead(monkeypatch, tmp_path):
    monkeypatch.setenv(backend.VARIABLE, "npu")
    words = r"'npu' cannot run here: import torch_npu failed: No module named 'torch_npu'\. Install CANN"
    with pytest.raises(ValueError, match=words):
        backend.current().activate()
    facts = backend.load("npu").diagnose()
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"pip install 'torch-npu=={minor}.*'" in facts["torch_npu"]


def test_only_one_name_of_the_allocator_is_set():
    code = "import os; from osum_npu_backends.npu import NPU; print('PYTORCH_NPU_ALLOC_CONF' in NPU.env)"
    for name, wanted in (("PYTORCH_ALLOC_CONF", "False"), ("SOMETHING_ELSE", "True")):
        env = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")} | {name: "max_split_size_mb:64"}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        assert out.strip() == wanted


class TwoDevices:
    """A device module of torch, as torch.get_device_module returns it."""

    taken = None

    def __init__(self, count):
        self.count = count

    def is_available(self):
        return self.count > 0

    def device_count(self):
        return self.count

    def set_device(self, index):
        self.taken = index


@pytest.mark.parametrize(("count", "local_rank", "index"), [(2, 1, 1), (2, 0, 0), (1, 1, 0)])
def test_device_index_is_the_local_rank(monkeypatch, count, local_rank, index):
    module = TwoDevices(count)
    monkeypatch.setattr(torch, "get_device_module", lambda name: module)
    variables = {
        "RANK": local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert STRANGER.activate() == torch.device("meta", index)
    assert module.taken == index


def test_more_processes_than_devices_is_an_error(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda name: TwoDevices(2))
    variables = {"RANK": 2, "LOCAL_RANK": 2, "WORLD_SIZE": 3, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="process 2 of this machine has no device: 2 of meta"):
        STRANGER.activate()


def test_naming_one_backend_imports_no_other():
    code = (
        "import sys; from osum_npu import backend; backend.current().activate(); "
        "print([m for m in sys.modules if m.startswith('osum_npu_')])"
    )
    env = {**os.environ, backend.VARIABLE: "cpu"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "osum_npu_ops.cpu" in out
    assert "osum_npu_backends.cuda" not in out
    assert "osum_npu_ops.cuda" not in out


# -- doctor


def doctor(capsys, *flags):
    import argparse

    from osum_npu.cli import doctor as verb

    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", *flags])
    status = args.run(args)
    return status, capsys.readouterr().out


def test_doctor_reports_what_runs_and_what_computes(plugins, monkeypatch, capsys):
    plugins("cpu", "ghost", "broken")
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    status, out = doctor(capsys, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["chosen"] == "cpu"
    assert report["versions"]["torch"] == torch.__version__
    reasons = {each["name"]: each["reason"] for each in report["backends"]}
    assert reasons["cpu"] == ""
    assert "no_such_driver" in reasons["ghost"]
    assert "no_such_package" in reasons["broken"]
    providers = {each["op"]: each["provider"] for each in report["ops"]}
    assert providers["attention"] == "cpu"
    assert providers["linear_cross_entropy"] == "reference"
    status, text = doctor(capsys)
    assert status == 0
    assert "Dim the light." in text
    assert all(op in text for op in providers)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (backend.VARIABLE, "ghost", "no_such_driver"),
        (backend.VARIABLE, "gpu", "no backend 'gpu'"),
        (op.VARIABLE, "attention=gpu", "not by 'gpu'"),
    ],
)
def test_doctor_fails_with_the_reason(plugins, monkeypatch, capsys, variable, value, words):
    plugins("cpu", "ghost")
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("GHOST_LIGHT", "")
    status, out = doctor(capsys)
    assert status == 1
    assert words in out.split("fault:")[1]
