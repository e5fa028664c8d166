"""Checks of what any pipeline is called with, before the call begins: texts, and names of image files."""

import logging
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
NEEDED_ARGUMENTS = {  # the argument without which one has no effect
    "upsample_steps": "upsample",
    "upsample_level": "upsample",
    "preview_every": "on_preview",
    "callback_on_step_end_tensor_inputs": "callback_on_step_end",
    "prior_callback_on_step_end_tensor_inputs": "prior_callback_on_step_end",
}
REPLACED_ARGUMENTS = {"frames": "weights"}  # the argument beside which one has no effect

logger = logging.getLogger(__name__)


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


def warn_of_unused_arguments(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Log which arguments have no effect, for the one that they go with is not given, or one is that replaces them.

    arguments: those that were given; one with its default value is not named.
    """
    given = {name for name, value in arguments.items() if value is not None and value is not defaults.get(name)}
    changed = {name for name in given if not is_same(arguments[name], defaults.get(name))}
    for name, other in NEEDED_ARGUMENTS.items():
        if name in changed and other not in given:
            logger.warning("%s has no effect without %s", name, other)
    for name, other in REPLACED_ARGUMENTS.items():
        if name in changed and other in given:
            logger.warning("%s has no effect beside %s", name, other)
    if "image_embeds" in given and "decoder_negative_prompt" not in given:
        for name in sorted(name for name in changed if name.startswith("prior_")):
            logger.warning("%s has no effect beside image_embeds, in place of which the prior would run", name)


def is_same(value: Any, default: Any) -> bool:
    """Return whether a number, text or truth value is the default."""
    return type(value) is type(default) and isinstance(value, int | float | str) and value == default


def check_picture_file(name: str, path: str | Path) -> None:
    """Refuse a name of no file."""
    try:
        is_file = Path(path).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null character
        is_file = False
    if not is_file:
        raise InputError(f"{name} {str(path)!r:.200} is no file; give an image or the path of one")
