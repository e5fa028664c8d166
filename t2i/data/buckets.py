"""Buckets: shapes with about as many pixels as the square, to the nearest of which images are cropped.

A cache has latents of several shapes: a shard has a tensor for each.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from t2i.config import DataConfig
from t2i.errors import InputError

Shape = tuple[int, int]  # height and width, in pixels

MIN_AREA = 0.75  # of the square's pixels
RATIO_SPACING = 1.1  # between the ratios of two buckets, at least; more buckets would be less full
MUCH_LOST = 0.2  # fraction of an image that a crop may take without being counted


def list_bucket_shapes(image_size: int, step: int, max_ratio: float) -> list[Shape]:
    """Return the shapes whose sides are multiples of `step`, from the tallest to the widest.

    Each has at most the pixels of the square of `image_size`, and at least three quarters of them; neither side is more
    than `max_ratio` times the other. Of shapes with nearly the same ratio the largest is taken.
    """
    # Count sides in steps, the shorter one first
    budget = (image_size // step) ** 2
    pairs = [(short, long) for short in range(1, image_size // step + 1) for long in range(short, budget // short + 1)]
    pairs = [(short, long) for short, long in pairs if long <= max_ratio * short and short * long >= MIN_AREA * budget]
    chosen: list[tuple[int, int]] = []
    # The largest come first, and of equal ones the nearest to the square
    for short, long in sorted(pairs, key=lambda sides: (-sides[0] * sides[1], sides[1])):
        ratios = (math.log(long / short / (other / less)) for less, other in chosen)
        if all(abs(ratio) >= math.log(RATIO_SPACING) for ratio in ratios):
            chosen.append((short, long))
    # Each shape, tall and wide
    both = {sides for short, long in chosen for sides in ((long * step, short * step), (short * step, long * step))}
    return sorted(both, key=lambda shape: shape[1] / shape[0])


def list_image_shapes(config: DataConfig) -> list[Shape]:
    """Return the shapes that training images get: the buckets, or the square alone.

    Raises InputError for settings that allow no other shape than the square.
    """
    if not config.buckets:
        return [(config.image_size, config.image_size)]
    shapes = list_bucket_shapes(config.image_size, config.bucket_step, config.max_ratio)
    if len(shapes) == 1:
        limits = f"data.bucket_step={config.bucket_step} and data.max_ratio={config.max_ratio:g}"
        raise InputError(f"{limits} leave no shape but the square of data.image_size={config.image_size}")
    return shapes


def assign_buckets(heights: np.ndarray, widths: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """Return the number of the shape whose ratio is nearest to that of each image, (N,), int64.

    So the fraction of each image that is cropped away is as small as it can be. shapes: by rising width / height.
    """
    # The border between two shapes lies where both take the same fraction of an image
    ratios = np.log([width / height for height, width in shapes])
    return np.searchsorted((ratios[1:] + ratios[:-1]) / 2, np.log(widths / heights))


def compute_lost_fractions(
    heights: np.ndarray, widths: np.ndarray, shapes: Sequence[Shape], numbers: np.ndarray
) -> np.ndarray:
    """Return the fraction of each image that is cropped away when it gets the shape of its number, (N,)."""
    ratios = np.array([width / height for height, width in shapes])[numbers] / (widths / heights)
    return 1 - np.minimum(ratios, 1 / ratios)


def format_shapes_line(shapes: Iterable[Shape], numbers: np.ndarray, step_size: int = 0) -> str:
    """Return a line about how many images have which shape, and which shapes have fewer images than a step."""
    counts = np.bincount(numbers).tolist()
    sides = {f"{width} x {height}": count for (height, width), count in zip(shapes, counts) if count}
    line = "shapes: " + ", ".join(f"{count:,} of {name}" for name, count in sides.items())
    small = [name for name, count in sides.items() if count < step_size]
    return line + (f"; a step of {step_size:,} images repeats some of {', '.join(small)}" if small else "")


def format_losses(lost: np.ndarray, remedy: str = "", what: str = "crops") -> list[str]:
    """Return a line about the fractions of images that crops take, (N,), or none if that is little.

    remedy: what keeps more.
    """
    line = format_lost_line(lost.mean(), (lost > MUCH_LOST).sum(), len(lost), what)
    return [line + remedy] if line else []


def format_lost_line(mean: float, much: int, count: int, what: str = "crops") -> str:
    """Return a line about what crops take from images; empty if that is less than a hundredth.

    mean: fraction of an image. much: images that lose more than `MUCH_LOST`, of `count`.
    """
    if mean < 0.005 and not much:
        return ""
    return f"{what} take {mean:.0%} of the images, and more than {MUCH_LOST:.0%} of {much:,} of {count:,}"


class LatentShapes:
    """The shape of each image's latents, and their row among those of this shape in its shard.

    shapes: (N, 2), height and width. shard_size: images in a shard.
    """

    def __init__(self, shapes: Tensor, shard_size: int):
        found, numbers = np.unique(shapes.numpy(), axis=0, return_inverse=True)
        # From the tallest to the widest, as `list_bucket_shapes` has them, for the order of samples depends on it
        order = np.argsort(found[:, 1] / found[:, 0])
        self.shapes, self.shard_size = found[order], shard_size
        self.numbers = np.argsort(order)[numbers.reshape(-1)]  # of the shape of each image
        self.rows = np.zeros(len(self.numbers), np.int64)
        for number in range(len(self.shapes)):
            places = np.flatnonzero(self.numbers == number)
            shards = places // shard_size
            # Rows count from the first image of this shape in each shard
            self.rows[places] = np.arange(len(places)) - np.searchsorted(shards, shards)

    def name(self, number: int) -> str:
        """Return the name of the tensor of a shape."""
        return name_latents(*self.shapes[number].tolist())

    def count_rows(self, shard: int) -> dict[str, int]:
        """Return the number of rows of each tensor of latents in a shard."""
        counts = np.bincount(self.numbers[shard * self.shard_size : (shard + 1) * self.shard_size])
        return {self.name(number): int(count) for number, count in enumerate(counts) if count}

    def find_rows(self, indices: Sequence[int]) -> tuple[str, Tensor]:
        """Return the tensor with the latents of these images, which are of one shape and shard, and their rows."""
        numbers = np.unique(self.numbers[indices])
        assert len(numbers) == 1, "a batch is of one bucket"
        return self.name(int(numbers[0])), torch.from_numpy(self.rows[indices])

    def format_line(self, factor: int, step_size: int = 0) -> str:
        """Return `format_shapes_line` of the images. factor: pixels of a side per latent."""
        return format_shapes_line((self.shapes * factor).tolist(), self.numbers, step_size)


def name_latents(height: int, width: int) -> str:
    return f"latents_{height}x{width}"
