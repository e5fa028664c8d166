"""Many pictures: which are drawn together, how many fit, and which are there already."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from PIL import Image
from t2i.pipelines.memory_needed import BatchTooLargeError

from t2i.errors import InputError
from t2i.runtime.memory import format_needed_memory, is_out_of_memory, measure_available_memory

AUTO_BATCH_SIZE = 16  # pictures at once, to begin with
MAX_BATCH_SIZE = 1024
SORTED_BATCHES = 8  # batches whose captions are sorted by length together: what is drawn early is written early

Item = TypeVar("Item")
Drawn = TypeVar("Drawn")
Record: TypeAlias = dict[str, Any]  # what a picture is of, its seed, and how it is drawn


def check_batch_size(value: str | int | None) -> int | None:
    """Pictures at once; None for "auto", and where nothing is said. Raises InputError for anything else."""
    if value is None or value == "auto":
        return None
    text = str(value)
    short = text.isdecimal() and len(text) <= len(str(MAX_BATCH_SIZE))  # Python refuses to read very long numbers
    if not short or not 1 <= int(text) <= MAX_BATCH_SIZE:
        raise InputError(f"batch-size must be auto or an integer from 1 to {MAX_BATCH_SIZE}, got {value!r:.80}")
    return int(text)


def split_batches(items: list[Item], size: int, length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Batches of at most `size`, similar lengths together: a batch is as long as its longest caption."""
    for start in range(0, len(items), size * SORTED_BATCHES):
        part = sorted(items[start : start + size * SORTED_BATCHES], key=length)
        yield from (part[i : i + size] for i in range(0, len(part), size))


def iterate_in_order(found: Iterable[tuple[int, Drawn]], expected: list[int]) -> Iterator[Drawn]:
    """What is found under numbers in any order, in the order of the expected numbers."""
    waiting = dict[int, Drawn]()
    left = iter(expected)
    number = next(left, None)
    for at, one in found:
        waiting[at] = one
        while number in waiting:
            yield waiting.pop(number)
            number = next(left, None)


def draw_fitting_batches(
    draw: Callable[[list[Item]], list[Drawn]],
    items: list[Item],
    size: int,
    automatic: bool,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Item, Drawn]]:
    """Each item with what `draw` makes of it, on a device, in batches of `size`.

    Where memory does not suffice and the size was left to us, it is halved, from then on. Raises InputError, with what
    was needed and what there is, where it cannot be halved or was asked for as it is.
    """
    start = 0
    while part := items[start : start + size]:
        try:
            made = draw(part)
        except BatchTooLargeError as error:  # before anything was drawn
            said, fewer = error.reason, error.fitting_count
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            needed = format_needed_memory(str(error))
            said = f"a batch of {len(part)} does not fit into memory: {needed}, {measure_available_memory(device)}"
            fewer = len(part) // 2
        else:
            yield from zip(part, made)
            start += len(part)
            continue
        if not automatic or len(part) == 1:
            smaller = f"give --batch-size {fewer} or auto" if fewer else "ask for smaller pictures"
            raise InputError(f"{said}; {smaller}")
        size = (len(part) + 1) // 2


def find_drawn_files(folder: Path, wanted: list[Record]) -> dict[int, Path]:
    """By number in `wanted`, the PNG files of a folder that say that they were drawn so; of several, the first.

    What cannot be read to its end, or says nothing, is none of them.
    """
    numbers = {format_record_key(record): number for number, record in enumerate(wanted)}
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        try:
            if (number := read_record_number(path, numbers)) is not None:
                found.setdefault(number, path)
        except (OSError, ValueError, SyntaxError, IndexError, RecursionError, Image.DecompressionBombError):
            continue
    return found


def read_record_number(path: Path, numbers: dict[str, int]) -> int | None:
    """The number under the key that a PNG file says, if it is whole; raises what Pillow does for what is no picture."""
    if not path.is_file():  # a pipe would block
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
        with Image.open(path, formats=["PNG"]) as image:
            said = json.loads(image.info.get("t2i", "null"))
            number = numbers.get(format_record_key(said)) if isinstance(said, dict) else None
            if number is not None:
                image.verify()  # the text stands before the pixels, which a crash or a bad disk may have cut or changed
            return number


def format_record_key(record: Record) -> str:
    """What decides a picture: the record as JSON, but for the version that wrote it."""
    return json.dumps({key: value for key, value in record.items() if key != "version"}, sort_keys=True)
