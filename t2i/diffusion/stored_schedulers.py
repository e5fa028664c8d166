"""Stored_schedulers."""

from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDIMScheduler, SchedulerMixin

from t2i.errors import InputError
from t2i.files.model_folder import load_or_explain
from t2i.files.untrusted import MAX_TIMESTEPS, check_folder_files, read_config


def load_scheduler(folder: Path, root: Path | None = None) -> SchedulerMixin:
    """The scheduler that a prior or a decoder was trained with: of the class that its file names, of diffusers or ours.

    root: of the pipeline, which links may lead into.
    """
    name = read_scheduler_config(folder, root).get("_class_name", DDIMScheduler.__name__)
    home = next((home for home, names in PROJECT_SCHEDULERS.items() if name in names), "diffusers")
    check_scheduler_class(folder, name, home)
    return load_or_explain(getattr(import_module(home), name).from_pretrained, folder)


PROJECT_SCHEDULERS = {  # this project's own, by module
    "t2i.diffusion.ddim": ("ExactDDIMScheduler",),
    "t2i.diffusion.continuous": ("ProbabilityFlowScheduler", "ReverseSDEScheduler"),
    "t2i.diffusion.respaced": ("UnCLIPRespacedScheduler",),
}


def check_scheduler_folder(
    folder: Path, name: Any = "DDIMScheduler", root: Path | None = None, home: str = "diffusers"
) -> None:
    """Refuse what is not the folder of a scheduler of diffusers or of ours, or has more timesteps than any."""
    check_scheduler_class(folder, name, home)
    read_scheduler_config(folder, root)


def check_scheduler_class(folder: Path, name: Any, home: str) -> None:
    """Raise InputError for a class that is no scheduler of the module `home`."""
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    theirs = home == "diffusers" and isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)
    if not theirs and name not in PROJECT_SCHEDULERS.get(home, ()):
        raise InputError(f"{str(folder)!r} should hold a scheduler of diffusers or of ours, got {name!r:.80}")


def read_scheduler_config(folder: Path, root: Path | None = None) -> dict[str, Any]:
    """Return a scheduler's configuration. Raises InputError for code, links out of `root`, and too many timesteps."""
    check_folder_files(folder, root)
    return read_config(folder / "scheduler_config.json", MAX_TIMESTEPS)
