"""dalle2-pytorch itself, for the tests to compare with.

How it is imported, and why with stand-ins, is said in `benchmarks/peers.py`.
"""

import os
from typing import Any

import diffusers  # noqa: F401  (before the stand-ins: it looks for some of those libraries)
import pytest
import torch
from torch import Tensor

from benchmarks.peers import import_dalle2_pytorch
from t2i.errors import InputError


def reference() -> Any:
    """The module `dalle2_pytorch.dalle2_pytorch`; where it is not installed, the tests that ask are skipped, or fail if
    T2I_REFERENCE=required says so."""
    try:
        return import_dalle2_pytorch()
    except InputError as missing:
        if os.environ.get("T2I_REFERENCE") == "required":
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))


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
