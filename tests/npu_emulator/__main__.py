"""Start programs on the emulated device, or dump the schemas of the wheel.

python tests/npu_emulator run [--devices N] -- COMMAND ARGS…
python tests/npu_emulator schemas [FILE]

With the Python of an environment that has torch and torch_npu; COMMAND is looked up there first.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # started as a folder, which is then first on the path
    sys.path[0] = str(HERE.parent)

from npu_emulator import build  # noqa: E402


def environment(devices: int) -> dict[str, str]:
    """Return what a process needs to see emulated devices."""
    libraries = build.ready()
    own = {
        "NPU_EMULATOR": str(libraries),
        "NPU_EMULATOR_DEVICES": str(devices),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # import torch_npu where it is wanted, as on any machine
        "TORCH_NPU_WARNING_DISABLE": "1",
        "TASK_QUEUE_ENABLE": "0",  # a queued copy would come after what the emulator computes at once
    }
    first = {"LD_LIBRARY_PATH": libraries, "PYTHONPATH": HERE / "startup", "PATH": Path(sys.executable).parent}
    for name, path in first.items():
        own[name] = os.pathsep.join(filter(None, (str(path), os.environ.get(name))))
    return {**os.environ, **own}


def main() -> None:
    """Read the command line and become the program that it names."""
    parser = argparse.ArgumentParser(prog="npu_emulator", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="start a program on the emulated device")
    run.add_argument("--devices", type=int, default=1, help="emulated devices (1)")
    run.add_argument("command", nargs="+", help="what to start, after --")
    dump = verbs.add_parser("schemas", help="write the schemas of the installed wheel, those that are recorded here")
    dump.add_argument("file", nargs="?", type=Path, default=HERE / "schemas.json", help="default: the record itself")
    given = parser.parse_args()
    if given.verb == "run":
        command, own = given.command, environment(given.devices)
    else:
        command, own = [sys.executable, str(HERE / "schemas.py"), str(given.file)], environment(1)
    os.execvpe(command[0], command, own)


if __name__ == "__main__":
    main()
