"""Metadata of PNG files: the record of this project, and the text that other programs read and write."""

import json
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from t2i.errors import InputError

# What Pillow and json raise for files that are damaged, or made to do harm
DAMAGED_FILE_ERRORS = (
    *(OSError, ValueError, SyntaxError, IndexError, TypeError, RecursionError, struct.error),
    Image.DecompressionBombError,
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PARAMETER = re.compile(r'([^:,"]+): ("(?:[^"\\]|\\.)*"|[^,]*)')  # a value that has a comma is in quotes


@contextmanager
def open_png(path: Path) -> Iterator[Image.Image]:
    """Open a PNG file without decoding a pixel. Raises one of `DAMAGED_FILE_ERRORS`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path, formats=["PNG"]) as image:
            yield image


def read_record(image: Image.Image) -> dict[str, Any] | None:
    """Return the record of an opened PNG file; None for a file of another program."""
    record = json.loads(image.info.get("t2i", "null"))
    return record if isinstance(record, dict) else None


def read_stored_settings(path: Path) -> tuple[dict[str, Any], bool]:
    """Return the settings in a PNG file by name, with its size, and whether they are a record of this project.

    Without a record they are those of the text "parameters", as texts, and the size is the one that they name, if any.
    Raises InputError for a file that is missing, damaged, no PNG file or without settings.
    """
    if not path.is_file():  # opening a pipe would block
        raise InputError(f"no file {str(path)!r}; give a PNG file")
    with open(path, "rb") as file:
        if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            raise InputError(f"{str(path)!r} is no PNG file; only these contain settings")
    try:
        with open_png(path) as image:
            record, parameters = read_record(image), image.info.get("parameters")
            size = f"{image.width}x{image.height}"
            # Compares the checksums of the file, and still decodes no pixel
            image.verify()
    except DAMAGED_FILE_ERRORS as error:
        raise InputError(f"{str(path)!r} is damaged ({error})") from error
    if record is not None:
        return {**record, "size": size}, True
    if not isinstance(parameters, str):
        raise InputError(f"{str(path)!r} contains no settings")
    settings = parse_parameters(parameters)
    return settings if "Size" in settings else settings | {"size": size}, False


def parse_parameters(text: str) -> dict[str, str]:
    """Return the settings of the text "parameters": prompt, "Negative prompt: ...", and a line that has the others."""
    head, _, last = text.rpartition("\n")
    # Without the steps, the last line belongs to the prompt
    if "Steps: " not in last:
        head, last = text, ""
    prompt, mark, negative = f"\n{head}".partition("\nNegative prompt: ")
    settings = {"prompt": prompt.removeprefix("\n")} | ({"negative_prompt": negative} if mark else {})
    for name, value in PARAMETER.findall(last):
        with suppress(ValueError):
            value = json.loads(value) if value.startswith('"') else value
        settings[name.strip()] = value
    return settings
