"""Training that starts from a trained model instead of random weights."""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DDIMScheduler, ModelMixin, SchedulerMixin

from t2i.diffusion.process import build_noise_scheduler
from t2i.diffusion.stored_schedulers import PROJECT_SCHEDULERS, check_scheduler_folder
from t2i.errors import InputError
from t2i.files.model_folder import load_or_explain
from t2i.files.untrusted import MAX_TIMESTEPS, read_config

Model = TypeVar("Model", bound=ModelMixin)


def load_init_model(load: Callable[[str], Model], init: str, stated: dict[str, Any], **needed: Any) -> Model:
    """The model that `init` names, in fp32, to be trained further.

    Args:
        load: what loads it, such as `t2i.interop.by_name.load_clip`; of a model that does not say which CLIP it was
        trained with,
            a public one, that is not compared.
        init: a folder that a training script wrote, or another name that `load` knows.
        stated: what the configuration says of its architecture; empty, or the same as the model's own.
        needed: arguments of the model that the data and the frozen models decide.

    Raises InputError, in one line, if the model does not load or was made with other arguments.
    """
    model = load(init)
    if model.config.get("clip_fingerprint", "") is None:
        needed.pop("clip_fingerprint", None)
    check_same_setting("", {**stated, **needed}, model.config, init)
    return model.float()


def check_same_setting(name: str, ours: Any, theirs: Any, init: str) -> None:
    """Refuse a value that is not the model's; of mappings, each that we give."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            check_same_setting(f"{name}.{key}".lstrip("."), value, theirs.get(key), init)
    elif convert_tuple(ours) != convert_tuple(theirs):
        raise InputError(f"init={init!r} was trained with {name} {theirs!r}, this run has {ours!r}; they must agree")


def resolve_init_scheduler(init: str | None, stated: dict[str, Any], public: Path | None = None) -> DDIMScheduler:
    """The schedule of the noise: what the configuration says, and else that of `init`, if it says one.

    public: the folder of the scheduler that a public `init` comes with, whose schedule can only be repeated.
    Raises InputError for a schedule that cannot be trained with, or that `init` was not trained with.
    """
    folder = public or (None if init is None else find_scheduler_folder(init))
    if init is None or folder is None:
        if init is not None:
            print(f"init={init!r} does not say what it learned to predict; scheduler.prediction_type has to be that")
        return build_noise_scheduler(stated)
    theirs = read_schedule(folder)
    scheduler, before = build_noise_scheduler({**theirs, **stated}), build_noise_scheduler(theirs)
    kind = "scheduler.prediction_type"
    check_same_setting(kind, scheduler.config.prediction_type, before.config.prediction_type, init)
    if public is not None and not has_same_noise_levels(scheduler, before):
        keys = ", ".join(f"scheduler.{key}={value!r}" for key, value in stated.items())
        raise InputError(f"init={init!r} was trained with other noise than {keys} makes; leave the scheduler out")
    return scheduler


def has_same_noise_levels(one: SchedulerMixin, other: SchedulerMixin) -> bool:
    ours, theirs = one.alphas_cumprod, other.alphas_cumprod
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-8)


def read_schedule(folder: Path) -> dict[str, Any]:
    """The arguments of a DDIMScheduler with the noise schedule and prediction type of the scheduler in a folder.

    It bounds clean samples as that one does, and starts at the last timestep, where all is noise.
    """
    config = read_config(folder / "scheduler_config.json", MAX_TIMESTEPS)
    name = config.get("_class_name", "DDIMScheduler")
    home = next((module for module, names in PROJECT_SCHEDULERS.items() if name in names), "diffusers")
    check_scheduler_folder(folder, name, home=home)
    theirs = load_or_explain(getattr(import_module(home), name).from_pretrained, folder)
    if not hasattr(theirs, "alphas_cumprod"):
        raise InputError(f"{str(folder)!r} holds a {name}, which has no noise schedule as DDPM has")
    known = signature(DDIMScheduler.__init__).parameters
    arguments = {key: theirs.config[key] for key in known if key in theirs.config}
    if "beta_schedule" not in arguments:  # UnCLIPScheduler has but one
        arguments["beta_schedule"] = "squaredcos_cap_v2"
    if not isinstance(theirs, DDIMScheduler):
        arguments = {"clip_sample": False} | arguments | {"timestep_spacing": "trailing"}
    return arguments


def find_scheduler_folder(init: str) -> Path | None:
    """The scheduler of a run, of the model in a run, or of a part of a pipeline; None if it says none."""
    folder = Path(init)
    places = (folder / "scheduler", folder.parent / "scheduler", folder.parent / f"{folder.name}_scheduler")
    return next((place for place in places if (place / "scheduler_config.json").is_file()), None)


def check_prediction_type(init: str | None, scheduler: SchedulerMixin) -> None:
    """Refuse to let a model that learned to predict one thing predict another, if its run says what it learned."""
    if init is None:
        return
    folder = find_scheduler_folder(init)
    if folder is None:
        print(f"init={init!r} does not say what it learned to predict; scheduler.prediction_type has to be that")
        return
    theirs = read_schedule(folder).get("prediction_type", "epsilon")
    check_same_setting("scheduler.prediction_type", scheduler.config.prediction_type, theirs, init)


def convert_tuple(value: Any) -> Any:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value
