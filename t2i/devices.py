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
