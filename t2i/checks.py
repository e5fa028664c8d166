"""Check_integer, check_range, check_choice, ...."""

import math
from typing import Any

from t2i.errors import InputError

MAX_TEXT_CHARACTERS = 4096


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high], NaN included."""
    if isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{name} must be from {low:g} to {high:g}, got {value}")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def check_multiple_of(name: str, value: int, of: int) -> None:
    if value % of:
        raise InputError(f"{name} must be a multiple of {of}, got {value}")


def check_required_keys(name: str, value: dict[str, Any], needed: tuple[str, ...]) -> None:
    if missing := [key for key in needed if key not in value]:
        raise InputError(f"{name} lacks {', '.join(missing)}; it needs {', '.join(needed)}")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    if not low <= value <= high:
        raise InputError(f"{name} must be from {low:g} to {high:g}, got {value}")


def check_texts(name: str, texts: Any, empty: bool = True) -> None:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} must be a text or a list of texts, got {texts!r:.80}")
    for text in texts:
        if not empty and not text.strip():
            raise InputError(f"{name} must not be empty, got {text!r}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{name} is not valid text (it was not UTF-8), got {text!r:.80}")
        if len(text) > MAX_TEXT_CHARACTERS:
            raise InputError(
                f"{name} must have at most {MAX_TEXT_CHARACTERS} characters, got {len(text)}: {text[:40]!r}..."
            )
