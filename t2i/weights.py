"""Weights from safetensors files onto models that were made without memory, so that no second copy of them is held."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from torch.nn import Module

from t2i.untrusted import read_config, weight_files

AT_ONCE = 2**22  # bytes of a file that are converted before it is mapped anew


def stored_tensors(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a safetensors file by name; floating-point ones in `dtype`, if one is given, others as stored.

    What keeps its dtype stays mapped, and is read from the disk when it is first used. What is converted was read
    through the mapping, and pages that were read count as memory as long as the file is mapped.
    """
    with safe_open(path, "pt") as file:
        left = list(reversed(file.offset_keys()))
    while left:
        with safe_open(path, "pt") as file:
            read = 0
            while left and read < AT_ONCE:
                name = left.pop()
                tensor = file.get_tensor(name)
                if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    read += tensor.nbytes
                    tensor = tensor.to(dtype)
                yield name, tensor
                del tensor


def read_model(
    kind: Any, folder: Path, dtype: torch.dtype | None = None, variant: str | None = None, root: Path | None = None
) -> Any:
    """What `kind.from_pretrained(folder)` gives, in eval mode, of a folder that `check_model` has passed.

    dtype: None is float32. root: the pipeline's folder, which links may lead into. diffusers' own holds a file's pages
    beside the model: half as much again where half precision becomes single.
    """
    dtype = dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(read_config(folder / "config.json"))
    held = {name: one for path in weight_files(folder, variant) for name, one in stored_tensors(path, dtype)}
    model.load_state_dict(held, assign=True)
    Module.to(model, dtype)  # buffers that no file holds; diffusers' own `to` warns, whatever the model
    model.register_to_config(_name_or_path=str(folder))
    if hasattr(model, "read_beside"):
        model.read_beside(folder, root or folder)
    return model.eval()
