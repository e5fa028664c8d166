"""Checks of files from unknown sources, made before any library opens them.

A model's files are JSON and safetensors, and none of them may name a file outside its folder. The safetensors headers
bound the model: a configuration that describes more than they hold is refused before memory is allocated for it.
"""

import json
import math
import re
import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as registration

from t2i.errors import InputError

MAX_JSON_BYTES = 1_000_000  # of a configuration
MAX_HEADER_BYTES = 2_000_000  # of a safetensors header or index: some 20,000 tensors
MAX_TOKENIZER_BYTES = 64_000_000  # of one file of a tokenizer
MAX_CONFIG_NUMBER = 10_000_000  # the largest vocabularies have a tenth of it
MAX_CONFIG_DEPTH = 16
MAX_TIMESTEPS = 100_000  # any number in a scheduler's configuration
SPARE_ELEMENTS = 2**24  # that a model may make beyond those in its files, such as masks

PICKLE_FILE_TYPES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib")
CODE_KEYS = ("auto_map", "custom_pipeline", "quantization_config", "trust_remote_code")  # make libraries import
SIGNED_KEYS = ("init_logit_bias",)  # integers that may be negative
FLOAT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
DIFFUSERS_STEM = "diffusion_pytorch_model"  # of the names of weight files in diffusers
DIFFUSERS_CODE = "pipeline.py"  # beside a model_index.json: code that diffusers runs if told to, and nothing here reads
STAND_IN_BYTES = 64  # first bytes of a file that tell whether it stands in for another
# First bytes of files that are often found in the place of others: what they are, and what helps
STAND_INS = {
    b"version https://git-lfs": ("a Git LFS pointer", "`git lfs pull` in its repository fetches the file itself"),
    b"<!doctype": ("a web page", "download the file itself; for a gated model, log in first"),
    b"<html": ("a web page", "download the file itself; for a gated model, log in first"),
    b"<?xml": ("an XML page", "download the file itself; for a gated model, log in first"),
}
# On Windows these are devices, whatever their suffix.
DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


class TensorSpec(NamedTuple):
    """The dtype ("F32", ...) and shape of a tensor, as a safetensors header gives them."""

    dtype: str
    shape: tuple[int, ...]


def check_file_name(what: str, name: Any) -> str:
    """Return `name` if it is a plain file name on every system. Raises InputError for folders, drives and the like."""
    plain = isinstance(name, str) and len(name) <= 200 and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name)
    if not plain or name.endswith(".") or DEVICE_NAME.fullmatch(name):
        allowed = "letters, digits and _ . + - only, without a folder"
        raise InputError(f"{what} must be a plain name ({allowed}), got {name!r:.80}")
    return name


def is_folder(name: str | Path) -> bool:
    """Return Path(name).is_dir(), and False for strings that cannot be a path."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit` bytes. Raises InputError for anything else."""
    check_size(path, limit)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error})") from error
    check_start(path, content[:STAND_IN_BYTES])
    return parse_json(content, path)


def check_size_limit(path: Path, limit: int) -> None:
    """Raise InputError for a file of more than `limit` bytes, or one that stands in for another."""
    check_size(path, limit)
    check_no_stand_in(path)


def check_size(path: Path, limit: int) -> None:
    if not path.is_file():  # reading a pipe would block
        raise InputError(f"no file {str(path)!r}")
    if (size := path.stat().st_size) > limit:
        raise InputError(f"{str(path)!r} has {size:,} bytes; such a file has at most {limit:,}")


def describe_stand_in(start: bytes) -> str | None:
    """Return what a file with these first bytes is in place of another, and what helps; None for other files."""
    start = start.lower().lstrip()
    for prefix, (what, remedy) in STAND_INS.items():
        if start.startswith(prefix):
            return f"{what}, which stands in for the file; {remedy}"
    return None if start else "empty; download the file again"


def check_no_stand_in(path: Path) -> None:
    """Raise InputError for an empty file, a Git LFS pointer or a web page: remains of a download that failed."""
    with suppress(OSError), open(path, "rb") as file:
        check_start(path, file.read(STAND_IN_BYTES))


def check_start(path: Path, start: bytes) -> None:
    """Raise InputError if a file with these first bytes stands in for another."""
    if fault := describe_stand_in(start):
        raise InputError(f"{str(path)!r} is {fault}")


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content.decode(), object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} must be a JSON object, got {type(value).__name__}")
    return value


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two values, another library might read the one that was not checked.
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is given twice")
    return value


