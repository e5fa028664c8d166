"""Save and load one safetensors file that states, as JSON in its header, what its tensors are."""

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
    """Write a file, complete or not at all. `about` is JSON and should have a `kind`. Raises OSError."""
    with create_file_atomically(path) as unfinished:
        save_tensors(unfinished, tensors, {METADATA_KEY: json.dumps(about)})


def read_tensor_file(path: Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and `about`. Raises InputError for any file but one of this kind with these tensors."""
    # The header is checked before the library opens the file
    stored = read_safetensors_header(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    about = parse_json(metadata.get(METADATA_KEY, "{}").encode(), path)
    if about.get("kind") != kind or set(stored) != set(names):
        raise InputError(f"{str(path)!r} must hold a {kind}, got {about.get('kind', 'other tensors')!r:.80}")
    return load_or_explain(load_file, path), about


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, which takes contiguous tensors alone. Raises OSError, such as for a full disk."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with raise_as_oserror():
        save_file(contiguous, path, metadata)
