"""The largest image that is read: `--max-megapixels` sets it for a command, and for the processes that it starts."""

import os

from t2i.checks import check_integer, check_range

MAX_PIXELS = 40_000_000  # width times height, compared with the header, before anything is decoded
HIGHEST_MAX_PIXELS = 178_000_000  # Pillow refuses more
VARIABLE = "T2I_MAX_PIXELS"


def find_max_pixels() -> int:
    """Return the largest width times height. Raises InputError for a variable of the environment that is no number."""
    value = os.environ.get(VARIABLE, str(MAX_PIXELS))
    pixels = int(value) if value.isdecimal() else value
    check_integer(VARIABLE, pixels, 1, HIGHEST_MAX_PIXELS)
    return int(pixels)


def set_max_megapixels(value: float | None) -> None:
    """Set the largest size, in millions of pixels; None keeps it. Raises InputError."""
    if value is not None:
        check_range("max-megapixels", value, 0.001, HIGHEST_MAX_PIXELS / 10**6)
        os.environ[VARIABLE] = str(round(value * 10**6))