def read_config(path: Path, largest: int = MAX_CONFIG_NUMBER) -> dict[str, Any]:
    """Read a configuration: JSON without keys that run code, and with numbers of at most `largest` in magnitude."""
    config = read_json(path)
    if code := [key for key in CODE_KEYS if key in config]:
        raise InputError(f"{str(path)!r} has {code[0]!r}; only this project's own code is run")
    check_config_values(config, path, largest)
    return config


def check_config_values(value: Any, path: Path, largest: int, key: str = "", depth: int = 0) -> None:
    """Raise InputError for large numbers, negative integers, and deep nesting. key: name of the value."""
    if depth > MAX_CONFIG_DEPTH:
        raise InputError(f"{str(path)!r} is nested more than {MAX_CONFIG_DEPTH} deep")
    least = -largest if isinstance(value, float) or key in SIGNED_KEYS else 0
    # A comparison with NaN is false, so this refuses NaN as well as infinity.
    if isinstance(value, int | float) and not least <= value <= largest:
        raise InputError(f"{str(path)!r} has {key:.80} = {value!s:.80}; allowed is from {least:,} to {largest:,}")
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else ((key, part) for part in value):
            check_config_values(part, path, largest, name, depth + 1)


def check_folder_files(folder: Path, root: Path | None = None) -> None:
    """Raise InputError for a folder with code in it, or with a link out of `root` (default: the folder itself).

    A pipeline may have a `pipeline.py`, which is for diffusers and never run here.
    """
    root = root or folder
    ignored = DIFFUSERS_CODE if (folder / "model_index.json").is_file() else None
    for path in (folder, *sorted(folder.iterdir())):
        check_link_target(path, root)
        if path.suffix == ".py" and path.name != ignored:
            raise InputError(f"{str(path)!r} is code; only this project's own code is run")


def check_link_target(path: Path, root: Path) -> None:
    try:
        base, target = root.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{str(path)!r} is a link that leads nowhere ({error})") from error
    # In a snapshot of the hub's cache, files are links to the blobs of the same repository.
    repository = base.parent.parent
    cached = base.parent.name == "snapshots" and repository.name.startswith("models--")
    if not target.is_relative_to(base) and not (cached and target.parent == repository / "blobs"):
        raise InputError(f"{str(path)!r} is a link out of {str(root)!r}, which is not followed; copy the files")


def choose_stored_variant(
    folder: Path, variant: str | None = None, stem: str = DIFFUSERS_STEM, names: Collection[str] | None = None
) -> str | None:
    """Return the variant of the weights to read from a model's folder; None for the plain files.

    It is the requested one, else the plain files, else the only one there is. For the arguments see
    `find_weight_files`. Raises InputError if there are several and none of them was requested.
    """
    names = [path.name for path in folder.iterdir()] if names is None else names
    pattern = re.compile(rf"{stem}(?:\.safetensors\.index(?:\.(.+))?\.json|(?:\.([^.]+))?\.safetensors)")
    # Shards do not count without the index that names them
    matches = [pattern.fullmatch(name) for name in names if not re.search(r"-\d{5}-of-\d{5}\.", name)]
    stored = {match[1] or match[2] for match in matches if match}
    if variant in stored or not stored or None in stored:
        return variant if variant in stored else None
    if len(stored) > 1:
        known = " and ".join(sorted(map(str, stored)))
        raise InputError(
            f"{str(folder)!r} has its weights in the variants {known} alone; choose one by variant, or --variant"
        )
    return stored.pop()


def find_weight_files(
    folder: Path, variant: str | None = None, stem: str = DIFFUSERS_STEM, names: Collection[str] | None = None
) -> list[Path]:
    """Return the safetensors files of a model's folder: the shards that its index lists, or the single file.

    variant: such as "fp16"; see `choose_stored_variant`. stem: start of the file names: "diffusion_pytorch_model" in
    diffusers, "model" in transformers. names: list of the folder's files, where they are yet to be downloaded.
    """
    names = [path.name for path in folder.iterdir()] if names is None else names
    variant = choose_stored_variant(folder, variant, stem, names)
    middle = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{middle}.json"
    # An index may name any file, so each name is checked before it is joined to the folder.
    if index.name in names:
        shards = read_json(index, MAX_HEADER_BYTES).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{str(index)!r} has no weight_map that names files")
        files = sorted(set(map(str, shards.values())))
        for name in files:
            if not check_file_name(f"a file in {str(index)!r}", name).endswith(".safetensors"):
                raise InputError(f"{str(index)!r} names {name!r}; only .safetensors is loaded")
        return [folder / name for name in files]
    return [folder / f"{stem}{middle}.safetensors"]


