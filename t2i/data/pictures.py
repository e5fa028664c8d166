"""Captioned pictures: a folder in the imagefolder convention, read in an order that is a function of the seed.

Pictures are (3, H, W), float32, in [-1, 1] everywhere outside the models.
"""

import hashlib
import json
import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from t2i.config import DataConfig
from t2i.errors import InputError

MAX_PIXELS = 40_000_000  # a larger picture is refused from its header
READ_WHOLE = 20_000  # pictures that are decoded once before training; of more, the headers are read


@dataclass(frozen=True)
class Record:
    """One line of `metadata.jsonl`."""

    path: Path
    text: str
    keywords: list[str] = field(default_factory=list)
    split: str = "train"


def read_records(folder: str | Path, split: str | None = "train") -> list[Record]:
    """The records of `folder/metadata.jsonl` in its order: those of one split, or of all with `split=None`."""
    folder = Path(folder)
    metadata = folder / "metadata.jsonl"
    if not folder.is_dir():
        raise InputError(f"no data folder {str(folder)!r}; `t2i data emoji {folder}` draws one")
    if not metadata.is_file():
        raise InputError(f"no metadata.jsonl in {str(folder)!r}; it holds a line {{file_name, text}} per picture")
    try:
        lines = metadata.read_text(encoding="utf-8").split("\n")  # JSON strings may hold the other line separators
    except UnicodeDecodeError as error:
        raise InputError(f"{str(metadata)!r} is not UTF-8 ({error})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            record = Record(folder / row["file_name"], row["text"], row.get("keywords", []), row.get("split", "train"))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{metadata}:{number}: not a JSON object with file_name and text ({error!r})") from error
        if problem := wrong(record, folder):
            raise InputError(f"{metadata}:{number}: {problem}")
        if split is None or record.split == split:
            records.append(record)
    if not records:
        raise InputError(f"no pictures of split {split!r} in {str(metadata)!r}; it needs at least one")
    if missing := [str(record.path) for record in records if not record.path.is_file()]:
        raise InputError(f"{len(missing)} of {len(records)} pictures are missing, the first is {missing[0]!r}")
    return records


def wrong(record: Record, folder: Path) -> str | None:
    """What is wrong with a record, if anything."""
    if not isinstance(record.text, str) or not record.text.strip():
        return f"text must be a string that is not empty, got {record.text!r}"
    if not isinstance(record.keywords, list) or not all(isinstance(word, str) and word for word in record.keywords):
        return f"keywords must be a list of strings, got {record.keywords!r}"
    if not record.path.resolve().is_relative_to(folder.resolve()):
        return f"file_name must stay inside the folder, got {str(record.path)!r}"
    return None


def open_picture(path: str | Path) -> Image.Image:
    """An RGB picture, upright, transparency on white. Raises InputError if it does not decode or is too large."""
    with decoding(path) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


@contextmanager
def decoding(path: str | Path) -> Iterator[Image.Image]:
    """An open picture whose header has been read; what is wrong with it, also later, as an InputError."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise InputError(f"{str(path)!r} has {file.width} x {file.height} pixels; at most {MAX_PIXELS:,}")
            yield file
    except InputError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"{str(path)!r} does not decode as a picture ({error})") from error


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """-> (3, size, size), float32 in [-1, 1]: short side resized, centre cropped."""
    transform = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])
    return transform(image).float() / 127.5 - 1


def vary(record: Record, rng: random.Random) -> str:
    """A caption for one use in training: the text, the text and some keywords, or keywords; an article now and then."""
    if not record.keywords:
        return record.text
    keywords = rng.sample(record.keywords, rng.randint(1, min(4, len(record.keywords))))
    kind = rng.random()
    if kind < 0.5:
        caption = record.text
    elif kind < 0.8:
        caption = " ".join([record.text, *keywords])
    else:
        caption = " ".join(keywords)
    if rng.random() < 0.2:
        caption = ("an " if caption[0].lower() in "aeiou" else "a ") + caption
    return caption


@dataclass
class Batch:
    """What a training step gets. `index` says which records, so that a stage can look up what it computed before."""

    index: Tensor  # (B,), int64
    captions: list[str]
    image: Tensor | None = None  # (B, 3, H, W), float32 in [-1, 1]; None where the stage does not look at pictures


class CaptionedPictures(Dataset):
    """Records as (index, caption, picture). Indexed by (index, draw): `draw` chooses the caption's variation."""

    def __init__(self, config: DataConfig, split: str | None = "train"):
        self.records = read_records(config.path, split)
        self.size = config.image_size
        self.pictures = True  # False: captions alone, where something computed before stands for the pictures
        for record in self.records:  # before any work
            with decoding(record.path) as file:
                if len(self) <= READ_WHOLE:
                    file.load()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, str, Tensor | None]:
        index, draw = key
        record = self.records[index]
        return index, vary(record, random.Random(draw)), self.picture(index) if self.pictures else None

    def picture(self, index: int) -> Tensor:
        """(3, H, W)"""
        return to_tensor(open_picture(self.records[index].path), self.size)

    def digest(self) -> str:
        """16 hexadecimal digits for the records and their order."""
        rows = [[record.path.name, record.text, record.keywords] for record in self.records]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def sample(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """At most `count` pictures from all over the data, (B, 3, H, W) at a time."""
        chosen = range(0, len(self), -(-len(self) // count))
        for start in range(0, len(chosen), batch_size):
            yield torch.stack([self.picture(i) for i in chosen[start : start + batch_size]])


def collate(rows: list[tuple[int, str, Tensor | None]]) -> Batch:
    index, captions, images = zip(*rows)
    return Batch(torch.tensor(index), list(captions), None if images[0] is None else torch.stack(images))


class Order(Sampler[list[tuple[int, int]]]):
    """Endless batches in an order that is a function of the seed: pass after pass, each shuffled anew.

    The position in the data is one integer, the number of pictures that all processes have used; every process takes
    its share of each global batch. A pass may end in the middle of a batch, so no picture is ever left out.
    """

    def __init__(self, size: int, batch_size: int, seed: int, position: int = 0, rank: int = 0, world: int = 1):
        self.size, self.batch_size, self.seed, self.position = size, batch_size, seed, position
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start, epoch, order = self.position, -1, []
        while True:
            batch = []
            for position in range(start + self.rank, start + self.batch_size * self.world, self.world):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = torch.randperm(
                        self.size, generator=torch.Generator().manual_seed(self.seed + epoch)
                    ).tolist()
                batch.append((order[position % self.size], position + (self.seed << 48)))
            yield batch
            start += self.batch_size * self.world


def batches(dataset: Dataset, num_workers: int, **order: int) -> Iterator[Batch]:
    """Endless batches of a dataset; the keyword arguments are those of `Order`."""
    sampler = Order(len(dataset), **order)  # type: ignore[arg-type]
    try:
        yield from DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate)
    except InputError as error:  # a worker's error comes with its traceback as text
        raise InputError(str(error).rsplit("InputError: ", 1)[-1]) from error
