"""`osum-npu parity`: a right device passes all levels, a wrong one is found, and two machines can be compared."""

import json
import math

import pytest
import torch
from torch import nn

from osum_npu import backend, functional, op
from osum_npu.cli.main import main
from osum_npu.comparison import Tape, formula, write_report
from osum_npu.parity import Row

FLOAT = ("--dtype", "float32")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    backend.load("cpu").activate()
    yield
    op.force("")


def run(out, *words):
    return main(["parity", "--out", str(out), *words])


def report(out):
    return json.loads((out / "parity.json").read_text("utf-8"))


def test_the_host_passes_modules_model_and_a_training(tmp_path, capsys):
    assert run(tmp_path, "--level", "modules,model,run", "--steps", "3") == 0
    found = report(tmp_path)
    assert found["ok"]
    assert {(row["level"], row["dtype"]) for row in found["rows"]} == {
        (level, dtype) for level in ("modules", "model", "run") for dtype in ("float32", "bfloat16")
    }
    assert {row["name"] for row in found["rows"]} >= {"encoder", "adapter", "llm qwen2", "llm qwen3", "training"}
    assert all(len(curve["device"]) == len(curve["reference"]) == 3 for curve in found["curves"])
    page = (tmp_path / "parity.html").read_text("utf-8")
    assert f"All {len(found['rows'])} comparisons hold" in page
    assert page.count("<polyline") == 4
    assert "FAILED" not in capsys.readouterr().out


def plant(monkeypatch, name, fault):
    """Let the host's implementation of an op be wrong."""
    each = getattr(functional, name)
    right = each.implementations.get("cpu", each.implementations["reference"])
    wrong = op.Implementation(
        "cpu", "cpu", lambda *args, **kwargs: fault(right.call(*args, **kwargs)), (torch.float32,)
    )
    monkeypatch.setitem(each.implementations, "cpu", wrong)


@pytest.mark.parametrize(
    ("op", "level", "names"),
    [
        ("attention", "ops", {"attention"}),
        ("attention", "modules", {"llm qwen2"}),
        ("packed_attention", "modules", {"encoder", "adapter", "packed llm qwen2"}),
    ],
)
def test_a_planted_scale_is_found_at_every_level(tmp_path, monkeypatch, capsys, op, level, names):
    plant(monkeypatch, op, lambda x: 1.001 * x)
    assert run(tmp_path, "--level", level, *FLOAT) == 1
    wrong = {row["name"] for row in report(tmp_path)["rows"] if not row["ok"]}
    assert names <= wrong < {row["name"] for row in report(tmp_path)["rows"]}
    assert "FAILED" in capsys.readouterr().out
    assert "do not hold" in (tmp_path / "parity.html").read_text("utf-8")


def test_a_fault_is_a_row_and_no_crash(tmp_path, monkeypatch):
    def broken(_result):
        raise RuntimeError("the core is out of order")

    plant(monkeypatch, "rotary", broken)
    assert run(tmp_path, "--level", "modules,model,run", "--steps", "2", *FLOAT) == 1
    found = report(tmp_path)
    assert sum("out of order" in row["fault"] for row in found["rows"]) == 6
    assert all(row["ok"] for row in found["rows"] if row["name"] in ("encoder", "adapter"))


def test_two_machines_are_compared_by_a_small_file(tmp_path, monkeypatch):
    kept = tmp_path / "host.npz"
    assert run(tmp_path / "a", "--level", "ops,model", *FLOAT, "--save", str(kept)) == 0
    assert kept.stat().st_size < 1_000_000
    assert run(tmp_path / "b", "--level", "ops,model", *FLOAT, "--against", str(kept)) == 0
    rows = [row for row in report(tmp_path / "b")["rows"] if row["provider"] == "against cpu"]
    assert len(rows) == len(report(tmp_path / "b")["rows"]) // 2
    assert all(row["forward_error"] == row["gradient_error"] == 0 for row in rows)
    plant(monkeypatch, "swiglu", lambda x: 1.01 * x)
    assert run(tmp_path / "c", "--level", "ops", *FLOAT, "--against", str(kept)) == 1
    wrong = {(row["name"], row["provider"]) for row in report(tmp_path / "c")["rows"] if not row["ok"]}
    assert ("swiglu", "against cpu") in wrong


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--level", "opps"], "--level 'opps' is none of ops, modules, model, run"),
        (["--dtype", "float16"], "--dtype 'float16' is none of float32, bfloat16"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--against", "nowhere.npz"], "nowhere.npz is no recording"),
        (["--backend", "gpu"], "there is no backend 'gpu'"),
    ],
)
def test_what_is_wrong_with_the_words_is_said(tmp_path, capsys, words, fault):
    assert run(tmp_path, *words) == 2
    assert fault in capsys.readouterr().err


def test_formula_is_the_same_on_every_machine():
    first, again = (formula.fill(nn.Linear(5, 3)) for _ in range(2))
    assert torch.equal(first.weight, again.weight)
    assert formula.integers("a", 7, 5) == formula.integers("a", 7, 5) != formula.integers("b", 7, 5)


def test_a_tape_tells_a_nan_from_a_right_number(tmp_path):
    row = Row(
        level="ops", name="x", backend="cpu", provider="cpu", dtype="float32", case="0: ", forward_error=0.0,
        gradient_error=0.0, tolerance=(1.0, 1.0),
    )  # fmt: skip
    right, wrong = Tape("a"), Tape("b")
    right.add("ops/x/float32/0/value0", torch.ones(3))
    wrong.add("ops/x/float32/0/value0", torch.full((3,), math.nan))
    assert right.against(right, [row])[0].ok
    assert not wrong.against(right, [row])[0].ok
    page = write_report([row, *wrong.against(right, [row])], [], {"device": "b"}, tmp_path)
    assert "1 of 2 comparisons do not hold" in page.read_text("utf-8")
    assert json.loads((tmp_path / "parity.json").read_text("utf-8"))["rows"][1]["forward_error"] is None
