"""Which process of how many this one is: the launcher's variables as one value.

Nothing else in the project reads them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

RANK, LOCAL_RANK, WORLD_SIZE = "RANK", "LOCAL_RANK", "WORLD_SIZE"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of one run. The default is a process on its own."""

    rank: int = 0
    """Number of this process among all, from 0."""
    local_rank: int = 0
    """Number of this process among those of its machine, from 0."""
    world_size: int = 1
    """Processes of the run."""
    master_addr: str = "127.0.0.1"
    """Host where rank 0 listens."""
    master_port: int = 29500
    """Port where rank 0 listens."""


def read(environ: Mapping[str, str] = os.environ) -> World:
    """Read the world of this process from torchrun's variables; without any, it is alone.

    Raises:
        ValueError: the variables contradict each other, or some are missing.
    """
    ranks = {name: environ[name] for name in (RANK, LOCAL_RANK, WORLD_SIZE) if name in environ}
    if not ranks:
        return World()
    if len(ranks) < 3:
        missing = [name for name in (RANK, LOCAL_RANK, WORLD_SIZE) if name not in ranks]
        raise ValueError(
            f"the launcher's variables are incomplete: {', '.join(missing)} missing beside {_words(ranks)}; "
            f"start with torchrun, or unset {', '.join(ranks)} for a process on its own"
        )
    rank, local_rank, world_size = (_integer(name, text) for name, text in ranks.items())
    if not (0 <= local_rank <= rank < world_size):
        raise ValueError(
            f"the launcher's variables contradict each other: {_words(ranks)}; "
            f"wanted 0 <= {LOCAL_RANK} <= {RANK} < {WORLD_SIZE}"
        )
    if world_size == 1:
        return World()
    where = {name: environ[name] for name in (MASTER_ADDR, MASTER_PORT) if environ.get(name)}
    if len(where) < 2:
        raise ValueError(f"{WORLD_SIZE}={world_size} needs {MASTER_ADDR} and {MASTER_PORT}: where rank 0 listens")
    port = _integer(MASTER_PORT, where[MASTER_PORT])
    if not 0 < port < 65536:
        raise ValueError(f"{MASTER_PORT}={port} is no port; wanted 1 to 65535")
    return World(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        master_addr=where[MASTER_ADDR],
        master_port=port,
    )


def _words(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={text}" for name, text in variables.items())


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is no integer") from None
