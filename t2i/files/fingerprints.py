"""Digests of weights."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module

from t2i.errors import InputError
from t2i.files.atomic import compute_file_sha256
from t2i.files.model_folder import load_or_explain

EXACT_DTYPES = (torch.float32, torch.float16)  # dtypes that keep what a fingerprint is made from
BRIEF_FINGERPRINT_VALUES = 1024  # values of a tensor, that a brief digest reads


def compute_weights_fingerprint(model: Module, more: str = "") -> str:
    """16 hexadecimal digits for a model's weights (and some text), the same in fp32 and fp16."""
    return compute_tensors_fingerprint(model.state_dict(), more)


def compute_brief_fingerprint(models: Mapping[str, Module | None], more: str = "") -> str:
    """16 hexadecimal digits for the weights of models by name (and some text): for the names, the shapes and the first
    `BRIEF_FINGERPRINT_VALUES` values of their tensors, as float32. Cheap for large ones, of which little is read;
    the same wherever they
    are."""
    hasher = hashlib.sha256(more.encode())
    for part, model in models.items():
        weights = {} if model is None else {name: one for name, one in model.state_dict().items() if not one.is_meta}
        hasher.update(repr([part, [(name, tuple(one.shape)) for name, one in weights.items()]]).encode())
        first = [one.reshape(-1)[:BRIEF_FINGERPRINT_VALUES].float() for one in weights.values()]
        if first:
            hasher.update(torch.cat(first).cpu().numpy().tobytes())
    return hasher.hexdigest()[:16]


def format_scheduler_configs(components: Mapping[str, object]) -> str:
    """What the configurations of a pipeline's schedulers say, as JSON; not where they lie or what read them."""
    said = {
        name: {"class": type(one).__name__} | {key: value for key, value in one.config.items() if key[0] != "_"}
        for name, one in components.items()
        if isinstance(one, SchedulerMixin)
    }
    return json.dumps(said, sort_keys=True)


def compute_stored_fingerprint(folder: Path) -> str:
    """`compute_weights_fingerprint` of the model saved in a folder, without building it."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_or_explain(load_file, path)
    return compute_tensors_fingerprint(tensors)


def compute_files_fingerprint(folder: Path, patterns: Iterable[str]) -> str:
    """16 hexadecimal digits for the names and bytes of the files in a folder that match any of `patterns`."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    found = {path.relative_to(folder).as_posix(): compute_file_sha256(path) for path in paths}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def compute_tensors_fingerprint(tensors: dict[str, Tensor], more: str = "") -> str:
    hasher = hashlib.sha256(more.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().half().reshape(-1).numpy())
    return hasher.hexdigest()[:16]


def check_weights_fingerprint(model: Any, folder: Path) -> None:
    """Refuse a loaded model whose weights are not those of the fingerprint in its configuration.

    One in a dtype that does not keep them is `rounded`: it cannot be compared, now or later.
    """
    expected = model.config.fingerprint
    if model.dtype not in EXACT_DTYPES:
        model.register_to_config(rounded=True)
    elif expected and not model.config.rounded and model.fingerprint() != expected:
        raise InputError(f"the weights in {str(folder)!r} are not those of fingerprint {expected} in its config")
