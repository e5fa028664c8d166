"""Sets of images to compare: of a checked source, of a folder, or drawn on demand."""

import hashlib
import random
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms.functional import to_pil_image

from t2i.bulk import BulkJob
from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.data.dataset import stack_views
from t2i.data.manifest import find_manifest
from t2i.data.picture_files import compute_picture_digest, find_images
from t2i.data.pictures import Resizing, open_image, to_tensor
from t2i.errors import InputError
from t2i.files.image_records import DAMAGED_FILE_ERRORS, open_png, read_record


class PictureSet(Protocol):
    """Images with their captions, if known."""

    captions: list[str | None]
    left_out: set[int]  # indices of images that could not be read so far; they are blank

    def __len__(self) -> int: ...
    def get_images(self, indices: list[int]) -> Tensor:
        """Return images, (B, 3, H, W), float32 in [-1, 1], of 256 levels a channel like those of files."""

    def get_views(self, indices: list[int], resizing: Resizing) -> tuple[Tensor, Tensor]:
        """Return the images of `get_images`, and the same resized for a CLIP from what they were: (B, 3, s, s)."""

    def describe_source(self) -> dict[str, Any]:
        """Return the facts about this set that a result records, as JSON."""


class SourcePictures:
    """The images of a manifest, of one split or of all."""

    def __init__(self, path: str | Path, size: int, split: str | None):
        self.path, self.split = path, split
        self.left_out = set[int]()
        self.folder = find_manifest(Path(path)).parent.parent  # statistics can be stored here
        self.dataset = CaptionedPictures(DataConfig(str(path), size, 0), split)
        self.captions: list[str | None] = [row["captions"][0] for row in self.dataset.manifest.iterate_rows("captions")]

    def __len__(self) -> int:
        return len(self.dataset)

    def get_images(self, indices: list[int]) -> Tensor:
        return torch.stack([self.dataset.load_image(index) for index in indices])

    def get_views(self, indices: list[int], resizing: Resizing) -> tuple[Tensor, Tensor]:
        self.dataset.framing = replace(self.dataset.framing, seen=resizing)
        images, seen = stack_views([self.dataset.load_view(index) for index in indices])
        return images, images if seen is None else seen

    @cached_property
    def digest(self) -> str:
        """Return 16 hexadecimal digits of the images and their captions."""
        return self.dataset.compute_digest()

    def describe_source(self) -> dict[str, Any]:
        return {"source": str(self.path), "split": self.split or "all", "count": len(self), "digest": self.digest}


class FolderPictures:
    """Image files of a folder; files that `t2i generate` wrote contain their captions and seeds."""

    def __init__(self, folder: str | Path, size: int | None = None):
        """`size`: resize and crop to a square of this side; None: all must be squares of the first image's size."""
        self.folder, self.paths, self.requested_size = Path(folder), find_images(folder), size
        self.job, self.left_out = BulkJob(len(self.paths)), set[int]()
        first = next((image for image in map(self.open_usable_image, range(len(self))) if image is not None), None)
        self.job.check_any_left()
        assert first is not None, "not all are left out"
        self.size = size or first.width
        if size is None and first.width != first.height:
            name = str(self.paths[len(self.left_out)])
            raise InputError(f"{name!r} is {first.width} x {first.height}; give --image-size")
        settings = [read_image_settings(path) for path in self.paths]
        self.captions: list[str | None] = [values.get("prompt") for values in settings]
        self.seeds = [values.get("seed") for values in settings]

    def __len__(self) -> int:
        return len(self.paths)

    def get_images(self, indices: list[int]) -> Tensor:
        return torch.stack([to_tensor(self.open_image(index), self.size) for index in indices])

    def get_views(self, indices: list[int], resizing: Resizing) -> tuple[Tensor, Tensor]:
        images = [self.open_image(index) for index in indices]
        pixels, seen = (torch.stack([to_tensor(image, way) for image in images]) for way in (self.size, resizing))
        return pixels, seen

    def open_image(self, index: int) -> Image.Image:
        """Open an image; one of `left_out` is blank. Raises InputError for another size than the first one's."""
        image = self.open_usable_image(index)
        if image is None:
            return Image.new("RGB", (self.size, self.size))
        if self.requested_size is None and image.size != (self.size, self.size):
            sizes = f"is {image.width} x {image.height}, others are {self.size} x {self.size}"
            raise InputError(f"{str(self.paths[index])!r} {sizes}; give --image-size")
        return image

    def open_usable_image(self, index: int) -> Image.Image | None:
        """Open an image; name one that cannot be read, once, and add it to `left_out`."""
        if index in self.left_out:
            return None
        # Until it has been read: an error ends the block below
        self.left_out.add(index)
        with self.job.skip_bad_input(self.paths[index], OSError):
            image = open_image(self.paths[index])
            self.left_out.remove(index)
            return image
        return None

    @cached_property
    def digest(self) -> str:
        """Return 16 hexadecimal digits of the images, independent of their order."""
        digests = sorted(compute_picture_digest(path) for path in self.paths)
        return hashlib.sha256(b"".join(digests)).hexdigest()[:16]

    def describe_source(self) -> dict[str, Any]:
        facts = {"folder": str(self.folder), "count": len(self), "digest": self.digest}
        return facts if None in self.seeds else {**facts, "seeds": self.seeds}


