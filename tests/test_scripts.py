"""The scripts that launch: their words, what each process is given, how a run ends.

Ranks are programs here that say what they were given; test_launched.py trains.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import launching
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("msrun_train.sh", "torchrun_train.sh")

RANK = """\
#!/bin/bash
# In place of python: passes the check of the environment; as a rank writes down what it was given and does as told.
[[ $1 == -c ]] && exit 0
name=${MS_ROLE}_${MS_NODE_ID:-none}
printf '%s\\0' "$@" >"$RECORDS/$name.words"
cat /proc/$$/environ >"$RECORDS/$name.environ"
[[ $MS_ROLE == MS_SCHED ]] && exit 0
case $BEHAVE in
    finish) exit 0 ;;
    fail) ((RANK_ID == 1)) && exit 7 ;;
    deaf) trap '' TERM ;;
    save) trap 'echo saved >"$RECORDS/$name.saved"; exit 0' TERM ;;
    again) trap 'echo "saved after step 7" >"$OSUM_SAVED"; exit 75' TERM ;;
    limit) echo "saved after step 8" >"$OSUM_SAVED"; exit 75 ;;
esac
touch "$RECORDS/$name.ready"
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


class Run:
    """``msrun_train.sh`` with ranks that behave as told."""

    def __init__(self, folder, behave, *words, env=None):
        self.records = folder / "records"
        self.records.mkdir()
        (folder / "recipe.yaml").touch()
        launching.executable(folder / "bin/python", RANK)
        launching.with_msrun(folder / "bin")
        env = {"RECORDS": str(self.records), "BEHAVE": behave, **(env or {})}
        words = words or ("recipe.yaml", "--devices=2")
        self.launch = launching.Launch("msrun_train.sh", *words, path=[folder / "bin"], cwd=folder, env=env)

    def environ(self, name):
        found = (self.records / f"{name}.environ").read_bytes().decode().split("\0")
        return dict(variable.split("=", 1) for variable in found if "=" in variable)

    def words(self, name):
        return (self.records / f"{name}.words").read_text("utf-8").split("\0")[:-1]

    def wait(self, ending="ready"):
        until = time.monotonic() + 30
        while len(list(self.records.glob(f"MS_WORKER_*.{ending}"))) < 2:
            assert time.monotonic() < until, self.launch.process.communicate()
            time.sleep(0.02)


@pytest.fixture
def run(tmp_path):
    started = []

    def start(behave, *words, **options):
        started.append(Run(tmp_path, behave, *words, **options))
        return started[-1]

    yield start
    for each in started:
        each.launch.process.kill()
        for pid in each.launch.left():
            os.kill(pid, signal.SIGKILL)


