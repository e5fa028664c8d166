"""Read the files (.pth) of DALLE2-pytorch's trainers, and select the tensors to convert.

They are pickles, which could run any code. torch's `weights_only` reader makes tensors and plain containers alone, and
an inert stand-in for the version that wrote the file. All else is refused.
"""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.errors import InputError
from t2i.files.untrusted import check_size_limit
from t2i.interop.pickles import read_pickle

MAX_FILE_SIZE = 64 * 2**30  # bytes; the largest published file has a tenth of it
MAX_PICKLE_SIZE = 64 * 2**20  # bytes of what is not tensors
MAX_TENSORS = 50_000


class InertObject:
    """A stand-in for a foreign object. It stores what the object was made of, and does nothing with it."""

    state: Any = ()

    def __new__(cls, *args: Any) -> "InertObject":
        stand_in = super().__new__(cls)
        stand_in.state = args
        return stand_in

    def __setstate__(self, state: Any) -> None:
        self.state = state


VERSION_CLASSES = (  # the classes of a version in a pickle, in any release of `packaging`
    "packaging.version.Version",
    "packaging.version._Version",
    "packaging._structures.InfinityType",
    "packaging._structures.NegativeInfinityType",
)


@dataclass
class DALLE2File:
    """The content of the file at `path`.

    state: tensors by DALLE2-pytorch's names. weights_name: the file's name for them, such as "ema_model". release: the
    one that wrote the file, such as (1, 1, 0), None if it is not stored. config: configuration of the training, None
    without one.
    """

    path: Path
    state: dict[str, Tensor]
    weights_name: str
    release: tuple[int, ...] | None
    config: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The path in quotes, for messages."""
        return repr(str(self.path))


def read_dalle2_file(path: Path) -> DALLE2File:
    """Read a prior or a decoder, with the averaged weights, if it has them. The tensors are mapped, not read.

    Raises InputError for anything else.
    """
    # Look at the file before anything is unpickled
    check_size_limit(path, MAX_FILE_SIZE)
    check_torch_archive(path)
    content = read_pickle(path, tuple((InertObject, name) for name in VERSION_CLASSES))
    # Select the tensors
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} holds a {type(content).__name__}, not a model's tensors by name")
    state, weights_name = select_averaged_weights(content)
    wrong = [name for name, tensor in state.items() if not isinstance(name, str) or not is_plain_tensor(tensor)]
    if wrong or not state or len(state) > MAX_TENSORS:
        fault = f"{wrong[0]!r:.80} in it is no plain tensor" if wrong else f"it has {len(state):,} of them"
        raise InputError(f"{str(path)!r} should hold a model's tensors by name; {fault}")
    config = content.get("config")
    version = content.get("version")
    release = parse_release(version) if isinstance(version, str) else next(iterate_releases(version), None)
    return DALLE2File(path, state, weights_name, release, config if isinstance(config, dict) else None)


def check_torch_archive(path: Path) -> None:
    """Raise InputError for a file that torch.save did not write; a compressed one could become very large."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{str(path)!r} is no file of torch.save, of release 1.6 or newer ({error})") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{str(path)!r} is compressed, which torch.save's files are not")
    size = max((entry.file_size for entry in entries if entry.filename.endswith("data.pkl")), default=0)
    if size > MAX_PICKLE_SIZE:
        raise InputError(f"{str(path)!r} has {size:,} bytes beside its tensors; at most {MAX_PICKLE_SIZE:,} are read")


def is_plain_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def select_averaged_weights(content: dict) -> tuple[dict[str, Tensor], str]:
    """Return the weights of a file, the averaged ones if it has them, and the file's name for them."""
    plain = content["model"] if isinstance(content.get("model"), dict) else {}
    if isinstance(content.get("ema_model"), dict):  # a prior's
        return content["ema_model"], "ema_model"
    if isinstance(content.get("ema"), dict):  # a decoder's, with an average for each U-Net
        averaged = {}
        for name, tensor in content["ema"].items():
            if match := re.fullmatch(r"(?:(\d+)\.)?ema_model\.(.+)", str(name)):
                averaged[f"unets.{match[1]}.{match[2]}" if match[1] else match[2]] = tensor
        if averaged:
            return {**plain, **averaged}, "ema"
    if plain:
        return plain, "model"
    return content, "the tensors"


def iterate_releases(value: Any) -> Iterator[tuple[int, ...]]:
    """Yield every tuple of integers in a version as any release of `packaging` pickled it, such as (1, 15, 6)."""
    if isinstance(value, InertObject):
        yield from iterate_releases(value.state)
    elif isinstance(value, tuple | list) and len(value) > 1 and all(isinstance(part, int) for part in value):
        yield tuple(value)
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from iterate_releases(part)


def parse_release(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,3}", text):
        raise InputError(f"a release of DALLE2-pytorch is such as 1.1.0, got {text!r:.80}")
    return tuple(int(part) for part in text.split("."))


def require_file_release(file: DALLE2File, feature: str) -> tuple[int, ...]:
    """Return the release that trained a model. Raises InputError if it is not known."""
    if file.release is None:
        hint = "but no release of DALLE2-pytorch; give the one that trained it, as --release 1.1.0"
        raise InputError(f"{file.name} has {feature}, {hint}")
    return file.release


def format_release(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
