"""Trainings started by ``scripts/``: on one node and on several, a rank killed in the middle, and again."""

import os
import signal
import time

import launching
import pytest
import tiny

from osum_npu.training.log import read_log
from osum_npu.training.loop import train

CHANGES = (*tiny.WITHOUT_CHANCE, "stages.1.steps=12")
STEPS = 18
SLOW = "two processes import transformers, twice where one is killed: half a minute of CPU a case"
IN_TIME = {"msrun": 15, "torchrun": 40}
"""Seconds in which a launch ends after a rank has died; docs/cluster.md says so."""


def losses(out):
    return [row.get("loss", row.get("ctc_loss")) for row in read_log(out / "log.jsonl") if "learning_rate" in row]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Losses of one process that no launcher has started."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with tiny.one_thread():
        train(tiny.recipe(corpus, out, *CHANGES))
    return losses(out)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow(reason=SLOW))


@pytest.mark.parametrize(
    ("launcher", "nodes", "devices", "killed"),
    [
        ("msrun", 1, 2, True),
        ("msrun", 2, 1, False),
        slow("msrun", 2, 1, True),
        slow("torchrun", 1, 2, True),
        slow("torchrun", 2, 1, True),
    ],
)
def test_a_launched_training_learns_what_one_process_learns(launcher, nodes, devices, killed, alone, corpus, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", corpus)
    out, path = tmp_path / "run", launching.with_msrun(tmp_path / "bin")

    def start():
        port = launching.free_port()
        words = [recipe, f"--nodes={nodes}", f"--devices={devices}", "--master=127.0.0.1", f"--port={port}"]
        return [
            launching.Launch(
                f"{launcher}_train.sh",
                *words,
                f"--node-rank={node}",
                "--",
                f"out={out}",
                *CHANGES,
                path=[path],
                cwd=tmp_path,
            )
            for node in range(nodes)
        ]

    if killed:
        launches = start()
        while len(losses(out)) < 5:
            assert all(launch.process.poll() is None for launch in launches), launches[0].end()
            time.sleep(0.02)
        os.kill(launches[-1].rank(1), signal.SIGKILL)
        died = time.monotonic()
        ends = [launch.end() for launch in launches]
        assert time.monotonic() - died < IN_TIME[launcher]
        assert [status for status, _ in ends] == [1] * nodes, ends
        assert [launch.left() for launch in launches] == [[]] * nodes
        assert not (out / "model").exists()
    ends = [launch.end() for launch in start()]
    assert [status for status, _ in ends] == [0] * nodes, ends
    assert len(losses(out)) == len(alone) == STEPS
    assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(alone, losses(out)))
    assert "2 × cpu" in ends[0][1]
    logs = {path.name for path in tmp_path.glob("runs/logs/*/node_*/**/*") if path.is_file()}
    wanted = {"scheduler.log", "worker_0.log", "worker_1.log"} if launcher == "msrun" else {"stdout.log", "stderr.log"}
    assert wanted <= logs