def said(script, *words, cwd, path=os.environ["PATH"]):
    """Run a script that is to refuse; return what it says."""
    bash = shutil.which("bash")
    done = subprocess.run(
        [bash, ROOT / "scripts" / script, *words],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("", "no recipe is named"),
        ("out=x --devices 1", "no recipe is named"),
        ("gone.yaml --devices 1", "there is no recipe gone.yaml"),
        ("recipe.yaml", "--devices is missing"),
        ("recipe.yaml --devices", "--devices wants a value"),
        ("recipe.yaml --devices two", "--devices two: wanted an integer from 1"),
        ("recipe.yaml --devices 08", "--devices 08: wanted an integer"),
        ("recipe.yaml --devices=1 --port=70000", "--port 70000: wanted an integer from 1 to 65535"),
        ("recipe.yaml --devices 1 --nodes 2 --master a", "--node-rank is missing: with --nodes 2"),
        ("recipe.yaml --devices 1 --nodes 2 --node-rank 1", "--master is missing: with --nodes 2"),
        ("recipe.yaml --devices 1 --nodes 2 --node-rank 2 --master a", "--node-rank 2: wanted an integer from 0 to 1"),
        ("recipe.yaml --nproc 1", "there is no option --nproc"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_said(script, words, answer, tmp_path):
    (tmp_path / "recipe.yaml").touch()
    assert said(script, *words.split(), cwd=tmp_path).startswith(f"{script}: {answer}")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_missing_msrun_and_a_foreign_python_are_named(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    words = ("recipe.yaml", "--devices=1")
    bare = tmp_path / "bin"
    for program in ("bash", "dirname", "date", "mkdir", "nproc"):
        (bare / program).parent.mkdir(exist_ok=True)
        (bare / program).symlink_to(shutil.which(program))
    assert "there is no msrun in PATH; it comes with MindSpore" in said(
        "msrun_train.sh", *words, cwd=tmp_path, path=str(bare)
    )
    assert "there is no python in PATH" in said("torchrun_train.sh", *words, cwd=tmp_path, path=str(bare))
    launching.executable(bare / "python", "#!/bin/sh\nexit 1\n")
    assert f"{bare}/python has no osum_npu" in said("torchrun_train.sh", *words, cwd=tmp_path, path=str(bare))


def test_every_copy_is_given_what_msrun_gives(run):
    """The recorded table of MindSpore 2.10.0; ``test_real_msrun.py`` compares with the original."""
    one = run("finish", "recipe.yaml", "out=a b", "--port=9111", "--devices=2", "--", "x=1")
    assert one.launch.end()[0] == 0
    both = {
        "RANK_SIZE": "2",
        "MS_WORKER_NUM": "2",
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": "9111",
        "MS_TOPO_TIMEOUT": "600",
        "HCCL_CONNECT_TIMEOUT": "600",
    }
    scheduler = one.environ("MS_SCHED_none")
    assert {**both, "MS_ROLE": "MS_SCHED", "RANK_ID": "0"}.items() <= scheduler.items()
    assert not {"DEVICE_ID", "MS_NODE_ID"} & scheduler.keys()
    for rank in ("0", "1"):
        worker = one.environ(f"MS_WORKER_{rank}")
        want = {**both, "MS_ROLE": "MS_WORKER", "RANK_ID": rank, "DEVICE_ID": rank, "MS_NODE_ID": rank}
        assert want.items() <= worker.items()
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & worker.keys()
        assert worker["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
        assert one.words(f"MS_WORKER_{rank}") == ["-m", "osum_npu", "train", "recipe.yaml", "out=a b", "x=1"]


def test_a_node_of_several(run):
    words = ("recipe.yaml", "--devices=2", "--nodes", "3", "--node-rank", "2", "--master=127.0.0.1", "--logs", "here")
    two = run("finish", *words, env={"OMP_NUM_THREADS": ""})
    status, output = two.launch.end()
    assert status == 0
    assert "ranks 4 to 5 of 6, logs in here/node_2" in output
    worker = two.environ("MS_WORKER_5")
    assert (worker["RANK_ID"], worker["DEVICE_ID"], worker["RANK_SIZE"]) == ("5", "1", "6")
    assert int(worker["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    logs = two.records.parent / "here/node_2"
    assert {path.name for path in logs.iterdir()} == {"scheduler.log", "worker_4.log", "worker_5.log"}


def test_each_run_has_logs_of_its_own(run):
    once = run("finish")
    assert once.launch.end()[0] == 0
    (folder,) = (once.records.parent / "runs/logs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-\d+", folder.name)
    assert (folder / "node_0/worker_1.log").exists()


def test_a_failed_rank_ends_the_run_and_leaves_nothing(run):
    failing = run("fail")
    status, output = failing.launch.end(timeout=60)
    assert status == 1
    assert "ended with status 1; each rank's output is in runs/logs/" in output
    assert failing.launch.left() == []


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_ends_the_run(run, name, status):
    staying = run("stay")
    staying.wait()
    staying.launch.process.send_signal(signal.Signals[name])
    assert staying.launch.end(timeout=60)[0] == status
    assert staying.launch.left() == []


def test_ranks_may_save_before_they_end(run):
    saving = run("save")
    saving.wait()
    saving.launch.process.send_signal(signal.SIGTERM)
    assert saving.launch.end(timeout=60)[0] == 0  # all ranks ended well
    saving.wait("saved")
    assert saving.launch.left() == []


def test_ranks_that_saved_and_want_to_go_on_are_reported(run):
    """Both launchers make 1 of any status; the script looks for the file that the ranks leave."""
    again = run("again")
    again.wait()
    again.launch.process.send_signal(signal.SIGTERM)
    status, output = again.launch.end(timeout=60)
    assert status == 75
    assert "msrun_train.sh: saved after step 7" in output
    assert again.launch.left() == []


def test_ranks_that_end_by_themselves_after_saving_are_reported(run):
    words = ("recipe.yaml", "--devices=2", "--logs=here", "--time-limit", "0:30:00", "--profile=3")
    limit = run("limit", *words)
    status, output = limit.launch.end(timeout=60)
    assert (status, limit.words("MS_WORKER_1")[-2:]) == (75, ["--time-limit=0:30:00", "--profile=3"])
    assert "saved after step 8" in output


def test_an_old_report_of_saving_does_not_count(run, tmp_path):
    old = tmp_path / "here/node_0/saved"
    old.parent.mkdir(parents=True)
    old.touch()
    assert run("fail", "recipe.yaml", "--devices=2", "--logs=here").launch.end(timeout=60)[0] == 1
    assert not old.exists()


def test_ranks_that_do_not_heed_a_signal_are_killed_by_the_second(run):
    deaf = run("deaf")
    deaf.wait()
    deaf.launch.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert deaf.launch.process.poll() is None
    deaf.launch.process.send_signal(signal.SIGTERM)
    status, output = deaf.launch.end(timeout=60)
    assert status == 143
    assert "a second signal ends them at once" in output
    assert deaf.launch.left() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, 137), (signal.SIGTERM, 143)])
def test_an_msrun_that_dies_leaves_no_orphans(run, number, status):
    """msrun's own end leaves ranks running, which nobody would find again; SIGTERM gives them time."""
    orphans = run("save")
    orphans.wait()
    (msrun,) = (pid for pid in orphans.launch.left() if "msrun_emulator" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(msrun, number)
    assert orphans.launch.end(timeout=60)[0] == status
    assert orphans.launch.left() == []
    assert len(list(orphans.records.glob("*.saved"))) == (2 if number == signal.SIGTERM else 0)


def test_a_halted_launcher_is_waited_for_in_peace(run):
    """Without a pause in the loop, the script would take a whole core."""
    staying = run("stay")
    staying.wait()
    (msrun,) = (pid for pid in staying.launch.left() if "msrun_emulator" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(msrun, signal.SIGSTOP)

    def ticks():
        return sum(map(int, Path(f"/proc/{staying.launch.process.pid}/stat").read_text().split()[13:15]))

    before = ticks()
    time.sleep(1.5)
    assert ticks() - before < 0.2 * os.sysconf("SC_CLK_TCK")
    os.kill(msrun, signal.SIGCONT)
    staying.launch.process.send_signal(signal.SIGTERM)
    assert staying.launch.end(timeout=60)[0] == 143
    assert staying.launch.left() == []


def test_slurm_fills_nodes_rank_and_master(tmp_path):
    """srun and scontrol only pass on what Slurm would; the rest is the script's."""
    (tmp_path / "recipe.yaml").touch()
    launching.executable(tmp_path / "bin/scontrol", '#!/bin/sh\n[ "$3" = "node[1-2]" ] && printf "node1\\nnode2\\n"\n')
    launching.executable(
        tmp_path / "bin/srun",
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done\n',
    )
    launching.executable(tmp_path / "bin/msrun", '#!/bin/sh\necho "$@"\n')
    launching.executable(tmp_path / "bin/python", "#!/bin/sh\nexit 0\n")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    spooled = shutil.copy(ROOT / "scripts/slurm_train.sbatch", tmp_path / "slurm_script")
    slurm = {
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", spooled, "recipe.yaml", "seed=1"],
        cwd=tmp_path,
        env={**os.environ, **slurm, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("--worker_num")]
    assert len(lines) == 2
    for node, line in enumerate(lines):
        for want in ("--worker_num=16", "--local_worker_num=8", f"--node_rank={node}", "--master_addr=node1"):
            assert want in line.split()
        assert f"--log_dir=runs/logs/slurm-42/node_{node}" in line
        assert line.endswith("python -m osum_npu train recipe.yaml seed=1")
