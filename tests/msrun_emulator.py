"""Behaves as msrun of MindSpore 2.10.0 does, in what a torch program meets: options, environment, copies, logs, ends.

``test_real_msrun.py`` compares the two, copy by copy. Binding to cores, simulation and MindX are left out.
"""

import argparse
import ast
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

OWN_INTERPRETERS = ("python", "python3", "pytest")
"""Scripts of these names are run as programs; any other is given to the ``python`` in PATH."""


def parse(words):
    parser = argparse.ArgumentParser(prog="msrun")
    parser.add_argument("--worker_num", type=int, default=8)
    parser.add_argument("--local_worker_num", type=int, default=8)
    parser.add_argument("--master_addr", default="127.0.0.1")
    parser.add_argument("--master_port", type=int, default=8118)
    parser.add_argument("--node_rank", type=int, default=-1)
    parser.add_argument("--log_dir", type=Path, default=Path())
    parser.add_argument("--join", type=ast.literal_eval, choices=[True, False], default=False)
    parser.add_argument("--cluster_time_out", type=int, default=600)
    parser.add_argument("task_script")
    parser.add_argument("task_script_args", nargs=argparse.REMAINDER)
    return parser.parse_args(words)


class Launch:
    """The copies of one node."""

    def __init__(self, options):
        self.options = options
        script = [options.task_script, *options.task_script_args]
        self.command = script if options.task_script in OWN_INTERPRETERS else ["python", *script]
        # msrun changes its own environment from copy to copy, so a later copy inherits what an earlier one was given
        self.environment = os.environ.copy()
        self.environment.setdefault("OMP_NUM_THREADS", "1")
        self.environment.setdefault("HCCL_CONNECT_TIMEOUT", "600")
        self.environment["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
        self.environment["RANK_SIZE"] = str(options.worker_num)
        self.workers, self.tails = [], []
        options.log_dir.mkdir(parents=True, exist_ok=True)

    def start(self, role, log, **more):
        self.environment |= {
            "MS_WORKER_NUM": str(self.options.worker_num),
            "MS_SCHED_HOST": "127.0.0.1" if self.options.master_addr == "localhost" else self.options.master_addr,
            "MS_SCHED_PORT": str(self.options.master_port),
            "MS_TOPO_TIMEOUT": str(self.options.cluster_time_out),
            "MS_ROLE": role,
            **more,
        }
        with (self.options.log_dir / log).open("wb") as output:
            return subprocess.Popen(
                self.command,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=role == "MS_WORKER",
            )

    def start_worker(self, local_rank):
        options = self.options
        if options.local_worker_num == options.worker_num:
            rank = local_rank
        elif options.node_rank >= 0:
            rank = options.node_rank * options.local_worker_num + local_rank
        else:
            rank = None  # MindSpore would give one later; nobody does for torch
        named = {} if rank is None else {"RANK_ID": str(rank), "MS_NODE_ID": str(rank)}
        log = f"worker_{local_rank if rank is None else rank}.log"
        self.workers.append(self.start("MS_WORKER", log, DEVICE_ID=str(local_rank), **named))
        if self.options.join:
            self.tails.append(subprocess.Popen([shutil.which("tail"), "-f", options.log_dir / log]))

    def kill(self):
        for worker in self.workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
        for tail in self.tails:
            tail.kill()

    def run(self):
        scheduler = None
        if self.options.master_addr in ("127.0.0.1", "localhost"):  # this node is the master, so on loopback every one
            scheduler = self.start("MS_SCHED", "scheduler.log", RANK_ID="0")
        for local_rank in range(self.options.local_worker_num):
            self.start_worker(local_rank)
        if not self.options.join:
            return

        def interrupted(*_):
            self.kill()
            sys.exit(0)

        signal.signal(signal.SIGINT, interrupted)  # SIGTERM ends msrun and leaves its children
        failed = False
        while not failed and any(worker.poll() is None for worker in self.workers):
            failed = any(worker.poll() for worker in self.workers)
            time.sleep(1)
        failed = failed or any(worker.poll() for worker in self.workers)
        self.kill()
        if scheduler is not None and scheduler.wait() != 0:  # however long it takes
            failed = True
        if failed:
            raise RuntimeError(f"Distributed job exited with exception. Please check logs in {self.options.log_dir}.")


if __name__ == "__main__":
    Launch(parse(sys.argv[1:])).run()
