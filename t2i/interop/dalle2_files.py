"""Files that DALLE2-pytorch's trainers write (.pth): which tensors are taken of them, and how they are read.

They are pickles, which could run any code. torch's `weights_only` reader makes tensors and plain containers alone; the
one foreign object in these files, the release that wrote them, becomes an inert stand-in. All else is refused.
"""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from t2i.errors import InputError
from t2i.files.untrusted import check_size_limit, format_error
from t2i.interop.pickles import read_pickle

MAX_FILE_SIZE = 64 * 2**30  # bytes; the largest published one has a tenth of it
MAX_PICKLE_SIZE = 64 * 2**20  # bytes of what is not tensors
MAX_TENSORS = 50_000


class InertObject:
    """In the place of a foreign object: it holds what that was made of, and does nothing with it."""

    state: Any = ()

    def __new__(cls, *args: Any) -> "InertObject":
        made = super().__new__(cls)
        made.state = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


VERSION_CLASSES = (  # what a version is made of in a pickle, by any release of `packaging`
    "packaging.version.Version",
    "packaging.version._Version",
    "packaging._structures.InfinityType",
    "packaging._structures.NegativeInfinityType",
)


@dataclass
class DALLE2File:
    """state: tensors by DALLE2-pytorch's names. taken: which of the file's it is. release: that wrote it, such as
    (1, 1, 0), None if the file does not say. config: the configuration in it, None if it has none."""

    state: dict[str, Tensor]
    weights_name: str
    release: tuple[int, ...] | None
    config: dict[str, Any] | None


def read_dalle2_file(path: Path) -> DALLE2File:
    """A file of a prior or a decoder: the averaged weights, if it has them. Its tensors are mapped, not read.

    Raises InputError, in one line, for anything else.
    """
    check_size_limit(path, MAX_FILE_SIZE)
    check_torch_archive(path)
    try:
        unknown = sorted(set(get_unsafe_globals_in_checkpoint(path)) - set(VERSION_CLASSES))
    except Exception as error:  # whatever torch makes of a damaged file
        raise InputError(f"{str(path)!r} does not load: {format_error(error).splitlines()[0]}") from error
    if unknown:
        allowed = "only tensors, plain containers and a version are"
        raise InputError(f"{str(path)!r} holds a {unknown[0]:.80}, which is not loaded; {allowed}")
    found = read_pickle(path, tuple((InertObject, name) for name in VERSION_CLASSES))
    if not isinstance(found, dict):
        raise InputError(f"{str(path)!r} holds a {type(found).__name__}, not a model's tensors by name")
    state, taken = select_averaged_weights(found)
    wrong = [name for name, one in state.items() if not isinstance(name, str) or not is_plain_tensor(one)]
    if wrong or not state or len(state) > MAX_TENSORS:
        fault = f"{wrong[0]!r:.80} in it is no plain tensor" if wrong else f"it has {len(state):,} of them"
        raise InputError(f"{str(path)!r} should hold a model's tensors by name; {fault}")
    config = found.get("config")
    return DALLE2File(
        state, taken, find_pickled_release(found.get("version")), config if isinstance(config, dict) else None
    )


def check_torch_archive(path: Path) -> None:
    """Refuse what is not stored as torch stores, uncompressed: no small file becomes a large one."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{str(path)!r} is no file of torch.save, of release 1.6 or newer ({error})") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{str(path)!r} is compressed, which torch.save's files are not")
    if (
        size := max((one.file_size for one in entries if one.filename.endswith("data.pkl")), default=0)
    ) > MAX_PICKLE_SIZE:
        raise InputError(f"{str(path)!r} has {size:,} bytes beside its tensors; no such file needs that")


def is_plain_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def select_averaged_weights(found: dict) -> tuple[dict[str, Tensor], str]:
    """The weights of a file, averaged ones before others, and what it calls them."""
    plain = found["model"] if isinstance(found.get("model"), dict) else {}
    if isinstance(found.get("ema_model"), dict):  # of a prior
        return found["ema_model"], "ema_model"
    if isinstance(found.get("ema"), dict):
        averaged = {}
        for name, tensor in found["ema"].items():
            if match := re.fullmatch(r"(?:(\d+)\.)?ema_model\.(.+)", str(name)):  # of a decoder, one each U-Net
                averaged[f"unets.{match[1]}.{match[2]}" if match[1] else match[2]] = tensor
        if averaged:
            return {**plain, **averaged}, "ema"
    if plain:
        return plain, "model"
    return found, "the tensors"


def find_pickled_release(version: Any) -> tuple[int, ...] | None:
    """(1, 15, 6) of a version, as text or as it was pickled by any release of `packaging`."""
    if isinstance(version, str):
        return parse_release(version)
    return next(iterate_releases(version), None)


def iterate_releases(value: Any) -> Iterator[tuple[int, ...]]:
    """Every tuple of integers in a stand-in."""
    if isinstance(value, InertObject):
        yield from iterate_releases(value.state)
    elif isinstance(value, tuple | list):
        if len(value) > 1 and all(isinstance(one, int) for one in value):
            yield tuple(value)
        else:
            for one in value:
                yield from iterate_releases(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from iterate_releases(one)


def parse_release(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,3}", text):
        raise InputError(f"a release of DALLE2-pytorch is such as 1.1.0, got {text!r:.80}")
    return tuple(int(part) for part in text.split("."))
