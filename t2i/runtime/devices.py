"""The device a command computes on, and the precision that is fast there."""

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
    """Return the name of an available device; "auto" is a GPU if there is one, else the CPU.

    Raises InputError if the device is not available.
    """
    family, colon, index = name.partition(":")
    check_choice("device", family, ("auto", "cpu", "cuda", "mps"))
    available = find_available_devices()
    if name == "auto":
        return available[0]
    # Of all devices only CUDA's are numbered
    numbered = family == "cuda" and index in map(str, range(torch.cuda.device_count()))
    if family not in ("auto", *available) or (colon and not numbered):
        raise InputError(f"device {name!r:.80} is not available here; `t2i doctor` lists the devices")
    return name


def can_compute_bf16(device: str) -> bool:
    """Return True if the hardware computes in bf16 itself, without converting to fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.startswith("mps"):
        # Metal has bf16 since macOS 14, on every Apple chip.
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device == "cpu" and has_bf16_instructions()


def has_bf16_instructions() -> bool:
    """Return True if the CPU has instructions for bf16 products: AVX512-BF16, AMX, or ARM's bf16."""
    if platform.machine().lower() not in ("arm64", "aarch64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if (flags := Path("/proc/cpuinfo")).is_file():
        return re.search(r"^Features\s*:.*\bbf16\b", flags.read_text(), re.MULTILINE) is not None
    # The oldest supported torch lacks the function.
    get_capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)
    return bool(get_capabilities().get("bf16"))


def choose_training_precision(device: str) -> str:
    """Return accelerate's name of a training precision: "bf16" if fast, "fp16" on older GPUs, else "no" (fp32)."""
    if device in ("cuda", "cpu") and can_compute_bf16(device):
        return "bf16"
    return "fp16" if device == "cuda" else "no"


def check_bf16_support(device: str | None = None) -> None:
    """Raise InputError if the device, or for None every device of this machine, lacks bf16 instructions."""
    if not any(map(can_compute_bf16, [device] if device else find_available_devices())):
        name = f"device {device!r}" if device else "this machine"
        raise InputError(f"dtype bfloat16 needs bfloat16 instructions, which {name} lacks; float32 is faster here")


def find_available_devices() -> list[str]:
    """Return the kinds of devices of this machine, fastest first."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind in available if available[kind]]


def warn_of_slow_bf16(parts: Mapping[str, Any]) -> None:
    """Log a warning if parts were stored in bf16 and no device of this machine computes in it."""
    slow = ", ".join(name for name, part in parts.items() if getattr(part, "dtype", None) == torch.bfloat16)
    if slow and not any(map(can_compute_bf16, find_available_devices())):
        logger.warning(
            "%s: stored in bfloat16, which is slow on this machine; dtype=torch.float32 (--dtype fp32) is faster", slow
        )
