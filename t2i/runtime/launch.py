"""How a training script starts: on as many processes as were asked for, with errors in one line."""

import os
import sys
from typing import NoReturn, TypeVar

import psutil

Config = TypeVar("Config")


def end_process_group() -> None:
    """After a run of several processes: end this one at once.

    The group's threads may outlive what they use, and abort a process that takes its interpreter apart under them.
    """
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def count_forgotten_processes() -> int:
    """The N of `accelerate launch --cpu --num_processes N`, of which accelerate (1.15) starts only one; else 1."""
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:
        return 1
    launched = any(part.endswith(("launch", "launch.py")) for part in command)
    if "RANK" in os.environ or not launched or "--cpu" not in command:
        return 1
    for option, value in zip(command, [*command[1:], ""]):
        name, _, joined = option.replace("-", "_").partition("=")
        if name == "__num_processes" and (joined or value).isdigit():
            return int(joined or value)
    return 1


def exec_torchrun(script: list[str], processes: int, restarts: int = 0) -> NoReturn:
    """Become torchrun with a script, its arguments, and a number of processes on this machine."""
    os.execv(sys.executable, build_torchrun_command(script, processes, restarts))


def build_torchrun_command(script: list[str], processes: int, restarts: int = 0) -> list[str]:
    """The command that starts a script with its arguments in a number of processes on this machine."""
    # Else a restarted group may read stale addresses from the store that it shares with the one before.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *script]
