"""Files that may come from anybody: what is checked before another library opens them.

A model folder is JSON and safetensors, and nothing in it names a file elsewhere. Its header says how large its tensors
are, so a configuration that asks for more is refused before anything of that size is made.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as registration

from t2i.errors import InputError

MAX_JSON_BYTES = 1_000_000  # bytes of a configuration
MAX_HEADER_BYTES = 2_000_000  # bytes of a safetensors header or index: some 20,000 tensors
MAX_TOKENIZER_BYTES = 64_000_000  # bytes of one file of a tokenizer
MAX_CONFIG_NUMBER = 10_000_000  # in a configuration; the largest vocabularies have a tenth of it
MAX_TIMESTEPS = 100_000  # any number in a scheduler's configuration
MAX_CONFIG_DEPTH = 16  # of the nesting of a configuration
SPARE_ELEMENTS = 2**24  # elements that a model may make beyond those in its files: masks and the like

PICKLE_FILE_TYPES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib")
CODE_KEYS = (
    "auto_map",
    "custom_pipeline",
    "quantization_config",
    "trust_remote_code",
)  # keys that make libraries import
SIGNED_KEYS = ("init_logit_bias",)  # integers that may be negative
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
WINDOWS_DEVICES = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{port}{i}" for port in ("COM", "LPT") for i in range(10)),
}  # on Windows


class TensorSpec(NamedTuple):
    """A tensor as a safetensors header describes it."""

    dtype: str  # "F32", ...
    shape: tuple[int, ...]


def check_file_name(what: str, name: Any) -> str:
    """A plain file name on every system: no folder, drive, device or hidden file. Raises InputError for any other."""
    plain = isinstance(name, str) and len(name) <= 200 and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name)
    if not plain or name.endswith(".") or name.split(".")[0].upper() in WINDOWS_DEVICES:
        allowed = "letters, digits and _ . + - only, without a folder"
        raise InputError(f"{what} must be a plain name ({allowed}), got {name!r:.80}")
    return name


def is_folder(name: str | Path) -> bool:
    """Path.is_dir for names that may be no path at all."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises InputError for anything else, or a key given twice."""
    check_size_limit(path, limit)
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error})") from error


def check_size_limit(path: Path, limit: int) -> None:
    """Refuse what is no file, or a file of more than `limit` bytes."""
    if not path.is_file():  # a pipe would block
        raise InputError(f"no file {str(path)!r}")
    if (size := path.stat().st_size) > limit:
        raise InputError(f"{str(path)!r} has {size:,} bytes; no such file needs more than {limit:,}")


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(
            content.decode(), object_pairs_hook=reject_duplicate_keys, parse_constant=reject_json_constant
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} is not a JSON object, but {type(value).__name__}")
    return value


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, part in pairs:
        if key in value:
            raise ValueError(f"the key {key!r:.80} is given twice")
        value[key] = part
    return value


def reject_json_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def read_config(path: Path, largest: int = MAX_CONFIG_NUMBER) -> dict[str, Any]:
    """A configuration: JSON that makes no library import anything, with numbers up to `largest` in magnitude."""
    config = read_json(path)
    if code := [key for key in CODE_KEYS if key in config]:
        raise InputError(f"{str(path)!r} has {code[0]!r}; only this project's own code is run")
    for keys, value in iterate_config_numbers(config):
        least = -largest if isinstance(value, float) or keys[-1] in SIGNED_KEYS else 0
        if len(keys) > MAX_CONFIG_DEPTH or not least <= value <= largest:  # nor infinity
            found = f"{'.'.join(keys[:MAX_CONFIG_DEPTH])} = {value}"
            raise InputError(f"{str(path)!r} has {found:.200}; numbers from {least:,} to {largest:,} make sense")
    return config


