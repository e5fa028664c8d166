"""Checks of what any pipeline is called with, before the call begins."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from t2i.errors import InputError

TEXT_ARGUMENTS = ("prompt", "negative_prompt", "decoder_negative_prompt", "source", "target")


def check_argument_order(arguments: Mapping[str, Any]) -> None:
    """Refuse images in the place of texts, by the arguments' names. Raises InputError.

    Other values are checked where they are read. These are checked before, for the text in the place of the image would
    be taken for a file's name.
    """
    for name in TEXT_ARGUMENTS:
        value = arguments.get(name)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Image.Image | np.ndarray | Tensor):
                kind = type(item).__name__
                raise InputError(f"{name} must be a text, got an image ({kind}); give both by name, image=... first")
