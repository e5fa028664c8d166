"""Save and load this project's models in folders of their own, such as a training run's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from torch.nn import Module

from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically, raise_as_oserror
from t2i.files.component import Component
from t2i.files.untrusted import check_finite_weights, format_error, is_folder, read_json

Loaded = TypeVar("Loaded")

ORIGIN = "_name_or_path"  # where a model was loaded from, as diffusers has it in configurations


class CompanionFiles:
    """Base of models with more in their folder than weights and configuration, such as a tokenizer."""

    def load_companion_files(self, folder: Path, root: Path) -> None:
        """Load what the folder has beside the weights: nothing, by default. Links may lead into `root`."""


def save_model_folder(model: Any, folder: Path, name: str = "model") -> None:
    """Save a diffusers model or scheduler as `folder/name`, complete or not at all, replacing an older one."""
    with create_folder_atomically(folder / name) as unfinished, raise_as_oserror(), hide_origins(model):
        model.save_pretrained(unfinished)


@contextmanager
def hide_origins(*parts: Any) -> Iterator[None]:
    """Take out of configurations where their parts were loaded from, so that no file has paths of this machine."""
    loaded = [part for part in parts if isinstance(part, ConfigMixin) and ORIGIN in part.config]
    origins = [part.config[ORIGIN] for part in loaded]
    for part in loaded:
        part._internal_dict = FrozenDict({name: value for name, value in part.config.items() if name != ORIGIN})
    try:
        yield
    finally:
        for part, origin in zip(loaded, origins):
            part.register_to_config(**{ORIGIN: origin})


def load_model(classes: Any, folder: str | Path) -> Any:
    """Load a model that `save_model_folder` saved in a run's folder, or a folder that is a model itself.

    Of several classes, the config.json names one. Raises InputError, in one line, if the model is missing, incomplete,
    truncated, not finite or of another class; see `t2i.files.untrusted` for what else.
    """
    path = Path(folder)
    # A process that died while it replaced `model` left the older model under the second name.
    path = next((path / part for part in ("model", "model.replaced") if is_folder(path / part)), path)
    classes = classes if isinstance(classes, tuple) else (classes,)
    known = {model_class.__name__: model_class for model_class in classes}
    expected = " or ".join(known)
    name = read_model_class(path) if is_folder(path) else None
    if name is None:
        raise InputError(f"no trained {expected} in {str(folder)!r}, it has no config.json; train that stage first")
    if name not in known:
        raise InputError(f"{str(path)!r} holds a {name:.80}; it must be a {expected}")
    # Headers and configuration must agree before any memory is allocated
    component = Component(path, Path(folder))
    component.check_model(known[name])
    model = load_or_explain(lambda _: load_component_model(known[name], component), path)
    check_finite_weights(model, path)
    return model


def load_component_model(model_class: Any, component: Component, dtype: torch.dtype | None = None) -> Any:
    """Load what `model_class.from_pretrained(folder)` does, in eval mode, after `component.check_model`.

    dtype: None is float32. diffusers' own loading keeps a file's pages beside the model: half as much memory again
    where half precision becomes single.
    """
    dtype = dtype or torch.float32
    # Buffers are computed, for not all of them are in the files.
    with init_empty_weights(include_buffers=False):
        model = model_class.from_config(component.config)
    model.load_state_dict(dict(component.iterate_tensors(dtype)), assign=True)
    Module.to(model, dtype)  # for buffers that no file holds; diffusers' own `to` warns, whatever the model
    model.register_to_config(**{ORIGIN: str(component.folder)})
    if isinstance(model, CompanionFiles):
        model.load_companion_files(component.folder, component.root or component.folder)
    return model.eval()


def read_model_class(folder: Path) -> str | None:
    """Return the class that a model folder's config.json names; None if there is no such file."""
    path = folder / "config.json"
    return str(read_json(path).get("_class_name")) if path.exists() else None


def load_or_explain(load: Callable[[Path], Loaded], path: Path) -> Loaded:
    """Return `load(path)`; raise its errors, of any class, as an InputError of one line that names the path."""
    try:
        return load(path)
    except InputError:
        raise
    except Exception as error:  # libraries raise errors of any class for damaged files
        raise InputError(f"{str(path)!r} does not load: {format_error(error)}") from error
