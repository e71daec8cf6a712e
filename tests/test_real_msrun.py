"""The real msrun, where ``OSUM_MSRUN`` names one: what it gives its copies, and the quickstart trained under it.

MindSpore's wheel is 0.8 GB, so this is no part of ``make test``. In an environment of its own: ``pip install
mindspore==2.10.0``, then ``OSUM_MSRUN=/path/to/that/bin/msrun pytest -s tests/test_real_msrun.py``.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest

from osum_npu.data.synthesis.corpus import synthesize
from osum_npu.training.log import read_log

ROOT = Path(__file__).parents[1]
MSRUN = os.environ.get("OSUM_MSRUN")

pytestmark = pytest.mark.skipif(
    not MSRUN, reason="OSUM_MSRUN names no msrun; it comes with MindSpore's wheel of 0.8 GB"
)

COPY = """\
import json, os, pathlib, sys
name = os.environ["MS_ROLE"] + "_" + os.environ.get("DEVICE_ID", "")
pathlib.Path(sys.argv[1], name + ".json").write_text(json.dumps([dict(os.environ), sys.argv[2:]]))
"""
THEIR_OWN = {"LD_LIBRARY_PATH", "_", "SHLVL", "OLDPWD", "LINES", "COLUMNS"}
"""Variables of the shell, and the folder of MindSpore's libraries."""


def copies(folder, name, real, *options):
    """Run a launcher by the options of msrun; return what every copy saw."""
    records = folder / name
    records.mkdir()
    path = os.pathsep.join(
        [str(launching.with_msrun(folder / f"{name}_bin", real)), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    words = [*options, f"--log_dir={folder / 'log'}", "--join=True", "python", "-c", COPY, records, "a b", "--c"]
    environ = {**os.environ, "PATH": path, "RANK_ID": "5"}  # as a scheduler leaves it there
    subprocess.run(["msrun", *map(str, words)], env=environ, check=True, capture_output=True, timeout=120)
    seen = {}
    for record in sorted(records.glob("*.json")):
        environ, arguments = json.loads(record.read_text("utf-8"))
        kept = {key: value for key, value in environ.items() if key not in {*THEIR_OWN, "PATH"}}
        seen[record.stem] = kept, arguments
    return seen


@pytest.mark.parametrize("extra", [{}, {"OMP_NUM_THREADS": "3", "HCCL_CONNECT_TIMEOUT": "900"}], ids=["bare", "set"])
@pytest.mark.parametrize(
    "options",
    [
        ("--worker_num=2", "--local_worker_num=2"),
        ("--worker_num=4", "--local_worker_num=2", "--node_rank=1", "--master_addr=localhost", "--master_port=9111"),
        ("--worker_num=4", "--local_worker_num=2"),
    ],
    ids=["one-node", "second-node", "no-node-rank"],
)
def test_the_emulated_msrun_gives_what_the_real_one_gives(options, extra, tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "HCCL_CONNECT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in extra.items():
        monkeypatch.setenv(name, value)
    real, emulated = copies(tmp_path, "real", MSRUN, *options), copies(tmp_path, "emulated", None, *options)
    assert real.keys() == {"MS_SCHED_", "MS_WORKER_0", "MS_WORKER_1"}
    assert emulated == real


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart's recipe on a small corpus, three steps a stage; as words of the command line."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus"
    synthesize(corpus, {"train": 120, "dev": 16, "test": 16})
    places = [f"data.{split}.corpus.path={corpus / split}.jsonl" for split in ("train", "dev")]
    return ROOT / "recipes/quickstart/recipe.yaml", [*places, *(f"stages.{i}.steps=3" for i in range(3)), "log_every=1"]


def start(folder, quickstart, nodes, devices, *more):
    recipe, changes = quickstart
    words = [recipe, f"--nodes={nodes}", f"--devices={devices}", "--master=127.0.0.1"]
    words += [f"--port={launching.free_port()}"]
    path = folder / "bin"
    if not path.exists():
        launching.with_msrun(path, MSRUN)
    return [
        launching.Launch(
            *("msrun_train.sh", *words, f"--node-rank={node}", "--", f"out={folder / 'run'}", *changes, *more),
            path=[path],
            cwd=folder,
        )
        for node in range(nodes)
    ]


@pytest.mark.parametrize(("nodes", "devices"), [(1, 2), (2, 1)])
def test_the_quickstart_trains_under_the_real_msrun(nodes, devices, quickstart, tmp_path):
    ends = [launch.end() for launch in start(tmp_path, quickstart, nodes, devices)]
    print(*(output for _, output in ends), sep="\n")
    assert [status for status, _ in ends] == [0] * nodes
    assert "2 × cpu" in ends[0][1]
    rows = [row for row in read_log(tmp_path / "run/log.jsonl") if "learning_rate" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert (tmp_path / "run/model/model.safetensors").exists()
    for log in tmp_path.glob("runs/logs/*/node_*/scheduler.log"):
        assert log.read_text("utf-8").strip() == "osum-npu: msrun's copy for a scheduler, which is not needed; done"


def test_a_killed_rank_and_a_signal_end_the_real_msrun(quickstart, tmp_path):
    for number, status in ((signal.SIGKILL, 1), (signal.SIGTERM, 75)):
        (launch,) = start(tmp_path, quickstart, 1, 2, "stages.0.steps=400")
        before = len(read_log(tmp_path / "run/log.jsonl"))
        while len(read_log(tmp_path / "run/log.jsonl")) < before + 2:
            assert launch.process.poll() is None, launch.end()
            time.sleep(0.05)
        os.kill(launch.rank(1) if number == signal.SIGKILL else launch.process.pid, number)
        began = time.monotonic()
        ended, output = launch.end(timeout=30)
        print(f"{number.name}: status {ended} after {time.monotonic() - began:.1f} s\n{output[-1500:]}")
        assert ended == status
        assert launch.left() == []