def iterate_config_numbers(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number in a JSON value after the keys that lead there; 0 for what is nested deeper than
    MAX_CONFIG_DEPTH."""
    if isinstance(value, int | float):
        yield keys, value
    elif len(keys) > MAX_CONFIG_DEPTH:
        yield keys, 0
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from iterate_config_numbers(part, (*keys, str(key)))


def check_folder_files(folder: Path, root: Path | None = None) -> None:
    """Refuse a folder with code in it, or a link out of `root` (the folder itself, if not given)."""
    root = root or folder
    for path in (folder, *sorted(folder.iterdir())):
        check_link_target(path, root)
        if path.suffix == ".py":
            raise InputError(f"{str(path)!r} is code; only this project's own code is run")


def check_link_target(path: Path, root: Path) -> None:
    """Refuse a link that leaves `root`; in a snapshot of the hub's cache, files link to the blobs beside it."""
    try:
        home, target = root.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{str(path)!r} is a link that leads nowhere ({error})") from error
    repository = home.parent.parent
    cached = home.parent.name == "snapshots" and repository.name.startswith("models--")
    if not target.is_relative_to(home) and not (cached and target.parent == repository / "blobs"):
        raise InputError(f"{str(path)!r} is a link out of {str(root)!r}, which is not followed; copy the files")


def find_weight_files(
    folder: Path,
    variant: str | None = None,
    stem: str = "diffusion_pytorch_model",
    exists: Callable[[Path], bool] = Path.exists,
) -> list[Path]:
    """The safetensors files of a model folder: those of its index, or the one.

    `stem`: the name that diffusers gives them; transformers' is "model". `exists`: of files that are yet to be fetched.
    """
    middle = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{middle}.json"
    single = folder / f"{stem}{middle}.safetensors"
    if exists(index):
        shards = read_json(index, MAX_HEADER_BYTES).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{str(index)!r} has no weight_map that names files")
        for name in sorted(set(map(str, shards.values()))):
            if not check_file_name(f"a file in {str(index)!r}", name).endswith(".safetensors"):
                raise InputError(f"{str(index)!r} asks for {name!r}; only .safetensors is loaded")
        return [folder / name for name in sorted(set(map(str, shards.values())))]
    if variant and not exists(single):
        return find_weight_files(folder, stem=stem, exists=exists)
    return [single]


def read_safetensors_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors of a safetensors file by name. Raises InputError if the file is anything else, or is damaged."""
    if not path.is_file():
        others = [other.name for other in path.parent.glob("*.bin.index.json")]
        others += sorted(other.name for other in path.parent.iterdir() if other.suffix in PICKLE_FILE_TYPES)
        how = f"`t2i convert {path.with_name(others[0])}` makes that of it" if others else ""
        found = f"; it has {others[0]}, but only .safetensors is loaded; {how}" if others else ""
        raise InputError(f"no file {path.name!r} in {str(path.parent)!r}{found}")
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size:,} bytes")
            header = file.read(size)
        with safe_open(path, "pt"):  # checks the types, and that offsets fit shapes, each other and the file
            pass
    except (OSError, ValueError, SafetensorError) as error:
        said = f"only .safetensors is loaded ({error})"
        raise InputError(f"{str(path)!r} is no whole safetensors file, and {said}") from error
    table = parse_json(header, path)
    table.pop("__metadata__", None)
    return {name: TensorSpec(entry["dtype"], tuple(entry["shape"])) for name, entry in table.items()}


def check_model_folder(model_class: Any, folder: Path, root: Path | None = None, variant: str | None = None) -> None:
    """Refuse a model folder that is not as `model_class` writes it, by name, before anything of its size is made."""
    check_folder_files(folder, root)
    config = read_config(folder / "config.json")
    held = {
        name: stored
        for path in find_weight_files(folder, variant)
        for name, stored in read_safetensors_header(path).items()
    }
    with bounded_meta_device(held, folder):
        model = model_class.from_config(config)
    check_tensor_specs(model.state_dict(), held, folder)


@contextmanager
def bounded_meta_device(held: dict[str, TensorSpec], folder: Path) -> Iterator[None]:
    """A model made inside has shapes but no memory; InputError as soon as it outgrows the tensors in `held`."""
    room = 2 * sum(math.prod(stored.shape) for stored in held.values()) + SPARE_ELEMENTS
    count = 2 * len(held) + 1000

    def register(module: Module, name: str, tensor: Tensor | None) -> None:
        nonlocal room, count
        if tensor is not None and tensor.is_meta:
            room, count = room - tensor.numel(), count - 1
            if room < 0 or count < 0:
                raise InputError(f"the config.json in {str(folder)!r} asks for a larger model than its weights are")

    handles = [
        registration.register_module_parameter_registration_hook(register),
        registration.register_module_buffer_registration_hook(register),
    ]
    try:
        with torch.device("meta"):
            yield
    except InputError:
        raise
    except Exception as error:  # whatever a library makes of a configuration that nobody checked
        raise InputError(f"the configuration in {str(folder)!r} makes no model ({format_error(error)})") from error
    finally:
        for handle in handles:
            handle.remove()


def check_tensor_specs(wanted: dict[str, Tensor], held: dict[str, TensorSpec], folder: Path) -> None:
    """Refuse tensors that are missing, unknown, or of another shape or kind than the model's."""
    faults = {
        "lacks": [f"{name} {tuple(wanted[name].shape)}" for name in sorted(wanted.keys() - held.keys())],
        "has unknown": [f"{name} {held[name].shape}" for name in sorted(held.keys() - wanted.keys())],
        "has misshapen": [
            f"{name} {held[name].shape}, not {tuple(wanted[name].shape)}"
            for name in sorted(wanted.keys() & held.keys())
            if held[name].shape != tuple(wanted[name].shape)
        ],
        "has mistyped": [
            f"{name} of {held[name].dtype}, not {wanted[name].dtype}"
            for name in sorted(wanted.keys() & held.keys())
            if (held[name].dtype in FLOAT_DTYPES) != wanted[name].is_floating_point()
        ],
    }
    for fault, names in faults.items():
        if names:
            first = "; ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            raise InputError(f"{str(folder)!r} {fault} tensors, {len(names)} of {len(wanted)}: {first}")


def check_finite_weights(model: Module, folder: str | Path) -> None:
    """Refuse weights with NaN or infinity. Reads all of them once."""
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise InputError(f"{str(folder)!r} has NaN or infinity in {len(bad)} tensors, the first is {bad[0]!r}")


def format_error(error: Exception) -> str:
    """What an exception says; some say only what they are with it."""
    return f"{type(error).__name__}: {error}"[:300]
