"""Latents of several shapes in a cache: a shard has a tensor for each shape."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from t2i.data.buckets import format_shapes_line


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
