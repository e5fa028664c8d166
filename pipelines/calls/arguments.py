"""Checks of what any pipeline is called with, before the call begins: texts, and names of image files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from t2i.checks import check_texts
from t2i.errors import InputError
from t2i.texts import wrap_text

TEXT_ARGUMENTS = ("prompt", "negative_prompt", "decoder_negative_prompt", "source", "target")
PICTURE_ARGUMENTS = ("image", "mask_image", "control_image")


def check_call_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse, by the arguments' names, what is no text and what is no image. Raises InputError."""
    for name in TEXT_ARGUMENTS:
        if (value := arguments.get(name)) is not None:
            if isinstance(value, Image.Image | np.ndarray | Tensor):
                kind = type(value).__name__
                raise InputError(f"{name} must be a text, got an image ({kind}); give both by name, image=... first")
            check_texts(name, wrap_text(value))
    for name in PICTURE_ARGUMENTS:
        value = arguments.get(name)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, str | Path):
                check_picture_file(name, item)


def check_picture_file(name: str, path: str | Path) -> None:
    """Refuse a name of no file."""
    try:
        is_file = Path(path).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null character
        is_file = False
    if not is_file:
        raise InputError(f"{name} {str(path)!r:.200} is no file; give an image or the path of one")
