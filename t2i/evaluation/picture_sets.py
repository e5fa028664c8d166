"""Sets of pictures to be compared: of a checked source, of a plain folder, or drawn when they are asked for."""

import hashlib
import json
import random
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Generator, Tensor

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.data.manifest import find_manifest
from t2i.data.picture_files import compute_file_digest, find_images
from t2i.data.pictures import open_image, to_tensor
from t2i.errors import InputError


class PictureSet(Protocol):
    captions: list[str | None]  # of each picture, where it is known

    def __len__(self) -> int: ...
    def get_images(self, indices: list[int]) -> Tensor:
        """(B, 3, H, W), float32 in [-1, 1], each of 256 values a channel: as files hold them."""

    def source_facts(self) -> dict[str, Any]:
        """What a result says of it, in JSON."""


class SourcePictures:
    """What a manifest lists, of one split or of all."""

    def __init__(self, path: str | Path, size: int, split: str | None):
        self.path, self.split = path, split
        self.folder = find_manifest(Path(path)).parent.parent  # where what belongs to it can be kept
        self.dataset = CaptionedPictures(DataConfig(str(path), size, 0), split)
        self.captions: list[str | None] = [row["captions"][0] for row in self.dataset.manifest.iterate_rows("captions")]

    def __len__(self) -> int:
        return len(self.dataset)

    def get_images(self, indices: list[int]) -> Tensor:
        return torch.stack([self.dataset.load_image(index) for index in indices])

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits for the pictures and their captions."""
        return self.dataset.compute_digest()

    def source_facts(self) -> dict[str, Any]:
        return {"source": str(self.path), "split": self.split or "all", "count": len(self), "digest": self.digest}


class FolderPictures:
    """Picture files. Those that `t2i generate` wrote know their captions and seeds."""

    def __init__(self, folder: str | Path, size: int | None = None):
        """`size`: resize and crop to a square of this side; None: that of the first. Raises InputError for others."""
        self.folder, self.paths, self.requested_size = Path(folder), find_images(folder), size
        first = open_image(self.paths[0])
        self.size = size or first.width
        if size is None and first.width != first.height:
            raise InputError(f"{str(self.paths[0])!r} is {first.width} x {first.height}; give --image-size")
        settings = [read_image_settings(path) for path in self.paths]
        self.captions: list[str | None] = [one.get("prompt") for one in settings]
        self.seeds = [one.get("seed") for one in settings]

    def __len__(self) -> int:
        return len(self.paths)

    def get_images(self, indices: list[int]) -> Tensor:
        return torch.stack([self.load_image(self.paths[index]) for index in indices])

    def load_image(self, path: Path) -> Tensor:
        image = open_image(path)
        if self.requested_size is None and image.size != (self.size, self.size):
            sizes = f"is {image.width} x {image.height}, others are {self.size} x {self.size}"
            raise InputError(f"{str(path)!r} {sizes}; give --image-size")
        return to_tensor(image, self.size)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits for the pictures, in whatever order."""
        return hashlib.sha256(b"".join(sorted(map(compute_file_digest, self.paths)))).hexdigest()[:16]

    def source_facts(self) -> dict[str, Any]:
        found = {"folder": str(self.folder), "count": len(self), "digest": self.digest}
        return found if None in self.seeds else {**found, "seeds": self.seeds}


def read_image_settings(path: Path) -> dict[str, Any]:
    """What `t2i generate` wrote into a picture; nothing, if it is of another kind."""
    try:
        with Image.open(path, formats=["PNG"]) as file:
            settings = json.loads(file.info.get("t2i", "{}"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) and isinstance(settings.get("prompt"), str) else {}


class DrawnPictures:
    """What a pipeline draws for captions: picture i has seed `seed + i`, whoever draws it and in whatever batch."""

    def __init__(self, pipeline: Any, captions: list[str | None], count: int | None, seed: int, **settings: Any):
        """`count` pictures for captions in an order that `seed` shuffles, again from the first if there are fewer.

        None: one for each caption. `settings` go to the pipeline.
        """
        known = [caption for caption in captions if caption]
        if not known:
            raise InputError(
                "the reference has no captions to draw; `t2i data check` a source with some, or --pictures"
            )
        order = random.Random(seed).sample(known, len(known))
        self.captions: list[str | None] = [order[i % len(order)] for i in range(count or len(order))]
        self.pipeline, self.seed, self.settings = pipeline, seed, settings
        pipeline.set_progress_bar_config(disable=True)

    def __len__(self) -> int:
        return len(self.captions)

    def get_images(self, indices: list[int]) -> Tensor:
        prompts = [self.captions[index] for index in indices]
        seeds = [Generator().manual_seed(self.seed + index) for index in indices]
        images = self.pipeline(prompts, generator=seeds, output_type="pt", **self.settings).images.float().cpu()
        return (images.clamp(0, 1) * 255).round() / 127.5 - 1

    def source_facts(self) -> dict[str, Any]:
        model = self.pipeline.config.get("_name_or_path")
        seeds = {"first": self.seed, "last": self.seed + len(self) - 1}
        return {"model": str(model), "count": len(self), "seeds": seeds, "settings": self.settings}


def open_reference_set(path: Path, size: int, split: str | None) -> SourcePictures | FolderPictures:
    """The pictures of a checked source, or of a folder."""
    try:
        find_manifest(path)
    except InputError:
        if split is not None:
            raise  # only a manifest knows splits
        return FolderPictures(path, size)
    return SourcePictures(path, size, split)