def read_safetensors_header(path: Path) -> dict[str, TensorSpec]:
    """Return the tensors of a safetensors file by name. Raises InputError for any other file, or a damaged one."""
    if not path.is_file():
        refuse_missing_weights(path)
    check_no_stand_in(path)
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size:,} bytes")
            header = file.read(size)
        with safe_open(path, "pt"):  # checks dtypes, and that offsets fit shapes, each other and the file
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{str(path)!r} is not a whole safetensors file, and only .safetensors is loaded ({error})"
        ) from error
    table = parse_json(header, path)
    table.pop("__metadata__", None)
    return {name: TensorSpec(entry["dtype"], tuple(entry["shape"])) for name, entry in table.items()}


def refuse_missing_weights(path: Path) -> None:
    """Raise InputError for a missing weights file; if there is a pickle instead, name the command that converts it."""
    pickles = [other.name for other in path.parent.glob("*.bin.index.json")]
    pickles += sorted(other.name for other in path.parent.iterdir() if other.suffix in PICKLE_FILE_TYPES)
    hint = ""
    if pickles:
        command = f"`{shlex.join(['t2i', 'convert', str(path.with_name(pickles[0]))])}`"
        hint = f"; it has {pickles[0]}, but only .safetensors is loaded; {command} makes that of it"
    raise InputError(f"no file {path.name!r} in {str(path.parent)!r}{hint}")


@contextmanager
def bounded_meta_device(stored: dict[str, TensorSpec], folder: Path) -> Iterator[None]:
    """Build models on the meta device: with shapes, without memory.

    Raises InputError as soon as a model outgrows the `stored` tensors, and for a configuration that builds no model.
    """
    # Twice the files' size, for a model may tie weights, or make buffers that no file stores.
    elements = 2 * sum(math.prod(spec.shape) for spec in stored.values()) + SPARE_ELEMENTS
    count = 2 * len(stored) + 1000

    def register(module: Module, name: str, tensor: Tensor | None) -> None:
        nonlocal elements, count
        if tensor is not None and tensor.is_meta:
            elements, count = elements - tensor.numel(), count - 1
            if elements < 0 or count < 0:
                raise InputError(f"the config.json in {str(folder)!r} describes a larger model than its weights")

    # torch calls these hooks for every parameter and buffer, also in modules of other libraries.
    handles = [
        registration.register_module_parameter_registration_hook(register),
        registration.register_module_buffer_registration_hook(register),
    ]
    try:
        with torch.device("meta"):
            yield
    except InputError:
        raise
    except Exception as error:  # libraries raise errors of any class for values that they did not expect
        raise InputError(f"the configuration in {str(folder)!r} builds no model ({format_error(error)})") from error
    finally:
        for handle in handles:
            handle.remove()


def check_tensor_specs(expected: dict[str, Tensor], stored: dict[str, TensorSpec], folder: Path) -> None:
    """Raise InputError for tensors that are missing, unknown, or of another shape or kind than the model's."""
    missing = sorted(expected.keys() - stored.keys())
    faults: dict[str, list[str]] = {"lacks": [f"{name} {tuple(expected[name].shape)}" for name in missing]}
    faults |= {"has unknown": [], "has misshapen": [], "has mistyped": []}
    for name, spec in sorted(stored.items()):
        tensor = expected.get(name)
        if tensor is None:
            faults["has unknown"].append(f"{name} {spec.shape}")
        elif spec.shape != tuple(tensor.shape):
            faults["has misshapen"].append(f"{name} {spec.shape}, not {tuple(tensor.shape)}")
        elif (spec.dtype in FLOAT_DTYPES) != tensor.is_floating_point():
            faults["has mistyped"].append(f"{name} of {spec.dtype}, not {tensor.dtype}")
    # The first kind of fault often explains the others
    for fault, names in faults.items():
        if names:
            first = "; ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            raise InputError(f"{str(folder)!r} {fault} tensors, {len(names)} of {len(expected)}: {first}")


def check_finite_weights(model: Module, folder: str | Path) -> None:
    """Raise InputError for weights with NaN or infinity. Reads all of them once."""
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise InputError(f"{str(folder)!r} has NaN or infinity in {len(bad)} tensors, the first is {bad[0]!r}")


def format_error(error: Exception) -> str:
    """Return an exception's class and message, at most 300 characters. Some messages are empty."""
    return f"{type(error).__name__}: {error}"[:300]
