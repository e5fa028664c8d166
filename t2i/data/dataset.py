"""Data sets of captioned images."""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from t2i.config import DataConfig
from t2i.data.buckets import (
    Shape,
    assign_buckets,
    compute_lost_fractions,
    format_losses,
    format_shapes_line,
    list_image_shapes,
)
from t2i.data.captions import CaptionMix, DrawnCaption
from t2i.data.framing import Framing, View, describe_clip_input
from t2i.data.manifest import Manifest, open_manifest, open_manifests
from t2i.data.pictures import decode_image, silence_pillow
from t2i.data.reasons import RejectedSample
from t2i.diffusion.condition import Condition, TextEncoding, TokenStates
from t2i.errors import InputError
from t2i.texts import normalize_text

if TYPE_CHECKING:
    from t2i.networks.clip import CLIP

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


@dataclass
class Batch:
    """Input of a training step: captions and images, or their encodings from a cache."""

    index: Tensor  # (B,), int64: which samples
    captions: list[str] = field(default_factory=list)
    image: Tensor | None = None  # (B, 3, H, W), float32 in [-1, 1]
    seen: Tensor | None = None  # (B, 3, s, s), likewise: what CLIP sees, where it is not `image`
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


class SampleDataset(Dataset[Batch], ABC):
    """Base of the data sets that are trained on. A DataLoader reads them by `__getitems__`, in whole batches."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, keys: list[SampleIndex]) -> Batch:
        """Return the batch of these samples."""

    @abstractmethod
    def get_sample_key(self, index: int) -> str:
        """Return the name of a sample, which labels and reports of rejected samples refer to."""

    @property
    def buckets(self) -> np.ndarray | None:
        """The number of each sample's shape, (N,), of which a batch has one; None if all have the same."""
        return None

    def format_shape_lines(self, step_size: int = 0) -> list[str]:
        """Return lines about the shapes of the images. step_size: images of a step, which have one shape."""
        return []

    def format_left_out_lines(self) -> list[str]:
        """Return a line about images that are left out because of their shape, or none."""
        return []


