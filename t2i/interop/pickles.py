"""Weights in pickles (.bin, .ckpt, .pt, .pth), made into safetensors once. Nothing else here reads a pickle.

A pickle can run any code. torch's `weights_only` reader takes tensors and plain containers alone, and refuses the rest.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import safe_globals

from t2i.errors import InputError
from t2i.files.atomic import create_file_atomically, raise_as_oserror
from t2i.files.untrusted import MAX_HEADER_BYTES, PICKLE_FILE_TYPES, check_file_name, read_json

WRAPPER_KEYS = ("state_dict", "model")  # what trainers put weights under
INDEX_SUFFIX = ".bin.index.json"


def read_pickle(path: Path, stand_ins: tuple[tuple[Any, str], ...] = ()) -> Any:
    """What a pickle of torch holds: tensors, on the CPU and mapped from the file, in plain containers.

    stand_ins: classes that are made in the place of others, by the others' names.

    Raises InputError for a file that holds anything else, which is not run, or is damaged.
    """
    if path.suffix not in PICKLE_FILE_TYPES or not path.is_file():
        raise InputError(f"{str(path)!r} is no file of weights; one ends in {', '.join(PICKLE_FILE_TYPES[:4])}")
    try:
        with safe_globals(list(stand_ins)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of a file that is only looked at
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files of before torch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader makes of bytes that nobody checked
        name = parse_refused_name(error)
        fault = f"holds a {name!r:.80}, which is no weights" if name else "holds more than weights, or is damaged"
        raise InputError(f"{str(path)!r} {fault}; nothing of it was run") from error


def parse_refused_name(error: Exception) -> str | None:
    """The object that torch's reader would not make. Nothing else is told of what it says, for it recommends to read
    the file without care."""
    found = re.search(r"(?:GLOBAL|unsupported class|unrecognized function) (\S+)", str(error))
    return found[1] if found else None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a component by name. Raises InputError for a pickle that holds something else."""
    found = read_pickle(path)
    for key in WRAPPER_KEYS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found:
        raise InputError(f"{str(path)!r} holds a {type(found).__name__}, not the tensors of a model by name")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{str(path)!r} has {name!r:.80}, a {type(tensor).__name__}, where only tensors belong")
    return found


def convert_weights(source: Path, out: Path | None = None) -> Path:
    """Write the tensors of a pickle as safetensors, and return where.

    out: a new file; beside the old one, under the name by which models find it, if left out. Of an index
    (`pytorch_model.bin.index.json`) all its files are converted, beside them.
    """
    if source.name.endswith(INDEX_SUFFIX):
        return convert_shards(source)
    out = source.with_name(convert_file_name(source.name)) if out is None else out
    if out.suffix != ".safetensors" or out.exists():
        what = "exists and is not overwritten" if out.exists() else "does not end in .safetensors"
        raise InputError(f"{str(out)!r} {what}; give another name")
    # Tensors that share memory, as tied weights do, are written each for itself.
    tensors = {name: tensor.clone().contiguous() for name, tensor in read_weights(source).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with create_file_atomically(out) as unfinished, raise_as_oserror():
        save_file(tensors, unfinished, metadata={"format": "pt"})
    return out


def convert_shards(index: Path) -> Path:
    table = read_json(index, MAX_HEADER_BYTES)
    names = table.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{str(index)!r} has no weight_map that names files")
    for name in sorted(set(map(str, names.values()))):
        convert_weights(index.with_name(check_file_name(f"a file in {str(index)!r}", name)))
    table["weight_map"] = {key: convert_file_name(str(name)) for key, name in names.items()}
    out = index.with_name(convert_file_name(index.name.removesuffix(".index.json")) + ".index.json")
    out.write_text(json.dumps(table, indent=2))
    return out


def convert_file_name(name: str) -> str:
    """pytorch_model.bin -> model.safetensors, as transformers looks for it; other names keep their stem."""
    stem = Path(name).stem
    return (stem.removeprefix("pytorch_") if stem.startswith("pytorch_model") else stem) + ".safetensors"
