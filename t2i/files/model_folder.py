"""Weights from safetensors files onto models that were made without memory, so that no second copy of them is held."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from torch.nn import Module

from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically, raise_as_oserror
from t2i.files.untrusted import (
    check_finite_weights,
    check_model_folder,
    find_weight_files,
    format_error,
    is_folder,
    read_config,
    read_json,
)

CHUNK_BYTES = 2**22  # bytes of a file that are converted before it is mapped anew


def iterate_stored_tensors(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a safetensors file by name; floating-point ones in `dtype`, if one is given, others as stored.

    What keeps its dtype stays mapped, and is read from the disk when it is first used. What is converted was read
    through the mapping, and pages that were read count as memory as long as the file is mapped.
    """
    with safe_open(path, "pt") as file:
        left = list(reversed(file.offset_keys()))
    while left:
        with safe_open(path, "pt") as file:
            read = 0
            while left and read < CHUNK_BYTES:
                name = left.pop()
                tensor = file.get_tensor(name)
                if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    read += tensor.nbytes
                    tensor = tensor.to(dtype)
                yield name, tensor
                del tensor


def load_checked_model(
    kind: Any, folder: Path, dtype: torch.dtype | None = None, variant: str | None = None, root: Path | None = None
) -> Any:
    """What `kind.from_pretrained(folder)` gives, in eval mode, of a folder that `check_model_folder` has passed.

    dtype: None is float32. root: the pipeline's folder, which links may lead into. diffusers' own holds a file's pages
    beside the model: half as much again where half precision becomes single.
    """
    dtype = dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(read_config(folder / "config.json"))
    held = {
        name: one for path in find_weight_files(folder, variant) for name, one in iterate_stored_tensors(path, dtype)
    }
    model.load_state_dict(held, assign=True)
    Module.to(model, dtype)  # buffers that no file holds; diffusers' own `to` warns, whatever the model
    model.register_to_config(_name_or_path=str(folder))
    if hasattr(model, "load_companion_files"):
        model.load_companion_files(folder, root or folder)
    return model.eval()


Loaded = TypeVar("Loaded")


def save_model_folder(model: Any, folder: Path, name: str = "model") -> None:
    """Save a diffusers model or scheduler as `folder/name`, whole or not at all, replacing an older one."""
    with create_folder_atomically(folder / name) as unfinished, raise_as_oserror():
        model.save_pretrained(unfinished)


def load_model(classes: Any, folder: str | Path) -> Any:
    """A model that `save_model_folder` saved in a run's folder, or a folder that is a model itself.

    Of several classes, the one that the folder's config.json names. Raises InputError, in one line, if the model is
    missing, incomplete, truncated, not finite or of another class; see `t2i.files.untrusted` for what else.
    """
    path = Path(folder)
    # The second, if a process died while it replaced the first.
    path = next((path / part for part in ("model", "model.replaced") if is_folder(path / part)), path)
    known = {one.__name__: one for one in (classes if isinstance(classes, tuple) else (classes,))}
    wanted = " or ".join(known)
    name = read_model_class(path) if is_folder(path) else None
    if name is None:
        raise InputError(f"no trained {wanted} in {str(folder)!r}, it has no config.json; train that stage first")
    if name not in known:
        raise InputError(f"{str(path)!r} holds a {name:.80}; it must be a {wanted}")
    check_model_folder(known[name], path, Path(folder))
    model = load_or_explain(lambda folder: load_checked_model(known[name], folder), path)
    check_finite_weights(model, path)
    return model


def read_model_class(folder: Path) -> str | None:
    """The class that a model folder's config.json names; None if it has no such file."""
    path = folder / "config.json"
    return str(read_json(path).get("_class_name")) if path.exists() else None


def load_or_explain(load: Callable[[Path], Loaded], path: Path) -> Loaded:
    """`load(path)`, with what can be wrong with the folder said in one line."""
    try:
        return load(path)
    except InputError:
        raise
    except Exception as error:  # whatever a library makes of a damaged file
        raise InputError(f"{str(path)!r} does not load: {format_error(error)}") from error
