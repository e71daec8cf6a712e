"""The rules of the house: no vendor in the core, arrows that run one way, packages as listed, a light import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this one
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "osum_npu").rglob("*.py"))
VENDOR = re.compile(
    r"""torch\.(cuda|npu|musa)|torch_npu|torch_musa|mindspeed|["'](cuda|npu|musa|nccl|hccl|mccl)["':]|\.(cuda|npu|musa)\(\)"""
)

# A room imports from its own level and from those above it in this list.
LEVELS = [
    {"op", "backend", "launch", "strict"},
    {"audio", "functional", "parity"},
    {"models", "data", "tasks", "checkpoints"},
    {"training", "inference", "evaluation", "serving", "comparison", "planning"},
    {"cli", "__main__"},
]
HEIGHT = {room: height for height, level in enumerate(LEVELS) for room in level}


def room(module):
    return module.split(".")[1] if "." in module else ""


def imports(path):
    """Modules that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_names_no_vendor(path):
    lines = enumerate(path.read_text("utf-8").splitlines(), 1)
    assert [f"{path}:{number}: {line.strip()}" for number, line in lines if VENDOR.search(line)] == []


@pytest.mark.parametrize("line", ["torch.cuda.synchronize()", "import torch_npu", 'x.to("cuda:0")', "x.npu()"])
def test_the_search_for_vendors_finds_them(line):
    assert VENDOR.search(line)


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    here = path.relative_to(ROOT / "osum_npu").with_suffix("").parts[0]
    for module in imports(path):
        assert not module.startswith(("osum_npu_backends", "osum_npu_ops")), f"{path} imports {module}"
        there = room(module) if module.startswith("osum_npu.") else ""
        if here in HEIGHT and there in HEIGHT:
            assert HEIGHT[there] <= HEIGHT[here], f"{path} imports {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "backends").glob("*.py")), ids=lambda path: path.name)
def test_backends_are_records(path):
    assert not any(module.startswith("osum_npu_ops") for module in imports(path))


def test_packages_are_those_of_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    renamed = {folder: name for name, folder in listed["package-dir"].items()}
    found = [
        init.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in ("osum_npu", *renamed)
        for init in (ROOT / top).rglob("__init__.py")
    ]
    installed = []
    for name in found:
        top, dot, rest = name.partition(".")
        installed.append(renamed.get(top, top) + dot + rest)
    assert sorted(listed["packages"]) == sorted(installed)


@pytest.mark.parametrize("module", ["osum_npu", "osum_npu.cli.main"])
def test_light_import(module):
    heavy = ["torch", "transformers", "whisper", "pydantic", "scipy", "matplotlib"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
