"""The rank of this process among those that a launcher started, from its environment alone."""

import logging
import os
from typing import NamedTuple

from t2i.errors import InputError

logger = logging.getLogger(__name__)

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# One of these is set by torchrun and `accelerate launch`, its launcher in notebooks, Slurm, Open MPI, MPICH, Intel MPI.
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "FORK_LAUNCHED", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Rank(NamedTuple):
    """Rank and world size of this process, over all machines and on its own machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def choose_device(self, name: str) -> str:
        """Return the name of a device; "auto" and "cuda" become a GPU of this process's own if there are several."""
        import torch

        gpus = torch.cuda.device_count()
        return f"cuda:{self.local_rank % gpus}" if self.world_size > 1 and name in ("auto", "cuda") and gpus else name


SINGLE_PROCESS = Rank()


def ignore_leftover_ranks() -> None:
    """Remove RANK, WORLD_SIZE and the like from the environment, with a warning, unless both of these are set.

    A launcher sets both. Any of them alone is left over, and would make a command wait for others or do a part alone.
    """
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return
    found = {name: os.environ.pop(name) for name in RANK_VARIABLES if name in os.environ}
    if any(value != ("1" if name.endswith("SIZE") else "0") for name, value in found.items()):
        named = " ".join(f"{name}={value}" for name, value in found.items())
        logger.warning("%s is ignored: a launcher of several processes sets RANK and WORLD_SIZE, both", named)


def warn_of_unknown_launcher() -> None:
    """Log a warning if this is one of several processes by RANK and WORLD_SIZE alone, without a known launcher."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and not any(name in os.environ for name in LAUNCHER_VARIABLES):
        message = "this is process %s of %s, by RANK and WORLD_SIZE; unset them if no launcher started it"
        logger.warning(message, os.environ.get("RANK"), count)


def find_process_rank() -> Rank:
    """Return the rank that torchrun or `accelerate launch` gave to this process. Raises InputError if it is invalid."""
    ignore_leftover_ranks()
    defaults = (0, 1, 0, os.environ.get("WORLD_SIZE", 1))  # without LOCAL_WORLD_SIZE there is one machine
    try:
        rank = Rank(*(int(os.environ.get(name, default)) for name, default in zip(RANK_VARIABLES, defaults)))
    except ValueError as error:
        raise InputError(f"{', '.join(RANK_VARIABLES)} must be integers, as a launcher sets them ({error})") from error
    world = rank.world_size
    if not 0 <= rank.rank < world:
        raise InputError(f"RANK must be from 0 to WORLD_SIZE - 1 = {world - 1}, got {rank.rank}")
    if not 1 <= rank.local_world_size <= world:
        raise InputError(f"LOCAL_WORLD_SIZE must be from 1 to WORLD_SIZE = {world}, got {rank.local_world_size}")
    warn_of_unknown_launcher()
    return rank