def read_image_settings(path: Path) -> dict[str, Any]:
    """Return the settings that `t2i generate` wrote into an image; an empty dict for other images."""
    # A folder may hold images of any origin, also damaged ones: these have no settings
    try:
        with open_png(path) as file:
            record = read_record(file)
    except DAMAGED_FILE_ERRORS:
        return {}
    return record if record is not None and isinstance(record.get("prompt"), str) else {}


class DrawnPictures:
    """Images that a pipeline draws for captions. Image i has the seed `seed + i` in any process and batch."""

    def __init__(self, pipeline: Any, captions: list[str | None], count: int | None, seed: int, **settings: Any):
        """`count`: number of images, for captions shuffled by `seed` and repeated if necessary; None: one for each.

        `settings` go to the pipeline. Raises InputError if there are no captions.
        """
        usable = [caption for caption in captions if caption]
        if not usable:
            raise InputError("the reference has no captions to draw; check a source with captions, or give --images")
        # Shuffled, so that the first `count` are a fair sample of the reference
        order = random.Random(seed).sample(usable, len(usable))
        self.captions: list[str | None] = [order[i % len(order)] for i in range(count or len(order))]
        self.pipeline, self.seed, self.settings, self.left_out = pipeline, seed, settings, set[int]()
        self.resolved = pipeline.resolve_options(**settings, output_type="pt")
        pipeline.set_progress_bar_config(disable=True)

    def __len__(self) -> int:
        return len(self.captions)

    def get_images(self, indices: list[int]) -> Tensor:
        prompts = [self.captions[index] for index in indices]
        seeds = [Generator().manual_seed(self.seed + index) for index in indices]
        images = self.pipeline(prompts, generator=seeds, resolved=self.resolved).images.float().cpu()
        # To the levels of a file, as all other images have them
        return (images.clamp(0, 1) * 255).round() / 127.5 - 1

    def get_views(self, indices: list[int], resizing: Resizing) -> tuple[Tensor, Tensor]:
        images = self.get_images(indices)
        # As files, which have the same levels, are resized
        return images, torch.stack([to_tensor(to_pil_image(image / 2 + 0.5), resizing) for image in images])

    def describe_source(self) -> dict[str, Any]:
        model = self.pipeline.config.get("_name_or_path")
        seeds = {"first": self.seed, "last": self.seed + len(self) - 1}
        return {"model": str(model), "count": len(self), "seeds": seeds, "settings": self.settings}


def open_reference_set(path: Path, size: int, split: str | None) -> SourcePictures | FolderPictures:
    """Open the images of a checked source, or of a folder. Raises InputError if there are none."""
    try:
        find_manifest(path)
    except InputError:
        if split is not None:
            raise  # a folder has no splits
        return FolderPictures(path, size)
    return SourcePictures(path, size, split)
