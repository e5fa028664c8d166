"""Data sets of captioned images, and batches of them in an order that is a function of the seed."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from t2i.config import DataConfig
from t2i.data.groups import SampleGroups
from t2i.data.manifest import Manifest, open_manifest, open_manifests
from t2i.data.pictures import decode_image, silence_pillow, to_tensor
from t2i.data.reasons import RejectedSample
from t2i.diffusion.condition import Condition, TextEncoding, TokenStates
from t2i.errors import InputError
from t2i.texts import normalize_text

MAX_READ_ATTEMPTS = 100  # so many unreadable images in a row mean that the disk or the folder is at fault

SampleIndex = tuple[int, int]  # index of a sample, and the draw that chooses among its captions


@dataclass(frozen=True)
class SampleText:
    """A sample without its image."""

    index: int
    key: str
    text: str  # the first caption
    keywords: list[str]
    split: str


def draw_phrases(captions: list[str], keywords: list[str], rng: random.Random, keyword_alone: float = 0.0) -> list[str]:
    """Choose the phrases of a caption for one use in training: a caption, one with keywords, or keywords alone.

    keyword_alone: probability of a single keyword, before all else.
    """
    text = captions[0] if len(captions) == 1 else rng.choice(captions)
    if not keywords:
        return [text]
    # The order of these draws is part of the format: caches and runs that resume depend on it
    if keyword_alone and rng.random() < keyword_alone:
        return [rng.choice(keywords)]
    keywords = rng.sample(keywords, rng.randint(1, min(4, len(keywords))))
    kind = rng.random()
    if kind < 0.5:
        return [text]
    return [text, *keywords] if kind < 0.8 else keywords


def vary_caption(captions: list[str], keywords: list[str], rng: random.Random, keyword_alone: float = 0.0) -> str:
    """Choose a caption for one use in training, of the phrases that `draw_phrases` returns.

    It gets an article in a fifth of the cases, if there are keywords.
    """
    caption = " ".join(draw_phrases(captions, keywords, rng, keyword_alone))
    if keywords and rng.random() < 0.2:
        caption = ("an " if caption[0].lower() in "aeiou" else "a ") + caption
    return caption


@dataclass
class Batch:
    """Input of a training step: captions and images, or their encodings from a cache."""

    index: Tensor  # (B,), int64: which samples
    captions: list[str] = field(default_factory=list)
    image: Tensor | None = None  # (B, 3, H, W), float32 in [-1, 1]
    image_embeds: Tensor | None = None  # (B, D), unit length: z_i
    latents: Tensor | None = None  # (B, C, h, w), unit variance
    text: TextEncoding | None = None
    labels: Tensor | None = None  # (B,), int64: the class, for classifiers
    tokens: TokenStates | None = None  # of a decoder's own text encoder
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (key, reason) of images that were replaced
    phrases: list[list[str]] = field(default_factory=list)  # of the captions, where images are not read

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply a function to every tensor but `index`."""
        mapped: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "index":
                mapped[name] = function(value)
            elif isinstance(value, Condition):
                mapped[name] = value.map_tensors(function)
        return replace(self, **mapped)

    def to(self, device: torch.device) -> "Batch":
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))


