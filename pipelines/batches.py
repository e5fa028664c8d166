"""Many pictures: which are drawn together, how many fit, and which are there already."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import psutil
import torch
from PIL import Image

from t2i.errors import InputError

AUTO = 16  # pictures at once, to begin with
MAX_BATCH = 1024
AHEAD = 8  # batches whose captions are sorted by length together: what is drawn early is written early
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)

Item = TypeVar("Item")
Drawn = TypeVar("Drawn")
Record: TypeAlias = dict[str, Any]  # what a picture is of, its seed, and how it is drawn


def check_batch_size(value: str | int | None) -> int | None:
    """Pictures at once; None for "auto", and where nothing is said. Raises InputError for anything else."""
    if value is None or value == "auto":
        return None
    if not str(value).isdecimal() or not 1 <= int(value) <= MAX_BATCH:
        raise InputError(f"batch-size must be auto or an integer from 1 to {MAX_BATCH}, got {value!r}")
    return int(value)


def split(items: list[Item], size: int, length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Batches of at most `size`, similar lengths together: a batch is as long as its longest caption."""
    for start in range(0, len(items), size * AHEAD):
        part = sorted(items[start : start + size * AHEAD], key=length)
        yield from (part[i : i + size] for i in range(0, len(part), size))


def in_order(found: Iterable[tuple[int, Drawn]], expected: list[int]) -> Iterator[Drawn]:
    """What is found under numbers in any order, in the order of the expected numbers."""
    waiting = dict[int, Drawn]()
    left = iter(expected)
    number = next(left, None)
    for at, one in found:
        waiting[at] = one
        while number in waiting:
            yield waiting.pop(number)
            number = next(left, None)


def draw_fitting(draw: Callable[[list[Item]], list[Drawn]], items: list[Item], automatic: bool) -> list[Drawn]:
    """`draw(items)`; if memory does not suffice and the batch's size was left to us, in halves.

    Raises InputError, with what was needed and what there is, where it cannot be halved or was asked for as it is.
    """
    try:
        return draw(items)
    except (RuntimeError, MemoryError) as error:  # torch's own is a RuntimeError
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        said = f"a batch of {len(items)} does not fit into memory: {needed(str(error))}, {free()}"
    if automatic and len(items) > 1:
        half = (len(items) + 1) // 2
        return [*draw_fitting(draw, items[:half], True), *draw_fitting(draw, items[half:], True)]
    smaller = f"give --batch-size {len(items) // 2} or auto" if len(items) > 1 else "ask for smaller pictures"
    raise InputError(f"{said}; {smaller}")


def needed(message: str) -> str:
    """What an allocator says that it was asked for, on top of what it held."""
    found = re.search(r"allocate ([\d.]+ ?(?:bytes|[KMGT]i?B))", message)
    amount = found.group(1) if found else "an unknown amount"
    if amount.endswith("bytes"):
        amount = gigabytes(int(float(amount.split()[0])))
    return f"it needs {amount} more at once"


def free() -> str:
    """What there is."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        here, whole = torch.cuda.mem_get_info()
        return f"{gigabytes(here)} of {gigabytes(whole)} are free on the device"
    memory = psutil.virtual_memory()
    return f"{gigabytes(memory.available)} of {gigabytes(memory.total)} are free"


def gigabytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def there_already(folder: Path, wanted: list[Record]) -> dict[int, Path]:
    """By number in `wanted`, the PNG files of a folder that say that they were drawn so; of several, the first.

    What cannot be read, or says nothing, is none of them.
    """
    numbers = {key_of(record): number for number, record in enumerate(wanted)}
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        try:
            with Image.open(path, formats=["PNG"]) as image:
                said = json.loads(image.info.get("t2i", "null"))
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        if isinstance(said, dict) and (number := numbers.get(key_of(said))) is not None:
            found.setdefault(number, path)
    return found


def key_of(record: Record) -> str:
    """What decides a picture: the record as JSON, but for the version that wrote it."""
    return json.dumps({key: value for key, value in record.items() if key != "version"}, sort_keys=True)
