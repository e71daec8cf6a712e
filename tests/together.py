"""Trainings in several processes, forked from one that has imported all: a second each, where a launcher takes ten."""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback

import launching

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["osum_npu.training.loop", "osum_npu.cli.train"])


def _train(variables, words, log):
    os.setsid()
    os.environ.update(variables)
    # else this process would start its loader's workers by a server of its own, which outlives it when it is killed
    multiprocessing.set_start_method("fork", force=True)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import torch

    from osum_npu.cli.main import main

    torch.set_num_threads(1)
    try:
        status = main(["train", *words])
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


class Training:
    """``osum-npu train`` on several ranks of this machine, or on one that no launcher has started."""

    def __init__(self, recipe, *changes, processes=1, per_node=None):
        """Start; ``per_node`` ranks count as those of one node."""
        self.logs = [recipe.with_name(f"{recipe.stem}_{processes}_{rank}.log") for rank in range(processes)]
        words, port = [str(word) for word in (recipe, *changes)], launching.free_port()
        self.processes = []
        for rank, log in enumerate(self.logs):
            variables = {"OSUM_BACKEND": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            if processes > 1:
                local = rank % (per_node or processes)
                names = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": processes, "MASTER_PORT": port}
                variables |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
            self.processes.append(CONTEXT.Process(target=_train, args=(variables, words, log)))
        for process in self.processes:
            process.start()

    def alive(self):
        return any(process.is_alive() for process in self.processes)

    def end(self, timeout=120):
        """Wait; return the statuses, and the output of all ranks."""
        for process in self.processes:
            process.join(timeout)
        stuck = [process for process in self.processes if process.is_alive()]
        if stuck:
            self.kill()
        output = "\n".join(log.read_text("utf-8") for log in self.logs if log.exists())
        assert not stuck, f"ranks hang:\n{output}"
        return [process.exitcode for process in self.processes], output

    def kill(self):
        """Kill all ranks at once, with their loaders' workers, which may wait for ever for one who reads."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def train(recipe, *changes, **settings):
    """Train to the end; return the output."""
    statuses, output = Training(recipe, *changes, **settings).end()
    assert not any(statuses), output
    return output
