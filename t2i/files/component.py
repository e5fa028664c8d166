"""A component of a public model: a folder as diffusers or transformers writes it, checked before it is read.

Its tensors go one by one onto a model that was made without memory, so that no second copy of a component is held.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor
from torch.nn import Module

from t2i.errors import InputError
from t2i.files.model_folder import iterate_stored_tensors
from t2i.files.untrusted import (
    TensorSpec,
    bounded_meta_device,
    check_finite_weights,
    check_folder_files,
    check_tensor_specs,
    find_weight_files,
    is_folder,
    read_config,
    read_safetensors_header,
)

Model = TypeVar("Model", bound=Module)
NameMapping = Callable[[str], str]


class Component:
    """A model's folder: `config`, what its config.json says, and `tensor_specs`, its tensors by name.

    Args:
        folder: with config.json and safetensors.
        root: the pipeline's folder, which links may lead into.
        variant: such as "fp16", of the files' names; where there are none of it, the plain ones.
        stem: of the files' names; "diffusion_pytorch_model" is diffusers', "model" is transformers'.

    Raises InputError, in one line, for a folder that is missing, damaged, or holds pickles or code.
    """

    def __init__(
        self,
        folder: Path,
        root: Path | None = None,
        variant: str | None = None,
        stem: str = "diffusion_pytorch_model",
    ):
        if not is_folder(folder):
            raise InputError(f"no folder {folder.name!r} in {str(folder.parent)!r}; the model is not whole")
        self.folder, self.root = folder, root
        check_folder_files(folder, root)
        self.config = read_config(folder / "config.json")
        headers = {path: read_safetensors_header(path) for path in find_weight_files(folder, variant, stem)}
        self.files = {name: path for path, header in headers.items() for name in header}
        self.tensor_specs: dict[str, TensorSpec] = {
            name: one for header in headers.values() for name, one in header.items()
        }

    def get_config_arguments(self) -> dict[str, Any]:
        """The configuration without what is said of the file, as arguments of a class."""
        return {key: value for key, value in self.config.items() if not key.startswith("_")}

    def iterate_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each tensor by name; floating-point ones in `dtype`, if one is given, and else as they are stored."""
        for path in dict.fromkeys(self.files.values()):
            yield from iterate_stored_tensors(path, dtype)


def load_from_components(
    make: Callable[[], Model],
    parts: dict[str, Component],
    dtype: torch.dtype | None = None,
    rename: NameMapping | None = None,
    extra: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> Model:
    """The model of `make` with the parts' tensors, each under its prefix, such as "unet."; frozen in eval mode.

    dtype: of floating-point tensors, as they are stored if None. rename: of a prefixed name to the model's. extra: of
    the model's buffers, those that no file holds and that stay as they are made. unused: tensors of older files, with
    their prefix, that no model needs. Nothing of the model's size is made before its tensors are known to fit.

    Raises InputError, in one line, for tensors that are missing, unknown, misshapen or not finite.
    """
    held: dict[str, TensorSpec] = {}
    homes: dict[str, Component] = {}
    for prefix, part in parts.items():
        for name, stored in part.tensor_specs.items():
            if prefix + name not in unused:
                ours = rename(prefix + name) if rename else prefix + name
                held[ours], homes[ours] = stored, part
    folder = next(iter(parts.values())).folder
    with bounded_meta_device(held, folder):
        wanted = make().state_dict()
    wanted = {name: tensor for name, tensor in wanted.items() if name not in extra}
    for prefix, part in parts.items():  # one by one, for the message to name the folder
        mine = {name: held[name] for name, home in homes.items() if home is part}
        asked = {
            name: one for name, one in wanted.items() if name in mine or (name.startswith(prefix) and name not in homes)
        }
        check_tensor_specs(asked, mine, part.folder)
    with init_empty_weights(include_buffers=False):
        model = make()
    for prefix, part in parts.items():
        for name, tensor in part.iterate_tensors(dtype):
            if prefix + name not in unused:
                ours = rename(prefix + name) if rename else prefix + name
                set_module_tensor_to_device(model, ours, "cpu", tensor, tensor.dtype)
    stored_as = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    for name in extra:
        buffer = model.get_buffer(name)
        if buffer.is_floating_point():
            set_module_tensor_to_device(model, name, "cpu", buffer, stored_as)
    check_finite_weights(model, folder)
    return model.eval().requires_grad_(False)


def read_model_index(folder: Path) -> dict[str, Any]:
    """What the model_index.json of a pipeline's folder says; empty if there is none."""
    index = folder / "model_index.json"
    return read_config(index) if index.is_file() else {}


def to_json_types(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON holds it: lists, no tuples."""
    return json.loads(json.dumps(config))
