"""Divide images into batches and processes, draw them, and write each batch as soon as it is drawn."""

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from math import ceil
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from t2i.pipelines.jobs.records import Record, encode_png_image, find_drawn_files
from t2i.pipelines.memory_needed import BatchTooLargeError

from t2i.errors import InputError
from t2i.files.atomic import write_new_file
from t2i.progress import Progress
from t2i.runtime.memory import format_needed_memory, is_out_of_memory, measure_available_memory
from t2i.runtime.rank import SINGLE_PROCESS, Rank

logger = logging.getLogger(__name__)

AUTO_BATCH_SIZE = 16
MAX_BATCH_SIZE = 1024
# Batches whose captions are sorted by length together. More would delay the first images of the list.
SORTED_BATCHES = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchPlan:
    """Division of images into batches and processes."""

    size: int | None = None  # images drawn at once; None is 16, halved after running out of memory
    find_fitting_size: Callable[[int], int] | None = None  # reduces the 16 to what fits into memory
    device: torch.device | str = "cpu"  # the device that draws
    rank: Rank = SINGLE_PROCESS
    resume: bool = False  # skip images that the folder contains already


def write_images(
    draw: Callable[[list[int]], list[Image.Image]],
    records: list[Record],
    out: Path,
    plan: BatchPlan,
    progress: Progress | None = None,
) -> Iterator[Path]:
    """Draw an image for each record and write each batch as soon as it is drawn; yield paths in the records' order.

    draw: takes indices of records, returns their images. A record's first value and its seed name the file in `out`.
    progress: counts the images, of which it expects all.
    """
    # Find this process's images. All processes must divide all images alike, so those drawn already drop out last.
    size = min(plan.size or AUTO_BATCH_SIZE, ceil(len(records) / plan.rank.world_size))
    batches = split_batches(list(range(len(records))), size, lambda i: len(str(records[i].get("prompt", ""))))
    own = [i for batch in islice(batches, plan.rank.rank, None, plan.rank.world_size) for i in batch]
    drawn = find_drawn_files(out, records) if plan.resume else {}
    missing = [i for i in own if i not in drawn]
    if len(missing) < len(own):
        logger.warning("%s already contains %d of %d images; they are skipped", out, len(own) - len(missing), len(own))

    # Draw and write them
    progress = progress or Progress("drawing", is_shown=False)
    progress.leave_out(len(records) - len(missing))

    def draw_batch(indices: list[int]) -> list[Image.Image]:
        with progress.follow_batch(len(indices)):
            return draw(indices)

    if plan.size is None and missing and plan.find_fitting_size is not None:
        size = plan.find_fitting_size(size)
    images = draw_fitting_batches(draw_batch, missing, size, plan.size is None, plan.device)
    written = (
        (i, write_new_image(out, str(next(iter(records[i].values()))), image, records[i])) for i, image in images
    )
    yield from iterate_in_order(written, sorted(missing))


def write_new_image(out: Path, name: str, image: Image.Image, record: Record) -> Path:
    """Write an image with its record to `out`, or into the folder `out` under a free name of `name` and the seed.

    Returns the path. Raises InputError if the file `out` exists.
    """
    content = encode_png_image(image, record)
    if out.suffix.lower() == ".png":
        path = write_new_file(out.parent, [out.name], content)
    else:
        stem = f"{build_file_stem(name)}-{record['seed']}"
        path = write_new_file(out, (f"{stem}{'' if i == 1 else f'-{i}'}.png" for i in count(1)), content)
    if path is None:
        raise InputError(f"{str(out)!r} exists and is not overwritten; give another name")
    return path


def build_file_stem(text: str) -> str:
    """Return the letters and digits of a text, of any script, in at most 40 characters, for the name of a file."""
    text = unicodedata.normalize("NFC", text.lower())
    # With the marks of letters, such as the vowels of Hindi
    kept = "".join(character if unicodedata.category(character)[0] in "LMN" else "-" for character in text)
    return re.sub("-+", "-", kept).strip("-")[:40] or "picture"


def parse_batch_size(value: str | int | None) -> int | None:
    """Return the number of images drawn at once; None for "auto" and for None. Raises InputError for other values."""
    if value is None or value == "auto":
        return None
    text = str(value)
    # Python refuses to read very long numbers
    short = text.isdecimal() and len(text) <= len(str(MAX_BATCH_SIZE))
    if not short or not 1 <= int(text) <= MAX_BATCH_SIZE:
        raise InputError(f"batch-size must be auto or an integer from 1 to {MAX_BATCH_SIZE}, got {value!r:.80}")
    return int(text)


def split_batches(items: list[Item], size: int, length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield batches of at most `size`, with similar lengths together: a batch is padded to its longest caption."""
    for start in range(0, len(items), size * SORTED_BATCHES):
        part = sorted(items[start : start + size * SORTED_BATCHES], key=length)
        yield from (part[i : i + size] for i in range(0, len(part), size))


def iterate_in_order(results: Iterable[tuple[int, Result]], order: list[int]) -> Iterator[Result]:
    """Yield results, which come with their numbers in any order, in the order of `order`."""
    waiting: dict[int, Result] = {}  # results that came before their turn
    remaining = iter(order)
    number = next(remaining, None)
    for result_number, result in results:
        waiting[result_number] = result
        while number in waiting:
            yield waiting.pop(number)
            number = next(remaining, None)


def draw_fitting_batches(
    draw: Callable[[list[Item]], list[Result]],
    items: list[Item],
    size: int,
    automatic: bool,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, drawn in batches of `size`.

    automatic: halve the size, for all further batches, when memory does not suffice.

    Raises InputError, with the memory needed and free, if it does not suffice and the size is fixed or 1.
    """
    start = 0
    while part := items[start : start + size]:
        try:
            results = draw(part)
        except BatchTooLargeError as error:
            # Raised before anything is drawn
            reason, fitting_count = error.reason, error.fitting_count
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            needed, available = format_needed_memory(str(error)), measure_available_memory(device)
            reason = f"a batch of {len(part)} does not fit into memory: {needed}, {available}"
            fitting_count = len(part) // 2
        else:
            yield from zip(part, results)
            start += len(part)
            continue
        # Halve the batch, or give up
        if not automatic or len(part) == 1:
            advice = f"give --batch-size {fitting_count} or auto" if fitting_count else "ask for smaller images"
            raise InputError(f"{reason}; {advice}")
        size = (len(part) + 1) // 2
