"""Which of several processes does what, without a word between them: all that drawing from a list of prompts needs."""

import os
from typing import NamedTuple

from t2i.errors import InputError


class Rank(NamedTuple):
    """Rank and world size of this process; `local_rank` is its number on its machine, where
    there are `local_world_size` of them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def device(self, name: str) -> str:
        """Of a device that is "auto" or "cuda", this process's own, where there are several."""
        import torch

        gpus = torch.cuda.device_count()
        return f"cuda:{self.local_rank % gpus}" if self.world_size > 1 and name in ("auto", "cuda") and gpus else name


SINGLE_PROCESS = Rank()


def find_process_rank() -> Rank:
    """As `accelerate launch` and torchrun say it to each process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    defaults = (0, 1, 0, os.environ.get("WORLD_SIZE", 1))  # a launcher that does not say has one machine
    try:
        share = Rank(*(int(os.environ.get(name, default)) for name, default in zip(names, defaults)))
    except ValueError as error:
        raise InputError(f"{', '.join(names)} must be integers, as a launcher sets them ({error})") from error
    if not 0 <= share.rank < share.world_size:
        raise InputError(f"RANK must be from 0 to WORLD_SIZE - 1 = {share.world_size - 1}, got {share.rank}")
    if not 1 <= share.local_world_size <= share.world_size:
        raise InputError(
            f"LOCAL_WORLD_SIZE must be from 1 to WORLD_SIZE = {share.world_size}, got {share.local_world_size}"
        )
    return share
