"""Convert weights in pickles (.bin, .ckpt, .pt, .pth) to safetensors, which is what models are loaded from.

A pickle can run any code. torch's `weights_only` reader makes tensors and plain containers alone, and refuses the rest.
"""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from t2i.bulk import BulkJob
from t2i.errors import InputError
from t2i.files.atomic import create_file_atomically, write_bytes_atomically
from t2i.files.tensor_file import save_tensors
from t2i.files.untrusted import (
    MAX_HEADER_BYTES,
    PICKLE_FILE_TYPES,
    check_file_name,
    check_no_stand_in,
    is_folder,
    read_json,
)

WRAPPER_KEYS = ("state_dict", "model")  # under which trainers store weights
INDEX_SUFFIX = ".bin.index.json"
WEIGHT_FILE_TYPES = PICKLE_FILE_TYPES[:4]  # the others are seldom weights of a model


def read_pickle(path: Path, stand_ins: tuple[tuple[Any, str], ...] = ()) -> Any:
    """Return the content of a pickle of torch: tensors on the CPU, mapped from the file, in plain containers.

    stand_ins: classes to make in the place of others, with the others' names. Raises InputError for a file that holds
    anything else, which is not run, or that is damaged.
    """
    if path.suffix not in PICKLE_FILE_TYPES or not path.is_file():
        raise InputError(f"{str(path)!r} is no file of weights; such a file ends in {', '.join(PICKLE_FILE_TYPES[:4])}")
    check_no_stand_in(path)
    try:
        with safe_globals(list(stand_ins)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old formats
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files of before torch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises errors of any class
        # The message itself is not shown, for it recommends to switch the reader's protection off.
        refused = re.search(r"(?:GLOBAL|unsupported class|unrecognized function) (\S+)", str(error))
        fault = (
            f"holds a {refused[1]!r:.80}, which is no weights" if refused else "holds more than weights, or is damaged"
        )
        raise InputError(f"{str(path)!r} {fault}; nothing of it was run") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a model by name. Raises InputError for a pickle that holds anything else."""
    content = read_pickle(path)
    for key in WRAPPER_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise InputError(f"{str(path)!r} holds a {type(content).__name__}, not the tensors of a model by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{str(path)!r} has {name!r:.80}, a {type(tensor).__name__}, where only tensors belong")
    return content


def convert_weights(source: Path, out: Path | None = None) -> Path:
    """Write the tensors of a pickle as safetensors, and return the new file.

    Args:
        source: a pickle; or the index of several, `pytorch_model.bin.index.json`, which are all converted.
        out: the new file. None is beside the source, under the name by which models find it.
    """
    if source.name.endswith(INDEX_SUFFIX):
        return convert_shards(source)
    out = source.with_name(convert_file_name(source.name)) if out is None else out
    if out.suffix != ".safetensors" or out.exists():
        fault = "exists and is not overwritten" if out.exists() else "does not end in .safetensors"
        raise InputError(f"{str(out)!r} {fault}; give another name")
    # safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: tensor.clone() for name, tensor in read_weights(source).items()}
    with create_file_atomically(out) as unfinished:
        save_tensors(unfinished, tensors, {"format": "pt"})
    return out


def convert_folder_weights(folder: Path) -> Iterator[Path]:
    """Convert all pickles in a folder and in the folders in it, each beside itself, and yield the new files.

    Those with a safetensors file beside them are done already. Others that hold no weights, such as an optimizer's, are
    named and left out. Raises InputError if there is nothing to convert, and at the end with the number left out.
    """
    folders = [folder, *sorted(path for path in folder.iterdir() if is_folder(path) and not path.is_symlink())]
    files = [path for place in folders for path in sorted(place.iterdir()) if path.is_file()]
    indexes = [path for path in files if path.name.endswith(INDEX_SUFFIX)]
    shards = {path.with_name(str(name)) for path in indexes for name in read_shard_names(path).values()}
    pickles = [path for path in files if path.suffix in WEIGHT_FILE_TYPES and path not in shards]
    waiting = [path for path in [*indexes, *pickles] if not path.with_name(convert_file_name(path.name)).exists()]
    if not waiting:
        raise InputError(f"{str(folder)!r} has no pickles to convert; for another layout, name the new folder too")
    job = BulkJob(len(waiting), "files")
    for path in waiting:
        with job.skip_bad_input(path):
            yield convert_weights(path)
    job.finish()


def read_shard_names(index: Path) -> dict[str, str]:
    """Return the files of tensors by the tensors' names. Raises InputError if the index lists none."""
    names = read_json(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{str(index)!r} has no weight_map that names files")
    return {key: check_file_name(f"a file in {str(index)!r}", str(name)) for key, name in names.items()}


def convert_shards(index: Path) -> Path:
    names = read_shard_names(index)
    # The index comes last, when all that it names is there. Shards of an interrupted conversion are whole.
    for name in sorted(set(names.values())):
        if not index.with_name(convert_file_name(name)).exists():
            convert_weights(index.with_name(name))
    out = index.with_name(convert_file_name(index.name))
    weight_map = {key: convert_file_name(name) for key, name in names.items()}
    table = read_json(index, MAX_HEADER_BYTES) | {"weight_map": weight_map}
    write_bytes_atomically(out, json.dumps(table, indent=2).encode())
    return out


def convert_file_name(name: str) -> str:
    """Return model.safetensors for pytorch_model.bin, as transformers looks for it; other names keep their stem."""
    if name.endswith(INDEX_SUFFIX):
        return convert_file_name(name.removesuffix(".index.json")) + ".index.json"
    stem = Path(name).stem
    return (stem.removeprefix("pytorch_") if stem.startswith("pytorch_model") else stem) + ".safetensors"
