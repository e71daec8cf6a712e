"""Which process of how many this one is: the launcher's variables as one value.

Nothing else in the project reads them. torchrun's are those of ``torch.distributed``; msrun, a launcher of MindSpore's
wheel, has its own and knows nothing of torch: :func:`prepare` gives torch its names. What msrun sets is that of
MindSpore 2.10.0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

RANK, LOCAL_RANK, WORLD_SIZE = "RANK", "LOCAL_RANK", "WORLD_SIZE"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
THREADS = "OMP_NUM_THREADS"

MSRUN_ROLE, SCHEDULER, WORKER = "MS_ROLE", "MS_SCHED", "MS_WORKER"
MSRUN_NODE_ID = "MS_NODE_ID"
MSRUN_NAMES = {
    RANK: "RANK_ID",
    LOCAL_RANK: "DEVICE_ID",
    WORLD_SIZE: "RANK_SIZE",
    MASTER_ADDR: "MS_SCHED_HOST",
    MASTER_PORT: "MS_SCHED_PORT",
}
"""What msrun calls the variables of torch. The port is free: only MindSpore itself would listen there."""


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


def is_scheduler(environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether this is the copy that msrun starts on the master node as a scheduler for MindSpore.

    It has no part in the run and must end with status 0: msrun waits for it, and another status fails the whole run.
    """
    return environ.get(MSRUN_ROLE) == SCHEDULER


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Make ready what msrun left for torch; to be called before torch is imported. Under torchrun all is ready.

    torch gets its variables. msrun's single thread a process, which would slow features down, becomes this process's
    share of the cores; another number is the user's and stays.

    Raises:
        ValueError: msrun gave this process no rank, or its variables make no sense.
    """
    if environ.get(MSRUN_ROLE) != WORKER:
        return
    world = read(environ)
    environ.update(_from_msrun(environ))
    if environ.get(THREADS) == "1":
        environ[THREADS] = str(max(1, _cores() // world.world_size))


def read(environ: Mapping[str, str] = os.environ) -> World:
    """Read the world of this process from torchrun's or msrun's variables; without any, it is alone.

    Raises:
        ValueError: the variables contradict each other, or some are missing.
    """
    if environ.get(MSRUN_ROLE) == WORKER:
        environ = _from_msrun(environ)
    ranks = {name: environ[name] for name in (RANK, LOCAL_RANK, WORLD_SIZE) if name in environ}
    if not ranks:
        return World()
    if len(ranks) < 3:
        missing = [name for name in (RANK, LOCAL_RANK, WORLD_SIZE) if name not in ranks]
        raise ValueError(
            f"the launcher's variables are incomplete: {', '.join(missing)} missing beside {_words(ranks)}; "
            f"start with torchrun or msrun, or unset {', '.join(ranks)} for a process on its own"
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


def _from_msrun(environ: Mapping[str, str]) -> dict[str, str]:
    """Return torch's variables for a worker of msrun."""
    if MSRUN_NODE_ID not in environ:  # RANK_ID may be there nonetheless: the scheduler's, left over on the master
        raise ValueError("msrun gave this process no rank: with several nodes, pass --node_rank to msrun on every node")
    missing = [name for name in MSRUN_NAMES.values() if name not in environ]
    if missing:
        raise ValueError(
            f"msrun's variables are incomplete: {', '.join(missing)} missing beside {MSRUN_ROLE}={WORKER}; "
            f"start with msrun, or unset {MSRUN_ROLE}"
        )
    return {name: environ[theirs] for name, theirs in MSRUN_NAMES.items()}


def _cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _words(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={text}" for name, text in variables.items())


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is no integer") from None
