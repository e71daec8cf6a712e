"""A training that is asked to end saves, says so, and goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from osum_npu.cli.main import main
from osum_npu.training.interrupt import Interrupt, Interrupted, read_time_limit
from osum_npu.training.log import read_log
from osum_npu.training.loop import train
from osum_npu.training.meter import MEASURED
from osum_npu.training.optimizer import schedule
from osum_npu.training.saver import checkpoints
from osum_npu.training.state import read_progress


@pytest.fixture(autouse=True)
def _one_thread():
    with tiny.one_thread():
        yield


def numbers(out):
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_log(out / "log.jsonl")]


def weights(out):
    return [(out / "model" / name).read_bytes() for name in ("model.safetensors", "adapter_model.safetensors")]


@pytest.mark.parametrize("last", [1, 4, 8, 14])
def test_sigterm_in_the_middle_of_a_step(last, corpus, finished, tmp_path, monkeypatch):
    """In any stage, and at the last step, which leaves only the model to be written."""
    out, steps = tmp_path / "run", []

    def scheduled(stage, step):
        steps.append(step)
        if len(steps) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(stage, step)

    monkeypatch.setattr("osum_npu.training.loop.schedule", scheduled)
    report = tmp_path / "saved"
    monkeypatch.setenv("OSUM_SAVED", str(report))
    with pytest.raises(Interrupted, match=f"saved after step {last}; the same command goes on"):
        train(tiny.recipe(corpus, out))
    assert report.read_text("utf-8").startswith(f"saved after step {last};")
    assert read_progress(checkpoints(out / "checkpoints")[-1]).step == last
    assert not (out / "model").exists()
    monkeypatch.undo()
    train(tiny.recipe(corpus, out))
    assert numbers(out) == numbers(finished)
    assert weights(out) == weights(finished)


def test_a_time_limit_ends_with_a_status_of_its_own(corpus, finished, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", str(tiny.write_recipe(tmp_path / "run.yaml", corpus)), f"out={out}"]
    for step in (1, 2):
        assert main([*words, "--time-limit", "0:00:00"]) == 75
        assert f"osum-npu: saved after step {step}; the same command goes on from there" in capsys.readouterr().err
    assert main([*words, "--time-limit", "1-00:00:00"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"model: {out / 'model'}"
    assert numbers(out) == numbers(finished)
    assert weights(out) == weights(finished)


def test_time_limits_are_read_as_schedulers_write_them():
    assert read_time_limit("3:50:00") == 3 * 3600 + 50 * 60
    assert read_time_limit("2-01:00:09") == 49 * 3600 + 9
    for wrong in ("350", "3:50", "3:60:00", "-1:00:00", "3h"):
        with pytest.raises(ValueError, match="wanted hours:minutes:seconds"):
            read_time_limit(wrong)


def test_the_handler_is_gone_after_the_run():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert signal.getsignal(signal.SIGTERM) != before
        assert not interrupt.wanted
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.wanted
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_at_once_but_an_echo_does_not():
    program = (
        "import time; from osum_npu.training.interrupt import Interrupt\n"
        "with Interrupt():\n    print('ready', flush=True)\n    while True: time.sleep(0.01)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


def test_a_signal_to_all_processes_of_a_run_does_not_cost_its_workers(corpus, finished, tmp_path):
    """Schedulers send it to every process; the training still needs those that read sound."""
    out = tmp_path / "run"
    words = ("train", tiny.write_recipe(tmp_path / "run.yaml", corpus), f"out={out}", "data.workers=1")
    process = tiny.osum_npu(*words, start=True)
    deadline = time.monotonic() + 120
    while len(read_log(out / "log.jsonl")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    for pid in (*map(int, children), process.pid):
        os.kill(pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    train(tiny.recipe(corpus, out, "data.workers=1"))
    assert numbers(out) == numbers(finished)
    assert weights(out) == weights(finished)
