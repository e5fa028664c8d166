"""Schedulers stored beside the models that were trained with them."""

from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDIMScheduler, SchedulerMixin

from t2i.errors import InputError
from t2i.files.model_folder import load_or_explain
from t2i.files.untrusted import MAX_TIMESTEPS, check_folder_files, is_folder, read_config

# By module, as strings: a check does not import them.
PROJECT_SCHEDULERS = {
    "t2i.diffusion.ddim": ("ExactDDIMScheduler",),
    "t2i.diffusion.continuous": ("ProbabilityFlowScheduler", "ReverseSDEScheduler"),
    "t2i.diffusion.respaced": ("UnCLIPRespacedScheduler",),
}


def load_scheduler(folder: Path, root: Path | None = None) -> SchedulerMixin:
    """Load a scheduler of the class that its file names, of diffusers or of this project.

    root: folder of the pipeline, which links may lead into. Raises InputError for any other class or an incomplete
    folder.
    """
    if not is_folder(folder):
        raise InputError(f"there is no folder {str(folder)!r}, with the scheduler that the model was trained with")
    # A file without a class is of DDIM, by which models are trained here
    name = read_scheduler_config(folder, root).get("_class_name", DDIMScheduler.__name__)
    module = next((module for module, names in PROJECT_SCHEDULERS.items() if name in names), "diffusers")
    check_scheduler_class(folder, name, module)
    return load_or_explain(getattr(import_module(module), name).from_pretrained, folder)


def check_scheduler_folder(
    folder: Path, name: Any = "DDIMScheduler", root: Path | None = None, module: str = "diffusers"
) -> None:
    """Refuse a folder without a scheduler of diffusers or this project. name, module: of its class."""
    check_scheduler_class(folder, name, module)
    read_scheduler_config(folder, root)


def check_scheduler_class(folder: Path, name: Any, module: str) -> None:
    """Refuse a class that is no scheduler of `module`."""
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    of_diffusers = module == "diffusers" and isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not of_diffusers and name not in PROJECT_SCHEDULERS.get(module, ()):
        raise InputError(f"{str(folder)!r} must contain a scheduler of diffusers or of this project, got {name!r:.80}")


def read_scheduler_config(folder: Path, root: Path | None = None) -> dict[str, Any]:
    """Return a scheduler's configuration. Raises InputError for code, links out of `root`, and too many timesteps."""
    check_folder_files(folder, root)
    return read_config(folder / "scheduler_config.json", MAX_TIMESTEPS)
