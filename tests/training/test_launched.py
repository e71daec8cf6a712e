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


@pytest.mark.parametrize("launcher", ["msrun", slow("torchrun")])
def test_sigterm_to_one_rank_saves_on_all_and_is_reported(launcher, alone, corpus, tmp_path):
    """Rank 0 is not asked, and ends with the other after the same step; one process then goes on from there."""
    recipe, out = tmp_path / "run.yaml", tmp_path / "run"
    tiny.write_recipe(recipe, corpus)
    words = [recipe, "--devices=2", f"--port={launching.free_port()}", "--logs=logs", "--", f"out={out}", *CHANGES]
    launch = launching.Launch(
        f"{launcher}_train.sh", *words, path=[launching.with_msrun(tmp_path / "bin")], cwd=tmp_path
    )
    rank = None
    while len(losses(out)) < 3:
        assert launch.process.poll() is None, launch.end()
        rank = rank or launch.rank(1)
        time.sleep(0.01)
    os.kill(rank, signal.SIGTERM)
    asked = time.monotonic()
    status, output = launch.end()
    assert time.monotonic() - asked < IN_TIME[launcher]
    assert status == 75, output
    assert "; the same command goes on from there" in output.splitlines()[-1]
    assert launch.left() == []
    saved = max((out / "checkpoints").iterdir()).name
    assert (tmp_path / "logs/node_0/saved").read_text("utf-8").startswith(f"saved after step {int(saved[5:])};")
    assert not (out / "model").exists()
    assert len(losses(out)) == int(saved[5:]) < STEPS
    with tiny.one_thread():
        train(tiny.recipe(corpus, out, *CHANGES))
    assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(alone, losses(out), strict=True))
