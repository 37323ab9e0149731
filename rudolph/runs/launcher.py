"""The rank of this process among those that train one run together, from the environment.

torchrun, Slurm's ``srun`` and Lightning start processes and set environment variables that give
each process its rank.  Slurm also starts processes that each execute a run of their own, so
Slurm's ranks count only if a run has several devices.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Launch:
    """How this process was started, and its rank.

    Attributes:
        launcher: what started the process; ``none`` for a process on its own.
        is_first: whether this is the first of all processes.
        local_rank: rank among the processes of this machine.
        world_size: number of all processes; 0 if the launcher does not set it.
        local_world_size: number of processes on each machine; 0 if the launcher does not set it.
    """

    launcher: Literal["none", "torchrun", "slurm", "lightning"] = "none"
    is_first: bool = True
    local_rank: int = 0
    world_size: int = 0
    local_world_size: int = 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return how a process with these environment variables was started.

    Raises:
        ValueError: if a variable of the launcher is missing or no number.
    """

    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name, "" if default is None else str(default))
        if not text.isdecimal():
            raise ValueError(f"{name}: expected a number from the launcher, got {text!r}")
        return int(text)

    if "TORCHELASTIC_RUN_ID" in environment:
        names = "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
        return Launch("torchrun", number("RANK") == 0, *map(number, names))
    # Like Lightning, treat a shell in an allocation as a process on its own.
    is_shell = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment and not is_shell:
        sizes = number("SLURM_NTASKS"), number("SLURM_NTASKS_PER_NODE", 0)
        return Launch("slurm", number("SLURM_PROCID") == 0, number("SLURM_LOCALID", 0), *sizes)
    if "LOCAL_RANK" in environment or "NODE_RANK" in environment:
        # The user starts one process per machine; Lightning starts the others, one per device.
        local_rank, node = number("LOCAL_RANK", 0), number("NODE_RANK", 0)
        return Launch("lightning", local_rank == node == 0, local_rank)
    return Launch()
