"""Images and masks as arguments of pipelines."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from t2i.checks import check_choice, check_integer
from t2i.data.buckets import Shape
from t2i.data.framing import Covering, compute_covering_size
from t2i.data.pictures import (
    READING,
    Reading,
    Resizing,
    open_image,
    to_eight_bits,
    to_rgb,
)
from t2i.errors import InputError
from t2i.limits import find_max_pixels
from t2i.networks.clip import CLIP

logger = logging.getLogger(__name__)

MAX_INPUT_IMAGES = 1024
MAX_IMAGE_SIZE = 4096
IMAGE_SHAPES = "an array is (H, W, 3), a tensor is (3, H, W), or several of them in one"
MASK_CHANNELS = ("luminance", "alpha")
MASK_SHAPES = "a mask is (H, W), as an array (H, W, 1 or 3), as a tensor (1 or 3, H, W); give several as a list"

ImageInput: TypeAlias = Image.Image | str | Path | np.ndarray | Tensor
ImageInputs: TypeAlias = ImageInput | Sequence[ImageInput]


class GivenImages(NamedTuple):
    """Images as the decoder and as CLIP get them: each resized once, from the image as it was given."""

    pixels: Tensor  # (N, 3, H, W), in [-1, 1]
    seen: Tensor  # (N, 3, s, s), in [-1, 1]: what CLIP sees


def read_given_images(images: ImageInputs, size: int | Shape, clip: CLIP, name: str = "image") -> GivenImages:
    """Read images for a decoder that draws this size, and for a CLIP; see `read_images`."""
    pixels, resizing = read_images(images, size, name), Resizing.for_clip(clip)
    # Where CLIP takes the same squares, the images are read once
    is_same = resizing == find_resizing(size)
    return GivenImages(pixels, pixels if is_same else read_images(images, resizing, name))


def read_images(
    images: ImageInputs, size: int | Shape | Resizing | Covering | None = None, name: str = "image"
) -> Tensor:
    """Read images, (N, 3, H, W), fp32, in [-1, 1]: resized to cover `size`, the middle cut out.

    Without a size images stay as they are; those of another size than the first are resized to its.

    Args:
        images: one or a list: PIL images; paths; arrays (H, W, 3), of uint8, or of floats in [0, 1]; tensors (3, H, W),
            likewise. Arrays and tensors may have a first dimension more: several images.
        size: (H, W), or the side of a square, in pixels. An image that has it already keeps its values. Or how images
            are resized.
        name: word for the argument, for the message.

    Raises:
        InputError: for what is no image, does not decode, is too large, or has values out of range; for none at all.
    """
    resizing = find_resizing(size) if isinstance(size, int | tuple) else size
    items = split_images(images, name)
    if not items:
        raise InputError(f"{name} has no images; give one or more")
    if len(items) > MAX_INPUT_IMAGES:
        raise InputError(f"{name} has {len(items)} images; at most {MAX_INPUT_IMAGES} are taken")
    numbered = len(items) > 1
    pixels = [read_image(item, resizing, f"{name} {i + 1}" if numbered else name) for i, item in enumerate(items)]
    # One tensor has one size: that of the first image
    for i, image in enumerate(pixels):
        if image.shape != pixels[0].shape:
            log_resizing(f"{name} {i + 1}", image, pixels[0].shape[-2:], "the first image")
            pixels[i] = resize_like_diffusers(image, pixels[0].shape[-2:])
    return torch.stack(pixels)


def find_resizing(size: int | Shape) -> Resizing | Covering:
    """Return how images are resized to cover a size, (H, W), or the side of a square. Raises InputError."""
    shape = (size, size) if isinstance(size, int) else size
    for side in shape:
        check_integer("size", side, 1, MAX_IMAGE_SIZE)
    return Resizing(shape[:1], shape[0]) if shape[0] == shape[1] else Covering(shape)


class ControlImages(NamedTuple):
    """Control images, read: (P, 3, H, W), fp32, in [-1, 1], of one size."""

    pixels: Tensor


def read_control_images(images: "ImageInputs | ControlImages") -> ControlImages:
    """Read control images; see `read_images`. Those that are read already are returned as they are."""
    return images if isinstance(images, ControlImages) else ControlImages(read_images(images, name="control_image"))


def fit_control_images(images: ControlImages, count: int, size: tuple[int, int]) -> Tensor:
    """Return control images, (count, 3, H, W), fp32, in [0, 1]: resized to cover `size`, (H, W), the middle cut out.

    Those that have `size` keep their values. One is for all, several for equal numbers in a row.
    """
    pixels = images.pixels
    # As given images are resized, so that a control image of such an image's size still fits it
    covering = compute_covering_size(pixels.shape[-2], pixels.shape[-1], size)
    if list(pixels.shape[-2:]) != covering:
        pixels = v2.functional.resize(pixels, covering, v2.InterpolationMode.BICUBIC, antialias=True).clamp(-1, 1)
    pixels = v2.functional.center_crop(pixels, list(size))
    return (pixels / 2 + 0.5).repeat_interleave(count // len(pixels), dim=0)


def read_masks(
    masks: ImageInputs, count: int, size: tuple[int, int], name: str = "mask_image", channel: str = "luminance"
) -> Tensor:
    """Read masks, (count, 1, H, W), fp32, of 0 and 1: 1, what is to be painted, from half the range on.

    Args:
        masks: one for all or one an image: as images, or with one channel, or without: (H, W). Three dimensions are
            one mask with channels; several masks without them are a list.
        count: number of images.
        size: (H, W) of the images; masks of another are resized.
        channel: "luminance", white is painted, or "alpha", what is transparent in images.

    Raises:
        InputError: for masks of another number or shape, and for those that paint nothing or everything.
    """
    check_choice("mask_channel", channel, MASK_CHANNELS)
    items = split_images(masks, name, least_dimensions=2)
    if len(items) not in (1, count):
        raise InputError(f"{name} has {len(items)} masks for {count} images; give one, or one an image")
    pixels = [read_mask(item, name, channel) for item in items]
    for i, mask in enumerate(pixels):
        if mask.shape[-2:] != size:
            log_resizing(name, mask, size, "the image")
            # As an image from -1 to 1, in which 0 is half of the range
            pixels[i] = mask = (resize_like_diffusers(2 * mask - 1, size) >= 0).float()
        if mask.all():
            raise InputError(f"{name} is all white: nothing stays; draw a new image")
        if not mask.any():
            raise InputError(f"{name} is all black: there is nothing to paint")
    return torch.stack(pixels * count if len(pixels) == 1 else pixels)


def read_mask(mask: ImageInput, name: str, channel: str = "luminance") -> Tensor:
    """Read one mask, (1, H, W), fp32, of 0 and 1."""
    extract_values = extract_transparency if channel == "alpha" else extract_luminance
    if isinstance(mask, str | Path):
        check_image_file(name, mask)
        values = np.asarray(open_image(mask, extract_values))
    elif isinstance(mask, Image.Image):
        check_pixel_count(name, mask.width, mask.height)
        try:
            values = np.asarray(extract_values(mask, READING))
        except InputError as error:
            raise InputError(f"{name} cannot be read: {error}") from error
    elif channel == "alpha":
        raise InputError(f"{name} is an array; give an image with transparency, or leave out mask_channel")
    else:
        channels = find_channel_axis(mask)
        if isinstance(mask, Tensor):
            mask = mask.detach().cpu()
            mask = (mask.float() if mask.is_floating_point() else mask).numpy()  # NumPy has no bfloat16
        values = np.asarray(mask)
        if values.ndim == 3:
            if values.shape[channels] not in (1, 3):
                raise InputError(f"{name} has the shape {values.shape}; {MASK_SHAPES}")
            # The mean of bytes is cut to a byte, as a grey image has it
            values = values.mean(axis=channels).astype(values.dtype)
        check_pixel_count(name, values.shape[-1], values.shape[-2])
    if values.dtype == np.uint8:
        values = values >= 128
    elif values.dtype != bool:
        # The comparison fails for NaN
        if not np.issubdtype(values.dtype, np.floating) or not (values.min() >= 0 and values.max() <= 1):
            raise InputError(f"{name} has values of {values.dtype}; give uint8, bool, or floats in [0, 1]")
        values = values >= 0.5
    return torch.from_numpy(values)[None].float()


def extract_luminance(mask: Image.Image, reading: Reading) -> Image.Image:
    """Return a mask's grey values, mode L, transparency white. They are no colours, so a profile changes nothing."""
    return to_rgb(mask, replace(reading, profiles=False)).convert("L")


