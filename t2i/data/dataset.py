"""Captioned pictures for training: what a manifest lists, in an order that is a function of the seed."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from t2i.config import DataConfig
from t2i.data.manifest import Manifest, read_splits
from t2i.data.pictures import decode_image, silence_pillow, to_tensor
from t2i.data.reasons import RejectedSample
from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.errors import InputError

MAX_READ_ATTEMPTS = 100  # pictures in a row that cannot be read, after which it is the disk's fault

SampleIndex = tuple[int, int]  # index of a record, and the draw that chooses among its captions


@dataclass(frozen=True)
class Record:
    """A sample, for people and for evaluation."""

    index: int
    key: str
    text: str  # the first caption
    keywords: list[str]
    split: str


def vary_caption(captions: list[str], keywords: list[str], rng: random.Random) -> str:
    """A caption for one use in training: one, one with some keywords, or keywords; an article now and then."""
    text = captions[0] if len(captions) == 1 else rng.choice(captions)
    if not keywords:
        return text
    keywords = rng.sample(keywords, rng.randint(1, min(4, len(keywords))))
    kind = rng.random()
    if kind < 0.5:
        caption = text
    elif kind < 0.8:
        caption = " ".join([text, *keywords])
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
    labels: Tensor | None = None  # (B,), int64: which class, for classifiers
    tokens: TokenStates | None = None  # of a decoder's own text encoder
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (key, reason): read in vain, another stands for it

    def to(self, device: torch.device) -> "Batch":
        tensors = {name: getattr(self, name) for name in ("image", "image_embeds", "latents", "labels")}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items() if value is not None}
        text = self.text and self.text.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        tokens = self.tokens and self.tokens.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(self, text=text, tokens=tokens, **moved)


class CaptionedPictures(Dataset):
    """The samples of a split of a manifest. Indexed by (index, draw): `draw` chooses the caption's variation."""

    def __init__(self, config: DataConfig, split: str | None = "train"):
        self.manifest = Manifest(config.path, split)
        self.size = config.image_size
        self.reads_images = True  # False: captions alone, where something computed before stands for the pictures

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitems__(self, keys: list[SampleIndex]) -> Batch:
        """The batch of these samples; what a DataLoader calls.

        In the place of one whose picture is gone or changed stands the next that is as it was, and `rejected` says so.
        Raises InputError if a hundred in a row are bad, or all.
        """
        if not self.reads_images:
            return Batch(torch.tensor([index for index, _ in keys]), [self.get_caption(*key) for key in keys])
        rejected: list[tuple[str, str]] = []
        found = [self.read_next_image(index, rejected) for index, _ in keys]
        captions = [self.get_caption(index, draw) for (index, _), (_, draw) in zip(found, keys)]
        image = torch.stack([picture for _, picture in found])
        return Batch(torch.tensor([index for index, _ in found]), captions, image, rejected=rejected)

    def read_next_image(self, index: int, rejected: list[tuple[str, str]]) -> tuple[int, Tensor]:
        """The first sample from `index` on that can be read, and its picture; the others are added to `rejected`."""
        tries = min(MAX_READ_ATTEMPTS, len(self))
        for i in (number % len(self) for number in range(index, index + tries)):
            try:
                return i, self.read_image(i)
            except RejectedSample as error:
                rejected.append((self.sample_key(i), error.reason.name))
        counts = Counter(reason for _, reason in rejected[-tries:])
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        raise InputError(f"{tries} pictures in a row cannot be read ({reasons}), the first is {rejected[-tries][0]!r}")

    def read_image(self, index: int) -> Tensor:
        """(3, H, W). Raises RejectedSample."""
        data = self.manifest.read_image(index)
        with silence_pillow():
            return to_tensor(decode_image(data), self.size)

    def load_image(self, index: int) -> Tensor:
        """(3, H, W). Raises InputError with the sample's key."""
        try:
            return self.read_image(index)
        except RejectedSample as error:
            raise InputError(f"{self.sample_key(index)!r}: {error}; `t2i data check` again leaves it out") from error

    def get_caption(self, index: int, draw: int) -> str:
        captions, keywords = (self.manifest.get_value(column, index) for column in ("captions", "keywords"))
        return vary_caption(captions, keywords, random.Random(draw))

    def sample_key(self, index: int) -> str:
        """The name of a sample, for people."""
        return self.manifest.get_value("key", index)

    def get_record(self, index: int) -> Record:
        key, captions, keywords, split = (
            self.manifest.get_value(column, index) for column in ("key", "captions", "keywords", "split")
        )
        return Record(index, key, captions[0], keywords, split)

    def iterate_texts(self) -> Iterator[str]:
        """All words of each sample, to train a tokenizer on."""
        return (
            " ".join([*row["captions"], *row["keywords"]]) for row in self.manifest.iterate_rows("captions", "keywords")
        )

    def compute_digest(self) -> str:
        """16 hexadecimal digits for the pictures, captions and keywords, and their order; not for where they lie."""
        hasher = hashlib.sha256()
        for row in self.manifest.iterate_rows("sha256", "captions", "keywords"):
            hasher.update(json.dumps([row["sha256"].hex(), row["captions"], row["keywords"]]).encode())
        return hasher.hexdigest()[:16]

    def iterate_images(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """At most `count` pictures from all over the data, (B, 3, H, W) at a time."""
        chosen = range(0, len(self), -(-len(self) // count))
        for start in range(0, len(chosen), batch_size):
            yield torch.stack([self.read_next_image(i, [])[1] for i in chosen[start : start + batch_size]])


def build_held_out_dataset(config: DataConfig) -> CaptionedPictures | None:
    """What the manifest holds out, to validate with; None where it holds out nothing."""
    return CaptionedPictures(config, "held_out") if "held_out" in read_splits(config.path) else None


class EndlessBatchSampler(Sampler[list[SampleIndex]]):
    """Endless batches in an order that is a function of the seed: pass after pass, each shuffled anew.

    The position in the data is one integer, the number of pictures that all processes have used; every process takes
    its share of each global batch. A pass may end in the middle of a batch, so no picture is ever left out.
    """

    def __init__(self, size: int, batch_size: int, seed: int, position: int = 0, rank: int = 0, world: int = 1):
        self.size, self.batch_size, self.seed, self.position = size, batch_size, seed, position
        self.rank, self.world_size = rank, world

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        start, epoch, order = self.position, -1, []
        while True:
            batch = []
            for position in range(start + self.rank, start + self.batch_size * self.world_size, self.world_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = torch.randperm(
                        self.size, generator=torch.Generator().manual_seed(self.seed + epoch)
                    ).tolist()
                batch.append((order[position % self.size], position + (self.seed << 48)))
            yield batch
            start += self.batch_size * self.world_size


def iterate_batches(dataset: Dataset, num_workers: int, **order: int) -> Generator[Batch, None, None]:
    """Endless batches of a dataset; the keyword arguments are those of `EndlessBatchSampler`. Closed, its workers
    end; after an error
    they end with what holds it."""
    sampler = EndlessBatchSampler(len(dataset), **order)  # type: ignore[arg-type]
    settings = {"num_workers": num_workers, "collate_fn": return_batch, "worker_init_fn": set_worker_signals}
    with shorten_worker_errors():
        with block_signals():
            loader = iter(DataLoader(dataset, batch_sampler=sampler, **settings))
        yield from loader


@contextmanager
def block_signals() -> Iterator[None]:
    """Around the start of workers, all of whose threads are deaf to signals from then on: one that comes to the whole
    group is for their parent, which has to save first."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def set_worker_signals(worker: int) -> None:
    """End a worker by the signal that multiprocessing ends its children with, if it is their parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere nobody can tell who sent a signal, and torch's handler stays
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # for start methods that lose the mask
        threading.Thread(target=wait_for_parent_signal, daemon=True).start()


def wait_for_parent_signal() -> None:
    parent, starter = multiprocessing.parent_process(), os.getppid()  # a fork server starts, but does not end
    assert parent is not None
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid and os.getppid() == starter:
        pass
    os._exit(0)


@contextmanager
def shorten_worker_errors() -> Iterator[None]:
    """A worker's error comes with its traceback as text; what is left is its message."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).rsplit("InputError: ", 1)[-1]) from error


def return_batch(batch: Batch) -> Batch:
    """Nothing to collate: a dataset gives whole batches."""
    return batch
