"""How long the command line takes to start: medians over fresh processes.

    python benchmarks/startup.py [--runs 15]

The project's limits on a desktop: importing osum_npu 0.2 s, ``osum-npu --help`` 0.5 s. The bare interpreter is printed
beside them, for it is part of both.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from statistics import median

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import osum_npu": ["-c", "import osum_npu"],
    "osum-npu --help": ["-m", "osum_npu", "--help"],
    "osum-npu train --help": ["-m", "osum_npu", "train", "--help"],
}


def main() -> None:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(description="Measure how long the command line takes to start.")
    parser.add_argument("--runs", type=int, default=15, help="processes for each command (default: %(default)s)")
    runs = parser.parse_args().runs
    print(f"Python {platform.python_version()}, {platform.machine()}, median of {runs} runs")
    for name, words in COMMANDS.items():
        print(f"{name:<24} {median(seconds(words) for _ in range(runs)):.3f} s")


def seconds(words: list[str]) -> float:
    """Return how long one process takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
