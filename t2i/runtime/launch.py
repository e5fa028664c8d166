"""Start of a command in several processes on this machine."""

import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn, TypeVar

import psutil

from t2i.runtime.rank import ignore_leftover_ranks, warn_of_unknown_launcher

logger = logging.getLogger(__name__)

OFF_VALUES = ("", "0", "no", "false", "none")  # of accelerate's variables
UNUSED_VARIABLES = ("ACCELERATE_MIXED_PRECISION",)  # train.mixed_precision decides
Config = TypeVar("Config")


def end_process_group() -> None:
    """End this process at once if it is one of several.

    The group's threads may outlive what they use, and abort a process whose interpreter shuts down in the normal way.
    """
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def count_forgotten_processes() -> int:
    """Return N of the parent `accelerate launch --cpu --num_processes N`, which starts one process only; else 1."""
    ignore_leftover_ranks()
    if "RANK" in os.environ:
        return 1
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:
        return 1
    # accelerate (1.15) starts one process for these two options, and sets no variable of the environment to N.
    if "--cpu" not in command or not any(part.endswith(("launch", "launch.py")) for part in command):
        return 1
    # Both `--num_processes N` and `--num-processes=N` are allowed
    for option, following in zip(command, [*command[1:], ""]):
        name, _, value = option.replace("-", "_").partition("=")
        if name == "__num_processes" and (value or following).isdigit():
            return int(value or following)
    return 1


def check_environment() -> None:
    """Make sure that the environment decides nothing silently: call it before accelerate reads it."""
    ignore_leftover_ranks()
    warn_of_unknown_launcher()
    warn_of_accelerate_variables()


def warn_of_accelerate_variables() -> None:
    """Log a warning with accelerate's variables of the environment that decide, if no `accelerate launch` set them."""
    named = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    for name in [name for name, value in named.items() if value.lower() in OFF_VALUES or name in UNUSED_VARIABLES]:
        del named[name]
    if named and os.environ.get("RANK", "0") == "0" and not has_accelerate_ancestor():
        found = " ".join(f"{name}={value}" for name, value in sorted(named.items()))
        logger.warning(
            "%s is set in the environment, not by `accelerate launch`, and overrides accelerate's defaults", found
        )


def has_accelerate_ancestor() -> bool:
    """Return True if `accelerate launch` started this process, or one that started it."""
    with suppress(psutil.Error):
        for parent in psutil.Process().parents():
            with suppress(psutil.Error):
                if any("accelerate" in part for part in parent.cmdline()[:4]):
                    return True
    return False


def exec_torchrun(script: list[str], processes: int, restarts: int = 0) -> NoReturn:
    """Replace this process by torchrun, which runs a script with its arguments in several processes."""
    os.execv(sys.executable, build_torchrun_command(script, processes, restarts))


def build_torchrun_command(script: list[str], processes: int, restarts: int = 0) -> list[str]:
    """Return the command that runs a script with its arguments in several processes on this machine.

    restarts: number of times that the group is started again after one of its processes died.
    """
    # Without it a restarted group may read old addresses from the store of the group before.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *script]
