"""Which device a command computes on."""

import logging
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from t2i.checks import check_choice
from t2i.errors import InputError

logger = logging.getLogger(__name__)


def resolve_device_name(name: str) -> str:
    """A device by its name; "auto" takes a GPU if there is one. Raises InputError for one that is not here."""
    family, colon, index = name.partition(":")
    check_choice("device", family, ("auto", "cpu", "cuda", "mps"))
    available = find_available_devices()
    if name == "auto":
        return available[0]
    numbered = family == "cuda" and index in map(str, range(torch.cuda.device_count()))
    if family not in ("auto", *available) or (colon and not numbered):
        raise InputError(f"device {name!r:.80} is not available here; `t2i doctor` tells what is")
    return name


def can_compute_bf16(device: str) -> bool:
    """Whether the hardware does so by itself, and not by going through fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.startswith("mps"):
        return torch.backends.mps.is_macos_or_newer(14, 0)  # Metal's own since then, on all of Apple's chips
    return device == "cpu" and has_bf16_instructions()


def has_bf16_instructions() -> bool:
    """Whether it has instructions for products of bf16: AVX512-BF16 or AMX, or ARM's."""
    if platform.machine().lower() not in ("arm64", "aarch64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if (flags := Path("/proc/cpuinfo")).is_file():
        return re.search(r"^Features\s*:.*\bbf16\b", flags.read_text(), re.MULTILINE) is not None
    asked: Any = getattr(torch.cpu, "get_capabilities", dict)  # not in the oldest torch that will do
    return bool(asked().get("bf16"))


def choose_training_precision(device: str) -> str:
    """For training: bf16 where the hardware computes in it, fp16 on older GPUs, else fp32."""
    if device in ("cuda", "cpu") and can_compute_bf16(device):
        return "bf16"
    return "fp16" if device == "cuda" else "no"


def check_bf16_support(device: str | None = None) -> None:
    """Raises InputError where this device, or for None nothing that is here, computes in bf16."""
    if not any(can_compute_bf16(one) for one in ([device] if device else find_available_devices())):
        what = f"the device {device!r}" if device else "this machine"
        raise InputError(f"dtype bfloat16 is not what {what} computes in; leave it: float32 is faster here")


def find_available_devices() -> list[str]:
    """The kinds of devices."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, available in there.items() if available]


def warn_of_slow_bf16(parts: Mapping[str, Any]) -> None:
    """A line in the log where parts came in bf16, for so their files are, and nothing here computes in it."""
    slow = [name for name, part in parts.items() if getattr(part, "dtype", None) == torch.bfloat16]
    if slow and not any(map(can_compute_bf16, find_available_devices())):
        what = f"{', '.join(slow)} came in bfloat16, which this machine computes slowly, by way of float32"
        logger.warning("%s; dtype=torch.float32 (--dtype fp32) is faster here", what)
