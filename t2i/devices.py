"""Which device a command computes on."""

import torch

from t2i.config import check_choice
from t2i.errors import InputError


def find_device(name: str) -> str:
    """A device by its name; "auto" takes a GPU if there is one. Raises InputError for one that is not here."""
    family, colon, index = name.partition(":")
    check_choice("device", family, ("auto", "cpu", "cuda", "mps"))
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    numbered = family == "cuda" and index.isdigit() and int(index) < torch.cuda.device_count()
    if not available.get(family, True) or (colon and not numbered):
        raise InputError(f"device {name!r} is not available here; `t2i doctor` tells what is")
    return name


def computes_in_bf16(device: str) -> bool:
    """Whether the hardware does so by itself, and not by going through fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def check_bf16(device: str | None = None) -> None:
    """Raises InputError where this device, or for None neither a GPU nor the processor, does not compute in bf16."""
    here = [device] if device else (["cuda"] if torch.cuda.is_available() else []) + ["cpu"]
    if not any(computes_in_bf16(one) for one in here):
        what = f"the device {device!r}" if device else "this machine"
        raise InputError(f"dtype bfloat16 is not what {what} computes in; leave it: float32 is faster here")