class CaptionedPictures(Dataset):
    """The samples of a split of a manifest. Indexed by (index, draw): `draw` chooses the caption's variation."""

    def __init__(self, config: DataConfig, split: str | None = "train", manifest: Manifest | None = None):
        """`split` None: all samples. `manifest`: that of the split, where it is open already."""
        self.manifest = open_manifest(config.path, split) if manifest is None else manifest
        self.size, self.keyword_alone = config.image_size, config.keyword_alone
        self.reads_images = True  # False: batches have captions alone, for images that a cache encoded before

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitems__(self, keys: list[SampleIndex]) -> Batch:
        """Return the batch of these samples; a DataLoader calls this.

        An image that is gone or has changed is replaced by the next readable sample, and `rejected` lists it. Raises
        InputError if a hundred in a row, or all, cannot be read.
        """
        if not self.reads_images:
            phrases = [self.get_phrases(index, draw) for index, draw in keys]
            index = torch.tensor([index for index, _ in keys])
            captions = [self.get_caption(sample, draw) for sample, draw in keys]
            return Batch(index, captions, phrases=phrases)
        rejected: list[tuple[str, str]] = []
        samples = [self.read_next_image(index, rejected) for index, _ in keys]
        captions = [self.get_caption(index, draw) for (index, _), (_, draw) in zip(samples, keys)]
        image = torch.stack([picture for _, picture in samples])
        return Batch(torch.tensor([index for index, _ in samples]), captions, image, rejected=rejected)

    def read_next_image(self, index: int, rejected: list[tuple[str, str]]) -> tuple[int, Tensor]:
        """Return the first readable sample from `index` on and its image; add those before it to `rejected`."""
        tries = min(MAX_READ_ATTEMPTS, len(self))
        # From the end of the data on to its beginning
        for i in (number % len(self) for number in range(index, index + tries)):
            try:
                return i, self.read_image(i)
            except RejectedSample as error:
                rejected.append((self.get_sample_key(i), error.reason.name))
        counts = Counter(reason for _, reason in rejected[-tries:])
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        raise InputError(f"{tries} images in a row cannot be read ({reasons}), the first is {rejected[-tries][0]!r}")

    def read_image(self, index: int) -> Tensor:
        """Return an image, (3, H, W), float32 in [-1, 1]. Raises RejectedSample."""
        data = self.manifest.read_image(index)
        with silence_pillow():
            return to_tensor(decode_image(data, self.manifest.reading), self.size)

    def load_image(self, index: int) -> Tensor:
        """Return an image, (3, H, W), float32 in [-1, 1]. Raises InputError with the sample's key."""
        try:
            return self.read_image(index)
        except RejectedSample as error:
            raise InputError(
                f"{self.get_sample_key(index)!r}: {error}; another `t2i data check` leaves it out"
            ) from error

    def get_caption(self, index: int, draw: int) -> str:
        captions, keywords = self.manifest.get_values(index, "captions", "keywords")
        return vary_caption(captions, keywords, random.Random(draw), self.keyword_alone)

    def get_phrases(self, index: int, draw: int) -> list[str]:
        """Return the phrases of `get_caption`: the caption without its article."""
        captions, keywords = self.manifest.get_values(index, "captions", "keywords")
        return draw_phrases(captions, keywords, random.Random(draw), self.keyword_alone)

    def get_sample_key(self, index: int) -> str:
        """Return the name of a sample."""
        return self.manifest.get_values(index, "key")[0]

    def get_record(self, index: int) -> SampleText:
        key, captions, keywords, split = self.manifest.get_values(index, "key", "captions", "keywords", "split")
        return SampleText(index, key, captions[0], keywords, split)

    def iterate_texts(self) -> Iterator[str]:
        """Yield all words of each sample as one text, to train a tokenizer on."""
        for row in self.manifest.iterate_rows("captions", "keywords"):
            yield " ".join([*row["captions"], *row["keywords"]])

    def compute_digest(self) -> str:
        """Return 16 hexadecimal digits of the images, captions, keywords and their order, not of their places."""
        hasher = hashlib.sha256()
        for row in self.manifest.iterate_rows("sha256", "captions", "keywords", "detail"):
            # Texts as tokenizers get them, so that spaces which say nothing change nothing
            captions, keywords = ([normalize_text(text) for text in row[name]] for name in ("captions", "keywords"))
            # An image that is converted is another image than it was to versions that converted none
            conversion = [row["detail"]] if row["detail"] else []
            hasher.update(json.dumps([row["sha256"].hex(), captions, keywords, *conversion]).encode())
        return hasher.hexdigest()[:16]

    def iterate_images(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """Yield at most `count` images, evenly spread over the data, (B, 3, H, W) at a time."""
        chosen = range(0, len(self), -(-len(self) // count))
        for start in range(0, len(chosen), batch_size):
            yield torch.stack([self.read_next_image(i, [])[1] for i in chosen[start : start + batch_size]])


def open_datasets(config: DataConfig) -> dict[str, CaptionedPictures]:
    """Open the data set of every split that has images: "train", and "held_out" if there is one.

    The manifest is read once. Raises InputError if there is none, or nothing to train on.
    """
    manifests = open_manifests(config.path)
    return {str(split): CaptionedPictures(config, split, manifest) for split, manifest in manifests.items()}


class EndlessBatchSampler(Sampler[list[SampleIndex]]):
    """Endless batches in an order that is a function of the seed: pass after pass, each shuffled anew.

    The position in the data is one integer, the number of images that all processes have used. Every process takes
    its part of each global batch. A pass may end in the middle of a batch, so no image is ever left out.
    With groups, a pass has as many samples of each.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        position: int = 0,
        rank: int = 0,
        world: int = 1,
        groups: SampleGroups | None = None,
    ):
        self.size = size if groups is None else len(groups)  # of a pass
        self.batch_size, self.seed, self.position = batch_size, seed, position
        self.rank, self.world_size, self.groups = rank, world, groups

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        start, epoch, order = self.position, -1, []
        while True:
            batch = []
            for position in range(start + self.rank, start + self.batch_size * self.world_size, self.world_size):
                # Each pass has a permutation of its own, also where it begins within a batch
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = self.arrange_pass(epoch)
                # The draw differs between passes and, in its upper bits, between runs of other seeds.
                batch.append((order[position % self.size], position + (self.seed << 48)))
            yield batch
            start += self.batch_size * self.world_size

    def arrange_pass(self, epoch: int) -> list[int]:
        """Return the samples of a pass in order."""
        if self.groups is not None:
            return self.groups.arrange_pass(self.seed, epoch)
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()


def iterate_batches(dataset: Dataset, num_workers: int, **order: Any) -> Generator[Batch, None, None]:
    """Yield endless batches of a data set; `order` holds the keyword arguments of `EndlessBatchSampler`.

    Closing the generator ends its workers. After an error they end when the generator is released.
    """
    sampler = EndlessBatchSampler(len(dataset), **order)  # type: ignore[arg-type]
    # The sampler yields batches, and the data set returns each as a whole
    settings = {"num_workers": num_workers, "collate_fn": return_batch, "worker_init_fn": set_worker_signals}
    with shorten_worker_errors():
        with block_signals():
            loader = iter(DataLoader(dataset, batch_sampler=sampler, **settings))
        yield from loader


@contextmanager
def block_signals() -> Iterator[None]:
    """Block SIGTERM and SIGINT while workers start, for the workers inherit the mask.

    A signal to the whole process group is meant for the parent, which has to save before its workers end.
    """
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def set_worker_signals(worker: int) -> None:
    """Let a worker end only by SIGTERM from its parent: multiprocessing ends its children with one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # without it the sender of a signal is unknown, and torch's handler stays
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # for start methods that lose the mask
        threading.Thread(target=wait_for_parent_signal, daemon=True).start()


def wait_for_parent_signal() -> None:
    """Exit at the SIGTERM of the parent, or at any once the parent is gone."""
    # A fork server starts the worker but does not end it, so getppid() need not be the parent's id.
    parent, starter = multiprocessing.parent_process(), os.getppid()
    assert parent is not None
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid and os.getppid() == starter:
        pass
    os._exit(0)


@contextmanager
def shorten_worker_errors() -> Iterator[None]:
    """Reduce an InputError to its message: that of a worker contains the traceback as text."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).rsplit("InputError: ", 1)[-1]) from error


def return_batch(batch: Batch) -> Batch:
    """Return the batch as it is: the data set collates by itself."""
    return batch
