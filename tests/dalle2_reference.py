"""dalle2-pytorch itself, for the tests to compare with.

It is installed without its dependencies (see the Makefile): it asks for an older open_clip than this project has, and
for libraries that neither its models nor these tests use. Those that are absent are stood in for by empty modules.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from typing import Any

import diffusers  # noqa: F401  (before the stand-ins: it looks for some of those libraries)
import pytest
import torch
from torch import Tensor

NEEDED = ("dalle2_pytorch", "einops", "rotary_embedding_torch")
UNUSED = {  # modules that are imported at its start, and the names that are taken from them
    "kornia": (),
    "kornia.filters": ("gaussian_blur2d",),
    "kornia.augmentation": (),
    "vector_quantize_pytorch": ("VectorQuantize",),
    "resize_right": ("resize",),
    "x_clip": ("CLIP",),
    "coca_pytorch": ("CoCa",),
    "pytorch_warmup": (),
    "ema_pytorch": ("EMA",),
}


def reference() -> Any:
    """The module `dalle2_pytorch.dalle2_pytorch`; the tests that ask are skipped where it is not installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: `make test` installs what is compared with here")
    absent = [name for name in UNUSED if importlib.util.find_spec(name.split(".")[0]) is None]
    for name in absent:
        module: Any = types.ModuleType(name)
        module.__path__ = []
        for part in UNUSED[name]:
            setattr(module, part, type(part, (), {}))
        sys.modules[name] = module
        if "." in name:
            setattr(sys.modules[name.split(".")[0]], name.split(".")[1], module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("dalle2_pytorch.dalle2_pytorch")
    finally:
        for name in absent:
            del sys.modules[name]


def randomised(model: torch.nn.Module, seed: int = 0) -> Any:
    """Every parameter random, those too that start at zero or one; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "freqs" in name:
            continue
        if name.endswith((".g", "norm.weight")):  # gains
            noise = 1 + 0.2 * noise
        elif parameter.ndim < 2:
            noise = 0.2 * noise
        elif "null" not in name and "embed" not in name and "bias.weight" not in name:
            noise = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(noise)
    return model.eval()


class Replay:
    """torch.randn and torch.randn_like that return what is given, one after the other."""

    def __init__(self, noises: list[Tensor]):
        self.noises = list(noises)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.noises.pop(0).clone()
