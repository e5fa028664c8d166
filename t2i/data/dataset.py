"""Captioned pictures for training: an imagefolder, in an order that is a function of the seed."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from t2i.condition import TextEncoding
from t2i.config import DataConfig
from t2i.data.pictures import decoding, open_picture, to_tensor
from t2i.errors import InputError

READ_WHOLE = 20_000  # pictures that are decoded once before training; of more, the headers are read

Key = tuple[int, int]  # index of a record, and the draw that chooses among its captions


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
    """What a training step gets: captions and pictures, or what was computed from them before."""

    index: Tensor  # (B,), int64: which records
    captions: list[str] = field(default_factory=list)
    image: Tensor | None = None  # (B, 3, H, W), float32 in [-1, 1]
    image_embeds: Tensor | None = None  # (B, D), unit length: z_i
    latents: Tensor | None = None  # (B, C, h, w), unit variance
    text: TextEncoding | None = None
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (key, reason): read in vain, another stands for it

    def to(self, device: torch.device) -> "Batch":
        tensors = {name: getattr(self, name) for name in ("image", "image_embeds", "latents")}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items() if value is not None}
        text = self.text and self.text.map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(self, text=text, **moved)


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

    def __getitems__(self, keys: list[Key]) -> Batch:
        """The batch of these records; what a DataLoader calls."""
        index = [index for index, _ in keys]
        image = torch.stack([self.picture(i) for i in index]) if self.pictures else None
        return Batch(torch.tensor(index), [self.caption(*key) for key in keys], image)

    def caption(self, index: int, draw: int) -> str:
        return vary(self.records[index], random.Random(draw))

    def key(self, index: int) -> str:
        """The name of a record, for people."""
        return self.records[index].path.name

    def corpus(self) -> Iterator[str]:
        """All words of each record, to train a tokenizer on."""
        return (" ".join([record.text, *record.keywords]) for record in self.records)

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


class Order(Sampler[list[Key]]):
    """Endless batches in an order that is a function of the seed: pass after pass, each shuffled anew.

    The position in the data is one integer, the number of pictures that all processes have used; every process takes
    its share of each global batch. A pass may end in the middle of a batch, so no picture is ever left out.
    """

    def __init__(self, size: int, batch_size: int, seed: int, position: int = 0, rank: int = 0, world: int = 1):
        self.size, self.batch_size, self.seed, self.position = size, batch_size, seed, position
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[Key]]:
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
        yield from DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=whole)
    except InputError as error:  # a worker's error comes with its traceback as text
        raise InputError(str(error).rsplit("InputError: ", 1)[-1]) from error


def whole(batch: Batch) -> Batch:
    """Nothing to collate: a dataset gives whole batches."""
    return batch
