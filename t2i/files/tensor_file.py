"""Tensors and what they are of, in one file: safetensors, with JSON in its header. It is whole or absent."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i.errors import InputError
from t2i.files.atomic import create_file_atomically, raise_as_oserror
from t2i.files.model_folder import load_or_explain
from t2i.files.untrusted import parse_json, read_safetensors_header

METADATA_KEY = "t2i"  # of our JSON among the metadata


def write_tensor_file(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Replaces the file; `about` is JSON and should name its `kind`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with create_file_atomically(path) as unfinished, raise_as_oserror():
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, unfinished, metadata={METADATA_KEY: json.dumps(about)})


def read_tensor_file(path: Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and what they are of. Raises InputError for any file but one of this kind with these tensors."""
    held = read_safetensors_header(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    about = parse_json(metadata.get(METADATA_KEY, "{}").encode(), path)
    if about.get("kind") != kind or set(held) != set(names):
        raise InputError(f"{str(path)!r} holds no {kind}, but {about.get('kind', 'other tensors')!r:.80}")
    return load_or_explain(load_file, path), about
