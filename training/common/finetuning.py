"""Training from a trained model (`init`) instead of random weights."""

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, ModelMixin, SchedulerMixin

from t2i.diffusion.flow import FLOW_PREDICTION, get_flow_shift, get_prediction_type, is_flow
from t2i.diffusion.process import build_noise_scheduler
from t2i.diffusion.stored_schedulers import PROJECT_SCHEDULERS, check_scheduler_folder
from t2i.errors import InputError
from t2i.files.model_folder import load_or_explain
from t2i.files.untrusted import MAX_TIMESTEPS, read_config
from t2i.terminal import print_note

Model = TypeVar("Model", bound=ModelMixin)


def prepare_init_model(model: Model, init: str, settings: dict[str, Any], **needed: Any) -> Model:
    """Return a loaded model in fp32, to be trained further.

    Args:
        init: its name in the configuration, for messages.
        settings: the architecture in the configuration; left out, that of the model.
        needed: arguments of the model that follow from the data and the frozen models.

    Raises InputError if the model was made with other arguments. Another CLIP may take the place of its own, with
    embeddings of the same size: the model learns them in training, and stores the new fingerprint.
    """
    stored, current = model.config.get("clip_fingerprint"), needed.pop("clip_fingerprint", None)
    check_same_setting("", {**settings, **needed}, model.config, init)
    # A public model does not store its CLIP, so there is nothing to compare with
    if stored not in (None, current):
        note = f"init={init!r} was trained with another CLIP, whose embeddings may differ: it learns those of this one"
        print_note(note, is_shown=PartialState().is_local_main_process)
        model.register_to_config(clip_fingerprint=current)
    return model.float()


def check_same_setting(name: str, value: Any, stored: Any, init: str) -> None:
    """Refuse a value that differs from the one stored with `init`; of a mapping, compare each key in `value`."""
    if isinstance(value, dict) and isinstance(stored, dict):
        for key, item in value.items():
            check_same_setting(f"{name}.{key}".lstrip("."), item, stored.get(key), init)
    elif convert_tuple(value) != convert_tuple(stored):
        raise InputError(f"init={init!r} was trained with {name} {stored!r}, this run has {value!r}; they must agree")


def resolve_init_scheduler(init: str | None, settings: dict[str, Any], public: Path | None = None) -> SchedulerMixin:
    """Return the noise schedule: the configuration's `settings` on top of that of `init`, where it has one.

    public: the folder of a public model's scheduler, whose noise levels the settings must not change.
    Raises InputError for a schedule that cannot be trained with, or that `init` was not trained with.
    """
    folder = find_init_scheduler(init) if public is None else public
    if folder is None:
        return build_noise_scheduler(settings)
    stored = read_schedule(folder)
    before = build_noise_scheduler(stored)
    kind = get_prediction_type(before)
    check_same_setting("scheduler.prediction_type", settings.get("prediction_type", kind), kind, str(init))
    scheduler = build_noise_scheduler({**stored, **settings})
    if is_flow(before):  # all flows have the same noise levels
        return scheduler
    # Settings may repeat a public model's noise levels, but not change them
    levels, stored_levels = scheduler.alphas_cumprod, before.alphas_cumprod
    same = levels.shape == stored_levels.shape and torch.allclose(levels, stored_levels, rtol=1e-3, atol=1e-8)
    if public is not None and not same:
        keys = ", ".join(f"scheduler.{key}={value!r}" for key, value in settings.items())
        raise InputError(f"init={init!r} was trained with other noise than {keys} makes; leave the scheduler out")
    return scheduler


def read_schedule(folder: Path) -> dict[str, Any]:
    """Return the arguments of `build_noise_scheduler` for the noise levels of the scheduler in a folder.

    Its prediction type and bounds of x0 are taken too. Timesteps start at the last one, which is pure noise.
    """
    config = read_config(folder / "scheduler_config.json", MAX_TIMESTEPS)
    name = config.get("_class_name", "DDIMScheduler")
    module = next((module for module, names in PROJECT_SCHEDULERS.items() if name in names), "diffusers")
    check_scheduler_folder(folder, name, module=module)
    scheduler = load_or_explain(getattr(import_module(module), name).from_pretrained, folder)
    if is_flow(scheduler):
        steps, shift = scheduler.config.num_train_timesteps, get_flow_shift(scheduler)
        return {"prediction_type": FLOW_PREDICTION, "num_train_timesteps": steps, "shift": shift}
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"{str(folder)!r} holds a {name}, which has no noise schedule as DDPM has")
    names = signature(DDIMScheduler.__init__).parameters
    arguments = {key: scheduler.config[key] for key in names if key in scheduler.config}
    if "beta_schedule" not in arguments:  # UnCLIPScheduler has only one schedule, and no name for it
        arguments["beta_schedule"] = "squaredcos_cap_v2"
    # Other schedulers clip only where they say so; DDIM's default would clip
    if not isinstance(scheduler, DDIMScheduler):
        arguments = {"clip_sample": False} | arguments | {"timestep_spacing": "trailing"}
    return arguments


def find_init_scheduler(init: str | None) -> Path | None:
    """Find the scheduler's folder of a run, of the model in a run, or of a part of a pipeline.

    Returns None without `init`, or with a message if it has no scheduler.
    """
    if init is None:
        return None
    folder = Path(init)
    places = (folder / "scheduler", folder.parent / "scheduler", folder.parent / f"{folder.name}_scheduler")
    for place in places:
        if (place / "scheduler_config.json").is_file():
            return place
    print_note(
        f"init={init!r} stores no prediction type; scheduler.prediction_type must be the one it was trained with"
    )
    return None


def check_prediction_type(init: str | None, scheduler: SchedulerMixin) -> None:
    """Refuse a prediction type that differs from the one stored with `init`, where it has one."""
    folder = find_init_scheduler(init)
    if folder is not None:
        stored = read_schedule(folder).get("prediction_type", "epsilon")
        check_same_setting("scheduler.prediction_type", get_prediction_type(scheduler), stored, str(init))


def convert_tuple(value: Any) -> Any:
    """Return a tuple as a list, since JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value
