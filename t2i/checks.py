"""Checks of single values. Each raises an InputError of one line: the name, what is allowed, and the value."""

import math
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from t2i.errors import InputError
from t2i.texts import normalize_text

MAX_TEXT_CHARACTERS = 4096
# Suffixes of files for which a folder is mistaken. Others may end a folder's name: runs/v1.5, 2026.12
FILE_SUFFIXES = frozenset({
    ".avif", ".bin", ".bmp", ".ckpt", ".csv", ".gif", ".heic", ".jpeg", ".jpg", ".json", ".jsonl", ".jxl", ".mov",
    ".mp4", ".parquet", ".pdf", ".png", ".pt", ".pth", ".safetensors", ".svg", ".tar", ".tif", ".tiff", ".txt",
    ".webm", ".webp", ".yaml", ".yml", ".zip",
})  # fmt: skip


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """Refuse anything but an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:  # NumPy's too
        raise InputError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Refuse anything but a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):  # Real: numpy's numbers too
        raise InputError(f"{name} must be a number from {low:g} to {high:g}, got {value!r:.80}")
    if not low <= float(value) <= high:
        raise InputError(f"{name} must be from {low:g} to {high:g}, got {value}")


def check_multiple_of(name: str, value: int, divisor: int) -> None:
    """Refuse an integer that `divisor` does not divide."""
    if value % divisor:
        raise InputError(f"{name} must be a multiple of {divisor}, got {value}")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Refuse a value that is not among `choices`."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def check_folder_name(name: str, folder: Path, advice: str = "give a folder") -> None:
    """Refuse a folder that is yet to be made and has the suffix of a file."""
    if folder.suffix.lower() in FILE_SUFFIXES and not folder.is_dir():
        raise InputError(f"{name} is {str(folder)!r}, but {folder.suffix} is the suffix of a file; {advice}")


def check_required_keys(name: str, value: dict[str, Any], required: tuple[str, ...]) -> None:
    """Refuse a mapping without all of the `required` keys."""
    if missing := [key for key in required if key not in value]:
        raise InputError(f"{name} lacks {', '.join(missing)}; it needs {', '.join(required)}")


def check_texts(name: str, texts: Any, empty: bool = True) -> None:
    """Refuse anything but a list of texts of valid characters, at most 4096 each; `empty`: empty texts are allowed."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} must be a text or a list of texts, got {texts!r:.80}")
    for text in texts:
        # Lone surrogates: Python's stand-ins for bytes of the command line that are not UTF-8
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{name} is not valid text (it was not UTF-8), got {text!r:.80}")
        if not empty and not any(character.isprintable() for character in normalize_text(text)):
            raise InputError(f"{name} must not be empty, got {text!r}")
        if len(text) > MAX_TEXT_CHARACTERS:
            start = f"{text[:40]!r}..."
            raise InputError(f"{name} must have at most {MAX_TEXT_CHARACTERS} characters, got {len(text)}: {start}")
