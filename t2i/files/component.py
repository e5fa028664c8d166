"""Read a model's folder, as diffusers or transformers writes it, into a model of ours.

Its tensors go one by one onto a model that was made without memory, so that no second copy of the model exists.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor
from torch.nn import Module

from t2i.errors import InputError
from t2i.files.untrusted import (
    DIFFUSERS_STEM,
    FLOAT_DTYPES,
    TensorSpec,
    bounded_meta_device,
    check_finite_weights,
    check_folder_files,
    check_tensor_specs,
    choose_stored_variant,
    find_weight_files,
    is_folder,
    read_config,
    read_safetensors_header,
)

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Module)
DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
CHUNK_BYTES = 2**22  # of a file, that are converted before it is mapped again


class Component:
    """A model's folder with its configuration and the headers of its weights, each read once.

    folder: place of config.json and safetensors. root: the pipeline's folder, which links may lead into. variant, stem:
    of the file names, see `find_weight_files`.

    `config` is the content of config.json; `variant` is that of the files which are read, None for the plain ones;
    `tensor_specs` and `files` are the specification and the file of each tensor by name.

    Raises InputError, in one line, for a folder that is missing, damaged, or holds pickles or code.
    """

    def __init__(self, folder: Path, root: Path | None = None, variant: str | None = None, stem: str = DIFFUSERS_STEM):
        if not is_folder(folder):
            raise InputError(f"no folder {folder.name!r} in {str(folder.parent)!r}; the model is incomplete")
        self.folder, self.root = folder, root
        check_folder_files(folder, root)
        self.config = read_config(folder / "config.json")
        # A header alone has every tensor's shape: nothing of a tensor is read here.
        self.files: dict[str, Path] = {}
        self.tensor_specs: dict[str, TensorSpec] = {}
        self.variant = choose_stored_variant(folder, variant, stem)
        if variant is None and self.variant is not None:
            logger.warning("%s has its weights in the variant %s alone, which is used", folder, self.variant)
        for path in find_weight_files(folder, self.variant, stem):
            header = read_safetensors_header(path)
            self.tensor_specs |= header
            self.files |= dict.fromkeys(header, path)

    def get_config_arguments(self) -> dict[str, Any]:
        """Return the configuration as arguments of its class, without the keys that describe the file."""
        return {key: value for key, value in self.config.items() if not key.startswith("_")}

    def find_stored_dtype(self) -> torch.dtype | None:
        """Return the floating-point dtype that most values are stored in, None without any."""
        sizes: Counter[torch.dtype] = Counter()
        for spec in self.tensor_specs.values():
            if spec.dtype in FLOAT_DTYPES:
                sizes[FLOAT_DTYPES[spec.dtype]] += math.prod(spec.shape)
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None

    def check_model(self, model_class: Any) -> None:
        """Raise InputError for tensors that are not those of a `model_class` with this configuration."""
        with bounded_meta_device(self.tensor_specs, self.folder):
            model = model_class.from_config(self.config)
        check_tensor_specs(model.state_dict(), self.tensor_specs, self.folder)

    def iterate_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor with its name; floating-point ones in `dtype`, or as they are stored if it is None."""
        for path in dict.fromkeys(self.files.values()):
            yield from iterate_stored_tensors(path, dtype)


class TensorComponent(Component):
    """Tensors in memory in the place of a model's folder. folder: place that they come from, for messages."""

    def __init__(self, tensors: dict[str, Tensor], folder: Path):
        self.tensors, self.folder = tensors, folder
        self.tensor_specs = {
            name: TensorSpec(DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }

    def iterate_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors.items():
            yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def iterate_stored_tensors(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a safetensors file; floating-point ones in `dtype`, or as they are stored if it is None.

    A tensor that keeps its dtype stays mapped, and is read from the disk when it is first used.
    """
    # In the order of the file, so that a disk reads it from beginning to end
    with safe_open(path, "pt") as file:
        left = list(reversed(file.offset_keys()))
    # Pages that were read count as memory while the file is mapped, so a conversion maps it again from time to time.
    while left:
        with safe_open(path, "pt") as file:
            converted = 0
            while left and converted < CHUNK_BYTES:
                name = left.pop()
                tensor = file.get_tensor(name)
                if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    converted += tensor.nbytes
                    tensor = tensor.to(dtype)
                yield name, tensor
                del tensor


def load_from_components(
    make: Callable[[], Model],
    parts: dict[str, Component],
    dtype: torch.dtype | None = None,
    rename: Callable[[str], str] = str,
    extra: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> Model:
    """Build a model with `make` and fill it with the tensors of its components, frozen and in eval mode.

    parts: components by the prefix of their tensors in the model, such as "unet.". dtype: data type of floating-point
    tensors; None is as they are stored. rename: maps a prefixed name to the model's; the default keeps it. extra:
    buffers of the model that no file holds, which stay as they are made. unused: prefixed names of tensors in older
    files, which no model needs.

    Raises InputError, in one line, for tensors that are missing, unknown, misshapen or not finite. Nothing of the
    model's size is allocated before its tensors are known to fit.
    """
    # Compare the tensors of the files with those of the model
    stored: dict[str, TensorSpec] = {}
    stored_by_prefix: dict[str, dict[str, TensorSpec]] = {}
    for prefix, part in parts.items():
        used = {name: spec for name, spec in part.tensor_specs.items() if prefix + name not in unused}
        stored_by_prefix[prefix] = {rename(prefix + name): spec for name, spec in used.items()}
        stored |= stored_by_prefix[prefix]
    folder = next(iter(parts.values())).folder
    with bounded_meta_device(stored, folder):
        expected = {name: tensor for name, tensor in make().state_dict().items() if name not in extra}
    # One component at a time, so that the message names its folder. The prefix shows whose a missing tensor is.
    for prefix, part in parts.items():
        own = stored_by_prefix[prefix]
        names = [name for name in expected if name in own or (name.startswith(prefix) and name not in stored)]
        check_tensor_specs({name: expected[name] for name in names}, own, part.folder)

    # Fill the model
    with init_empty_weights(include_buffers=False):
        model = make()
    for prefix, part in parts.items():
        for name, tensor in part.iterate_tensors(dtype):
            if prefix + name not in unused:
                set_module_tensor_to_device(model, rename(prefix + name), "cpu", tensor, tensor.dtype)
    # Buffers that no file holds get the dtype of the weights
    model_dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    for name in extra:
        buffer = model.get_buffer(name)
        if buffer.is_floating_point():
            set_module_tensor_to_device(model, name, "cpu", buffer, model_dtype)
    check_finite_weights(model, folder)
    return model.eval().requires_grad_(False)


def to_json_types(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON would store it: with lists instead of tuples."""
    return json.loads(json.dumps(config))
