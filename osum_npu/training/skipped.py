"""What a run could not use, named in ``out/skipped.txt``, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from osum_npu.files import write_text
from osum_npu.training.ranks import Ranks

_SAID = 5
"""How many of them are named on the terminal."""


class Skipped:
    """Names what a rank has left out."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        """Know of nothing yet.

        Args:
            path: of the file; the rank that leads writes it.
            ranks: of the run.
        """
        self.path, self.ranks = path, ranks
        self.lines: list[str] = []

    def add(self, lines: Iterable[str]) -> None:
        """Take more."""
        self.lines += lines

    def recall(self) -> None:
        """Read what this run left out before it was interrupted."""
        if self.path.exists():
            self.lines = [*self.path.read_text("utf-8").splitlines(), *self.lines]

    def gather(self) -> None:
        """Bring together what all ranks have left out; all of them call this."""
        self.lines = self.ranks.gather(self.lines)

    def write(self) -> list[str]:
        """Write the file, if there is anything to name; return all of it."""
        lines = list(dict.fromkeys(self.lines))
        if lines and self.ranks.leads:
            write_text(self.path, "\n".join(lines) + "\n")
        return lines

    def report(self, say: Callable[[str], None]) -> None:
        """Write the file, and say the first few."""
        if lines := self.write():
            for line in lines[:_SAID]:
                say(f"skipped: {line}")
            say(f"{len(lines)} skipped in all; {self.path} names each")
