"""Conversion to sRGB of images with an embedded colour profile, and of deep grey values to 8 bits."""

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from t2i.data.reasons import Reason, RejectedSample

PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # of the profiles that describe a mode
MAX_PROFILE_BYTES = 2**24
PHOTOMETRIC, BITS_PER_SAMPLE, SAMPLE_FORMAT = 262, 258, 339  # tags of TIFF
INVERTED, SIGNED = 0, 2  # their values: white is zero, two's complement


# Profiles


def convert_to_srgb(image: Image.Image) -> Image.Image:
    """Return an image of 8 bits a channel in sRGB: as RGB or RGBA, or itself where there is nothing to convert.

    Its profile is `image.info["icc_profile"]`. A profile that is broken or belongs to another kind of image is
    ignored. One that is sRGB, up to one level of 255, converts nothing, so that the values stay.
    """
    transform = find_srgb_transform(image.info.get("icc_profile"), image.mode)
    if transform is None:
        return image
    mode = transform.input_mode
    if not image.has_transparency_data:
        return transform.apply(image.convert(mode))
    whole = image.convert("RGBA")
    converted = transform.apply(whole.convert("RGB") if mode == "RGB" else image.convert(mode))
    converted.putalpha(whole.getchannel("A"))
    return converted


def find_srgb_transform(profile: object, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB for images of a mode with an embedded profile; None if nothing is converted."""
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE_BYTES or mode == "1":
        return None
    return build_srgb_transform(profile, {"L": "L", "LA": "L", "CMYK": "CMYK"}.get(mode, "RGB"))


@lru_cache(maxsize=16)
def build_srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB for images of a mode; None where the profile is of no use."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != PROFILE_SPACES[mode]:
            return None
        # As browsers do: colours that sRGB has stay exact, others move to its border.
        transform = ImageCms.ImageCmsTransform(
            source,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return None if mode != "CMYK" and is_identity(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):  # a broken profile
        return None


def is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return True if a transform changes no grey and none of a grid of 17 x 17 x 17 colours by more than 1."""
    greys = np.repeat(np.arange(256), 3).reshape(1, 256, 3)
    steps = np.linspace(0, 255, 17).round()
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    colors = (greys if mode == "L" else np.concatenate([greys, grid], axis=1)).astype(np.uint8)
    converted = np.asarray(transform.apply(Image.fromarray(colors).convert(mode)))
    return bool(np.abs(converted.astype(int) - colors).max() <= 1)


# Grey values of more than 8 bits


class SampleRange(NamedTuple):
    """The values of black and white."""

    black: float
    white: float


SIXTEEN_BITS = SampleRange(0, 65_535)


def find_sample_range(image: Image.Image) -> SampleRange | None:
    """Return the range of the grey values of an image; None if they have 8 bits, as Pillow delivers most.

    TIFF states it. Other files of Pillow's modes I have 16 bits. Values of modes I and F that were made in memory have
    8 bits, as Pillow's own conversions have it, unless they need 16 (I), or fit in [0, 1] (F).
    """
    if image.mode not in ("L", "F") and not image.mode.startswith("I"):
        return None
    tags = getattr(image, "tag_v2", {})
    bits, is_signed = (
        get_first_channel(tags.get(BITS_PER_SAMPLE, 0)),
        get_first_channel(tags.get(SAMPLE_FORMAT, 1)) == SIGNED,
    )
    if image.mode == "L":
        return SampleRange(-128, 127) if is_signed and bits == 8 else None
    if image.mode == "F" or (image.mode == "I" and image.format is None):
        small, large = (1.0, 255.0) if image.mode == "F" else (255, 65_535)
        found = SampleRange(0, small if np.asarray(image).max() <= small else large)
    elif 8 < bits < 32:
        found = SampleRange(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else SampleRange(0, 2**bits - 1)
    else:
        found = SIXTEEN_BITS
    # Pillow inverts only values of 8 bits and fewer
    return SampleRange(found.white, found.black) if tags.get(PHOTOMETRIC) == INVERTED else found


def get_first_channel(value: object) -> int:
    """Return a TIFF tag's value for the first channel."""
    return value[0] if isinstance(value, tuple) and value else value  # type: ignore[return-value]


def scale_to_eight_bits(image: Image.Image, samples: SampleRange) -> Image.Image:
    """Return a grey image of any mode in mode L, with its profile; values outside the range are refused.

    Pillow's own conversion would clip them to 255. Raises RejectedSample.
    """
    values = np.asarray(image)
    # Pillow has no mode of signed bytes, and reads them as unsigned ones
    values = values.view(np.int8) if samples.black == -128 else values
    low, high = min(samples), max(samples)
    if not (values.min() >= low and values.max() <= high):  # NaN is neither
        detail = f"values from {values.min():g} to {values.max():g}, not from {low:g} to {high:g}"
        raise RejectedSample(Reason.unsupported_format, f"{image.format or 'mode ' + image.mode} of {detail}")
    span = samples.white - samples.black
    scaled = np.round((values.astype(np.float64) - samples.black) * (255 / span)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        # What is transparent becomes white, as everywhere
        scaled[values == transparent] = 255
    small = Image.fromarray(scaled)
    small.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return small
