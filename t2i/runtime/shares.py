"""Which of several processes does what, without a word between them: all that drawing from a list of prompts needs."""

import os
from typing import NamedTuple

from t2i.errors import InputError


class Share(NamedTuple):
    """Of the work of so many `processes`, that of the one with this number; `local` is its number on its machine, where
    there are `on_machine` of them."""

    number: int = 0
    processes: int = 1
    local: int = 0
    on_machine: int = 1

    def device(self, name: str) -> str:
        """Of a device that is "auto" or "cuda", this process's own, where there are several."""
        import torch

        gpus = torch.cuda.device_count()
        return f"cuda:{self.local % gpus}" if self.processes > 1 and name in ("auto", "cuda") and gpus else name


ALONE = Share()


def this_share() -> Share:
    """As `accelerate launch` and torchrun say it to each process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    defaults = (0, 1, 0, os.environ.get("WORLD_SIZE", 1))  # a launcher that does not say has one machine
    try:
        share = Share(*(int(os.environ.get(name, default)) for name, default in zip(names, defaults)))
    except ValueError as error:
        raise InputError(f"{', '.join(names)} must be integers, as a launcher sets them ({error})") from error
    if not 0 <= share.number < share.processes:
        raise InputError(f"RANK must be from 0 to WORLD_SIZE - 1 = {share.processes - 1}, got {share.number}")
    if not 1 <= share.on_machine <= share.processes:
        raise InputError(f"LOCAL_WORLD_SIZE must be from 1 to WORLD_SIZE = {share.processes}, got {share.on_machine}")
    return share
