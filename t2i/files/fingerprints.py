"""Fingerprints of weights, by which a model recognises the models that it was trained with."""

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

EXACT_DTYPES = (torch.float32, torch.float16)  # keep the values that a fingerprint is computed from
BRIEF_FINGERPRINT_VALUES = 1024  # of each tensor, that a brief fingerprint reads


def compute_weights_fingerprint(model: Module, more: str = "") -> str:
    """Return 16 hexadecimal digits for a model's weights and some text. They are the same in fp32 and fp16."""
    return compute_tensors_fingerprint(model.state_dict(), more)


def compute_tensors_fingerprint(tensors: dict[str, Tensor], more: str = "") -> str:
    hasher = hashlib.sha256(more.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(name.encode())
        # In half precision, so that a model may be stored in it and keep its fingerprint.
        hasher.update(tensor.detach().cpu().half().reshape(-1).numpy())
    return hasher.hexdigest()[:16]


def compute_stored_fingerprint(folder: Path) -> str:
    """Return `compute_weights_fingerprint` of the model saved in a folder, without building the model."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_or_explain(load_file, path)
    return compute_tensors_fingerprint(tensors)


def compute_brief_fingerprint(models: Mapping[str, Module | None], more: str = "") -> str:
    """Return 16 hexadecimal digits for several models by name, and some text.

    They depend on the names, the shapes and the first `BRIEF_FINGERPRINT_VALUES` values of each tensor, as float32.
    Cheap for large models, and the same on every device.
    """
    hasher = hashlib.sha256(more.encode())
    for part, model in models.items():
        state = {} if model is None else model.state_dict()
        weights = {name: tensor for name, tensor in state.items() if not tensor.is_meta}
        hasher.update(repr([part, [(name, tuple(tensor.shape)) for name, tensor in weights.items()]]).encode())
        first = [tensor.reshape(-1)[:BRIEF_FINGERPRINT_VALUES].float() for tensor in weights.values()]
        if first:
            hasher.update(torch.cat(first).cpu().numpy().tobytes())
    return hasher.hexdigest()[:16]


def format_scheduler_configs(components: Mapping[str, object]) -> str:
    """Return the configurations of a pipeline's schedulers as JSON, without paths and versions."""
    configs = {}
    for name, scheduler in components.items():
        if isinstance(scheduler, SchedulerMixin):
            settings = {key: value for key, value in scheduler.config.items() if key[0] != "_"}
            configs[name] = {"class": type(scheduler).__name__, **settings}
    return json.dumps(configs, sort_keys=True)


def compute_files_fingerprint(folder: Path, patterns: Iterable[str]) -> str:
    """Return 16 hexadecimal digits for the names and bytes of the files in a folder that match any of `patterns`."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    digests = {path.relative_to(folder).as_posix(): compute_file_sha256(path) for path in paths}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def check_weights_fingerprint(model: Any, folder: Path) -> None:
    """Raise InputError if a loaded model's weights are not those of the fingerprint in its configuration.

    Weights in a dtype that does not keep them are marked as `rounded`: they cannot be compared, now or later.
    """
    expected = model.config.fingerprint
    if model.dtype not in EXACT_DTYPES:
        model.register_to_config(rounded=True)
    elif expected and not model.config.rounded and model.compute_fingerprint() != expected:
        raise InputError(f"the weights in {str(folder)!r} are not those of fingerprint {expected} in its config")