class CaptionedPictures(SampleDataset):
    """The samples of a split of a manifest. Indexed by (index, draw): `draw` chooses the caption's variation."""

    def __init__(self, config: DataConfig, split: str | None = "train", manifest: Manifest | None = None):
        """`split` None: all samples. `manifest`: that of the split, where it is open already.

        Only the training split is cropped at random and mirrored. Raises InputError if `max_crop` leaves no sample.
        """
        self.manifest = open_manifest(config.path, split) if manifest is None else manifest
        self.config, self.split = config, split
        self.mix = CaptionMix.read(config.keyword_alone, config.in_sentence, config.sentences)
        self.reads_images = True  # False: batches have captions alone, for images that a cache encoded before
        self.framing = Framing(config.crop, config.flip) if split == "train" else Framing()
        self.shapes = list_image_shapes(config)
        self.shape_numbers, self.lost = self.measure_crops()
        # Leave out images that a crop would cut too much
        self.left_out = int((self.lost > config.max_crop).sum())  # images, by `max_crop`
        if self.left_out:
            if self.left_out == len(self.lost):
                images = f"all images of {config.path!r}" + (f", split {split!r}" if split else "")
                raise InputError(f"data.max_crop={config.max_crop:g} leaves out {images}")
            self.manifest = self.manifest.select_rows(self.lost <= config.max_crop)
            self.shape_numbers, self.lost = self.measure_crops()

    def measure_crops(self, shapes: list[Shape] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of each image's shape, and the fraction of it that is cropped away, (N,).

        shapes: to crop to; None is those that are trained on.
        """
        shapes = self.shapes if shapes is None else shapes
        heights, widths = (self.manifest.table[name].to_numpy() for name in ("height", "width"))
        numbers = assign_buckets(heights, widths, shapes)
        return numbers, compute_lost_fractions(heights, widths, shapes, numbers)

    def add_clip_view(self, clip: "CLIP", alone: bool = False) -> dict[str, str]:
        """Add the form of images that this CLIP takes to what is read, or read it alone.

        Returns identities of the CLIP's input for runs that resume; see `describe_clip_input`.
        """
        self.framing = self.framing.set_clip(clip, self.config, alone)
        return describe_clip_input(clip, self.config.image_size)

    @property
    def buckets(self) -> np.ndarray | None:
        return None if len(self.shapes) == 1 or self.framing.for_clip else self.shape_numbers

    def format_shape_lines(self, step_size: int = 0) -> list[str]:
        """Return lines about the shapes of the images, what crops take from them, and how many are left out."""
        if not self.config.buckets or self.framing.for_clip:
            return self.format_crop_lines()
        steps = 0 if self.buckets is None else step_size
        return [format_shapes_line(self.shapes, self.shape_numbers, steps), *self.format_crop_lines()]

    def format_left_out_lines(self) -> list[str]:
        if not self.left_out:
            return []
        count, images = len(self) + self.left_out, "held-out images" if self.split == "held_out" else "images"
        return [f"data.max_crop={self.config.max_crop:g} leaves out {self.left_out:,} of {count:,} {images}"]

    def format_crop_lines(self) -> list[str]:
        """Return lines about what crops take from the images, and how many are left out."""
        lines, for_clip, seen = self.format_left_out_lines(), self.framing.for_clip, self.framing.seen
        if not for_clip:
            lines += format_losses(self.lost, "" if self.config.buckets else "; data.buckets=true keeps shapes")
        # Without buckets both models see the same square
        if seen is not None and (for_clip or self.config.buckets) and seen.crops:
            lines += format_losses(self.measure_crops([(1, 1)])[1], what="CLIP sees squares: crops")
        if for_clip and self.config.buckets:
            lines.append("data.buckets=true makes no shapes here, for CLIP alone sees the images")
        return lines

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitems__(self, keys: list[SampleIndex]) -> Batch:
        """Return the batch of these samples, which are of one bucket; a DataLoader calls this.

        An image that is gone or has changed is replaced by the next readable sample, and `rejected` lists it. Raises
        InputError if a hundred in a row, or all, cannot be read.
        """
        if not self.reads_images:
            drawn = [self.draw_caption(index, draw) for index, draw in keys]
            index = torch.tensor([index for index, _ in keys])
            return Batch(index, [caption.text for caption in drawn], phrases=[caption.phrases for caption in drawn])
        batch, views = self.read_views(keys)
        batch.image, batch.seen = stack_views(views)
        return batch

    def read_views(self, keys: list[SampleIndex], shape: Shape | None = None) -> tuple[Batch, list[View]]:
        """Return the batch of these samples without its images, and these. shape: None is that of each image."""
        rejected: list[tuple[str, str]] = []
        samples = [self.read_next_view(index, draw, rejected, shape) for index, draw in keys]
        captions = [self.get_caption(index, draw) for (index, _), (_, draw) in zip(samples, keys)]
        index = torch.tensor([index for index, _ in samples])
        return Batch(index, captions, rejected=rejected), [view for _, view in samples]

    def read_next_view(
        self, index: int, draw: int, rejected: list[tuple[str, str]], shape: Shape | None = None
    ) -> tuple[int, View]:
        """Return the first readable sample from `index` on and its image; add those before it to `rejected`."""
        tries, shape = min(MAX_READ_ATTEMPTS, len(self)), shape or self.get_shape(index)
        # From the end of the data on to its beginning
        for i in (number % len(self) for number in range(index, index + tries)):
            try:
                return i, self.read_view(i, draw, shape)
            except RejectedSample as error:
                rejected.append((self.get_sample_key(i), error.reason.name))
        counts = Counter(reason for _, reason in rejected[-tries:])
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        raise InputError(f"{tries} images in a row cannot be read ({reasons}), the first is {rejected[-tries][0]!r}")

    def get_shape(self, index: int) -> Shape:
        """Return the height and width in which an image is trained on."""
        return self.shapes[self.shape_numbers[index]]

    def read_view(self, index: int, draw: int = 0, shape: Shape | None = None) -> View:
        """Return an image as a draw frames it. shape: None is its own. Raises RejectedSample."""
        data = self.manifest.read_image(index)
        with silence_pillow():
            picture = decode_image(data, self.manifest.reading)
            return self.framing.frame(picture, shape or self.get_shape(index), draw)

    def load_view(self, index: int) -> View:
        """Return an image as the draw 0 frames it. Raises InputError with the sample's key."""
        try:
            return self.read_view(index)
        except RejectedSample as error:
            raise InputError(
                f"{self.get_sample_key(index)!r}: {error}; another `t2i data check` leaves it out"
            ) from error

    def load_image(self, index: int) -> Tensor:
        """Return an image, (3, H, W), float32 in [-1, 1]. Raises InputError with the sample's key."""
        return self.load_view(index).image

    def draw_caption(self, index: int, draw: int) -> DrawnCaption:
        """Return the caption of a draw, and the phrases that it is made of."""
        captions, keywords = self.manifest.get_values(index, "captions", "keywords")
        return self.mix.draw(captions, keywords, random.Random(draw))

    def get_caption(self, index: int, draw: int) -> str:
        return self.draw_caption(index, draw).text

    def get_sample_key(self, index: int) -> str:
        return self.manifest.get_values(index, "key")[0]

    def get_record(self, index: int) -> SampleText:
        key, captions, keywords, split = self.manifest.get_values(index, "key", "captions", "keywords", "split")
        return SampleText(index, key, captions[0], keywords, split)

    def iterate_texts(self) -> Iterator[str]:
        """Yield all words of each sample as one text, and the sentences of captions, to train a tokenizer on."""
        for row in self.manifest.iterate_rows("captions", "keywords"):
            yield " ".join([*row["captions"], *row["keywords"]])
        yield from self.mix.sentences

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
        for image, _ in self.iterate_views(count, batch_size):
            yield image

    def iterate_views(self, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the images of `iterate_images`, and what CLIP sees where that differs."""
        # Every k-th, with the least k that gives at most `count`
        chosen = np.arange(len(self))[:: -(-len(self) // count)]
        numbers = np.zeros(len(chosen)) if self.buckets is None else self.buckets[chosen]
        for part in iterate_equal_parts(numbers, batch_size):
            yield stack_views([self.read_next_view(int(i), 0, [])[1] for i in chosen[part]])


def iterate_equal_parts(numbers: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield the places of equal numbers, (at most size,) at a time, in order where all are equal."""
    for number in np.unique(numbers):
        places = np.flatnonzero(numbers == number)
        yield from (places[start : start + size] for start in range(0, len(places), size))


def stack_views(views: list[View]) -> tuple[Tensor, Tensor | None]:
    """Return images of one shape, (B, 3, H, W), and what CLIP sees of them, (B, 3, s, s), where that differs."""
    seen = [view.seen for view in views if view.seen is not None]
    return torch.stack([view.image for view in views]), torch.stack(seen) if seen else None


def open_datasets(config: DataConfig) -> dict[str, CaptionedPictures]:
    """Open the data set of every split that has images: "train", and "held_out" if there is one.

    The manifest is read once. Raises InputError if there is none, or nothing to train on.
    """
    manifests = open_manifests(config.path)
    return {str(split): CaptionedPictures(config, split, manifest) for split, manifest in manifests.items()}
