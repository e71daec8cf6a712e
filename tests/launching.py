"""Starting the scripts of ``scripts/`` as people do, on loopback, and finding what they leave behind."""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[1]
EMULATOR = Path(__file__).with_name("msrun_emulator.py")
MARK = "LAUNCH_UNDER_TEST"
"""Variable by which the processes of one launch are found."""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def with_msrun(folder, real=None):
    """Put an ``msrun`` into a folder for PATH: the emulated one, or a link to a real one."""
    if real:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "msrun").symlink_to(real)
    else:
        executable(folder / "msrun", f'#!/bin/sh\nexec "{sys.executable}" "{EMULATOR}" "$@"\n')
    return folder


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _hear_signals():
    """Undo nohup and a shell's ``&``, under which tests may run: what is ignored at the beginning cannot be trapped."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class Launch:
    """One node's script, running."""

    def __init__(self, script, *words, cwd, path=(), env=None):
        """Start ``scripts/<script>`` with the folders ``path`` before the interpreter's own in PATH."""
        folders = [*map(str, path), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.mark = f"{MARK}={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        variables = {
            **os.environ,
            "PATH": os.pathsep.join(folders),
            "OMP_NUM_THREADS": "1",
            "OSUM_BACKEND": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            name: value,
            **(env or {}),
        }
        self.process = subprocess.Popen(
            [shutil.which("bash"), ROOT / "scripts" / script, *map(str, words)],
            env=variables,
            cwd=cwd,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_hear_signals,
        )

    def end(self, timeout=300):
        """Wait; return status and output."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            for pid in self.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            raise
        return self.process.returncode, output

    def left(self, *also):
        """List the processes of this launch that still run and have all of ``also``, as ``NAME=value``."""
        wanted, found = {self.mark, *also}, []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if wanted.issubset(variables):
                found.append(int(path.parent.name))
        return found

    def rank(self, number):
        """Return the process of a rank: that which leads a process group, for what it starts does not."""
        for name in ("RANK", "RANK_ID"):
            for pid in self.left(f"{name}={number}"):
                if os.getpgid(pid) == pid:
                    return pid
        return None
