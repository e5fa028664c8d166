"""Framing: which part of an image is trained on, in which shape, and how CLIP sees the image.

Both come from one decoding of the file, and each is resized once.
"""

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import (
    InterpolationMode,
    center_crop,
    crop,
    get_image_size,
    pil_to_tensor,
    resize,
)

from t2i.config import DataConfig
from t2i.data.buckets import Shape
from t2i.data.pictures import Picture, Resizing, to_tensor

if TYPE_CHECKING:
    from t2i.networks.clip import CLIP

CLIP_INPUT, SQUARES = "images resized once", "the squares that are trained on"  # what CLIP sees


def describe_clip_input(clip: "CLIP", image_size: int) -> dict[str, str]:
    """Return a key and a value for what the encodings of a CLIP are made from, beside its identity.

    It is empty where CLIP sees the squares, as it did in earlier versions.
    """
    is_square = Resizing.for_clip(clip) == Resizing((image_size,), image_size)
    return {} if is_square else {"clip_input": CLIP_INPUT}


class View(NamedTuple):
    """An image in its two forms: float32 in [-1, 1]."""

    image: Tensor  # (3, H, W): what is trained on
    seen: Tensor | None  # (3, s, s): what CLIP sees; None where it is `image`


@dataclass(frozen=True)
class Framing:
    """Settings of framing. A draw of 0 is plain: the centre, not mirrored.

    crop, flip: as in DataConfig, for both models.
    seen: how CLIP's image is resized; None where it is the image that is trained on.
    for_clip: images are for CLIP alone, and `seen` makes the only form of them.
    """

    crop: str = "center"
    flip: bool = False
    seen: Resizing | None = None
    for_clip: bool = False

    def set_clip(self, clip: "CLIP", config: DataConfig, alone: bool) -> "Framing":
        """Return the framing for this CLIP. alone: the images are for CLIP alone."""
        seen = Resizing.for_clip(clip)
        # Where CLIP sees the very image that is trained on, it is not made twice
        is_trained_on = seen == Resizing((config.image_size,), config.image_size)
        if is_trained_on and not (alone or config.buckets):
            return self
        return replace(self, seen=seen, for_clip=alone)

    def frame(self, picture: Image.Image, shape: Shape, draw: int = 0) -> View:
        """Return the forms of an image for one use in training."""
        part = draw if self.crop == "random" else 0
        # CLIP sees the part that is trained on, so that z_i describes it
        seen = None if self.seen is None else to_tensor(cut_stored_part(picture, shape, part), self.seen)
        alone = self.for_clip and seen is not None
        view = View(seen, None) if alone else View(cut_image(picture, shape, part), seen)
        return flip_view(view) if self.flip and is_flipped(draw) else view


def cut_image(picture: Image.Image, shape: Shape, draw: int = 0) -> Tensor:
    """Return an image resized to cover a shape, and the part of it that a draw chooses; of draw 0, the middle."""
    if draw:
        covering = cover_shape(picture, shape)
        part = crop(covering, *draw_corner([covering.height, covering.width], shape, draw), *shape)
    else:
        part = Covering(shape).apply(picture)
    return pil_to_tensor(part).float() / 127.5 - 1


def cut_stored_part(picture: Image.Image, shape: Shape, draw: int = 0) -> Image.Image:
    """Return the part of an image that `cut_image` chooses, in the size that it is stored in; of draw 0, the whole."""
    if not draw:
        return picture
    size = compute_covering_size(picture.height, picture.width, shape)
    top, left = draw_corner(size, shape, draw)
    down, across = picture.height / size[0], picture.width / size[1]
    sides = (left * across, top * down, (left + shape[1]) * across, (top + shape[0]) * down)
    left, top, right, bottom = (round(side) for side in sides)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def draw_corner(size: list[int], shape: Shape, draw: int) -> tuple[int, int]:
    """Return where a part of an image of this size begins: the row and the column."""
    # The word makes crop and mirroring independent of each other
    rng = random.Random(f"{draw} crop")
    return rng.randint(0, size[0] - shape[0]), rng.randint(0, size[1] - shape[1])


@dataclass(frozen=True)
class Covering:
    """Resizing of images to cover a shape, of which the middle is cut out."""

    shape: Shape

    def apply(self, picture: Picture) -> Picture:
        """Resize and crop a PIL image, or a tensor, (..., H, W)."""
        return center_crop(cover_shape(picture, self.shape), list(self.shape))


def cover_shape(picture: Picture, shape: Shape) -> Picture:
    """Return an image, PIL or a tensor, resized to just cover a shape."""
    width, height = get_image_size(picture)
    size = compute_covering_size(height, width, shape)
    return resize(picture, size, InterpolationMode.BICUBIC, antialias=True)


def compute_covering_size(height: int, width: int, shape: Shape) -> list[int]:
    """Return the height and width of an image that just covers a shape."""
    if shape[0] == shape[1]:  # as torchvision computes the long side, with a rounding of its own
        short, long = shape[0], int(shape[0] * max(height, width) / min(height, width))
        return [short, long] if height <= width else [long, short]
    if shape[0] * width >= shape[1] * height:
        return [shape[0], shape[0] * width // height]
    return [shape[1] * height // width, shape[1]]


def is_flipped(draw: int) -> bool:
    """Return whether a draw mirrors its image: half of them do, and 0 does not."""
    return draw != 0 and random.Random(f"{draw} flip").random() < 0.5


def flip_view(view: View) -> View:
    """Mirror an image, left to right."""
    return View(view.image.flip(-1), None if view.seen is None else view.seen.flip(-1))
