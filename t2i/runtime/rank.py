"""The rank of this process among those that a launcher started, from its environment alone."""

import os
from typing import NamedTuple

from t2i.errors import InputError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Rank(NamedTuple):
    """Rank and world size of this process, over all machines and on its own machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def device(self, name: str) -> str:
        """Return the name of a device; "auto" and "cuda" become a GPU of this process's own if there are several."""
        import torch

        gpus = torch.cuda.device_count()
        return f"cuda:{self.local_rank % gpus}" if self.world_size > 1 and name in ("auto", "cuda") and gpus else name


SINGLE_PROCESS = Rank()


def find_process_rank() -> Rank:
    """Return the rank that torchrun or `accelerate launch` gave to this process. Raises InputError if it is invalid."""
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
    return rank