def extract_transparency(mask: Image.Image, reading: Reading) -> Image.Image:
    """Return where an image is transparent, mode L. Raises InputError for one without transparency."""
    if not mask.has_transparency_data:
        raise InputError(f"mask_channel alpha needs an image with transparency, got mode {mask.mode}")
    return ImageOps.invert(to_eight_bits(mask, reading)[0].convert("RGBA").getchannel("A"))


def find_channel_axis(pixels: np.ndarray | Tensor) -> int:
    """Return the axis of the channels: the last one of arrays, the first one of tensors."""
    return -1 if isinstance(pixels, np.ndarray) else 0


def log_resizing(name: str, image: Tensor, size: tuple[int, ...], target: str) -> None:
    logger.warning("%s is %s and is resized to %d x %d, as %s", name, format_size(image), size[1], size[0], target)


def resize_like_diffusers(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize an image or mask, (C, H, W) in [-1, 1], to `size`, (H, W), whatever its proportions, in bytes."""
    [given] = VaeImageProcessor.numpy_to_pil((image[None] / 2 + 0.5).clamp(0, 1).movedim(1, -1).numpy())
    resized = given.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return pil_to_tensor(resized).float() / 127.5 - 1


def format_size(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]}"


def split_images(images: Any, name: str = "image", least_dimensions: int = 3) -> list[Any]:
    """Return images one by one, as they were given. least_dimensions: number in one array or tensor."""
    if isinstance(images, Image.Image | str | Path):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        if not least_dimensions <= images.ndim <= 4:
            raise InputError(f"{name} has the shape {tuple(images.shape)}; {IMAGE_SHAPES}")
        return [images] if images.ndim < 4 else list(images)
    # Bytes are a sequence of integers, but no list of images
    if isinstance(images, Sequence) and not isinstance(images, bytes | bytearray):
        return [part for item in images for part in split_images(item, name, least_dimensions)]
    raise InputError(f"{name} must be an image or a list of images, got {type(images).__name__}")


def read_image(image: ImageInput, size: Resizing | Covering | None, name: str = "image") -> Tensor:
    """Read one image, (3, H, W), fp32, in [-1, 1]. Raises InputError."""
    if isinstance(image, str | Path):
        check_image_file(name, image)
        return convert_to_tensor(open_image(image), size)
    if isinstance(image, Image.Image):
        check_pixel_count(name, image.width, image.height)
        try:
            return convert_to_tensor(to_rgb(image), size)
        except (InputError, OSError, ValueError) as error:
            raise InputError(f"{name} cannot be read: {error}") from error
    channels = find_channel_axis(image)
    values = torch.from_numpy(np.array(image)) if isinstance(image, np.ndarray) else image.detach().cpu()
    if values.shape[channels] != 3:
        raise InputError(f"{name} has the shape {tuple(values.shape)}; {IMAGE_SHAPES}")
    values = values.movedim(channels, 0)
    check_pixel_count(name, values.shape[2], values.shape[1])
    return resize_and_crop(scale_pixel_values(values, name), size)


def convert_to_tensor(image: Image.Image, size: Resizing | Covering | None) -> Tensor:
    return pil_to_tensor(image if size is None else size.apply(image)).float() / 127.5 - 1


def scale_pixel_values(values: Tensor, name: str) -> Tensor:
    """Scale pixels, (3, H, W), bytes or floats in [0, 1], to fp32 in [-1, 1]."""
    if values.dtype == torch.uint8:
        return values.float() / 127.5 - 1
    if not values.is_floating_point():
        raise InputError(f"{name} is of {values.dtype}; give uint8, or floats in [0, 1]")
    low, high = (end.item() for end in values.aminmax()) if values.numel() else (0, 0)
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise InputError(f"{name} has values from {low:g} to {high:g}; an image of floats has values in [0, 1]")
    return values.float() * 2 - 1


def resize_and_crop(values: Tensor, size: Resizing | Covering | None) -> Tensor:
    """Resize (3, H, W), as `convert_to_tensor` does with PIL images, but without rounding to bytes."""
    if size is None or values.shape[1:] == size.shape:
        return values
    return size.apply(values).clamp(-1, 1)


def check_image_file(name: str, path: str | Path) -> None:
    """Refuse a name of no file, such as a text in the place of an image."""
    try:
        is_file = Path(path).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null character
        is_file = False
    if not is_file:
        raise InputError(f"{name} {str(path)!r:.200} is no file; give an image or the path of one")


def check_pixel_count(name: str, width: int, height: int) -> None:
    """Refuse images without pixels, and those with too many."""
    if not width or not height:
        raise InputError(f"{name} is {width} x {height}: it has no pixels")
    if width * height > (most := find_max_pixels()):
        raise InputError(f"{name} is {width} x {height}; at most {most / 10**6:g} million pixels are taken")
