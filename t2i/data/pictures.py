"""Decoding of pictures: bytes in, tensors out.

Outside the models, pictures are (3, H, W), float32 in [-1, 1].
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize

from t2i.data.reasons import Reason, RejectedSample
from t2i.errors import InputError

MAX_PIXELS = 40_000_000  # compared with the header, before anything is decoded
PILLOW_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # of eight bits a channel
# The formats that Pillow may try. Of its some forty others, EPS runs another program and many are hardly maintained.
PILLOW_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PngImagePlugin.MAX_TEXT_MEMORY = 2**23  # bytes of decompressed text in a PNG; Pillow allows eight times as many
# First bytes of files that are often found in place of a readable picture
FILE_SIGNATURES = {
    b"\xff\xd8\xff": (Reason.damaged, "a JPEG whose header does not decode"),
    b"\x89PNG": (Reason.damaged, "a PNG whose header does not decode"),
    b"GIF8": (Reason.damaged, "a GIF whose header does not decode"),
    b"%!PS": (Reason.unsupported_format, "EPS"),
    b"\xc5\xd0\xd3\xc6": (Reason.unsupported_format, "EPS"),
    b"%PDF": (Reason.unsupported_format, "PDF"),
    b"8BPS": (Reason.unsupported_format, "PSD"),
    b"<svg": (Reason.unsupported_format, "SVG"),
    b"<?xml": (Reason.unsupported_format, "XML, perhaps SVG"),
    b"<!DOCTYPE": (Reason.not_a_picture, "a web page"),
    b"<!doctype": (Reason.not_a_picture, "a web page"),
    b"<html": (Reason.not_a_picture, "a web page"),
}


def open_image(path: str | Path) -> Image.Image:
    """Read an RGB picture, upright, transparency on white. Raises InputError if it does not decode or is too large."""
    try:
        with silence_pillow():
            return decode_image(Path(path).read_bytes())
    except RejectedSample as error:
        raise InputError(f"{str(path)!r}: {error}") from error


@contextmanager
def silence_pillow() -> Iterator[None]:
    """Suppress Pillow's warnings about metadata and sizes; what matters becomes a Reason.

    Enter it once for all threads: Python keeps one list of warning filters for the whole process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def decode_image(data: bytes) -> Image.Image:
    """Decode the bytes of a file to an RGB picture, upright, transparency on white. Raises RejectedSample."""
    if not data:
        raise RejectedSample(Reason.empty_file)
    # `Image.OPEN` has the formats of this build of Pillow, once all plugins are loaded
    Image.init()
    try:
        with Image.open(io.BytesIO(data), formats=[name for name in PILLOW_FORMATS if name in Image.OPEN]) as file:
            check_image_header(file)
            file.load()
            ImageOps.exif_transpose(file, in_place=True)
            return to_rgb(file)
    except RejectedSample:
        raise
    except UnidentifiedImageError as error:
        raise explain_unidentified(data) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectedSample(Reason.too_many_pixels, "more than twice as many") from error
    except Exception as error:  # decoders raise errors of any type for damaged data
        is_truncated = isinstance(error, EOFError) or "truncat" in str(error).lower()
        reason = Reason.truncated if is_truncated else Reason.damaged
        raise RejectedSample(reason, f"{str(error) or type(error).__name__}"[:200]) from error


def check_image_header(file: Image.Image) -> None:
    """Refuse a picture by its header, before a pixel is decoded. Raises RejectedSample."""
    if file.width * file.height > MAX_PIXELS:
        raise RejectedSample(Reason.too_many_pixels, f"{file.width} x {file.height}")
    # Phones append a second view or a depth map to a picture and call the file MPO: it is not animated.
    if file.format != "MPO" and (frames := getattr(file, "n_frames", 1)) > 1:
        raise RejectedSample(Reason.animated, f"{file.format} of {frames} frames")
    if file.mode not in PILLOW_MODES and not file.mode.startswith("I"):
        raise RejectedSample(Reason.unsupported_format, f"{file.format} of mode {file.mode}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB: transparency on white, 16-bit grey scaled down."""
    if image.mode.startswith("I"):
        image = convert_grey(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def convert_grey(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits; Pillow's own conversion would clip it to white. Raises RejectedSample."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise RejectedSample(Reason.unsupported_format, f"{image.format} of 32 bits a pixel")
    small = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        # The new image keeps no transparency, so what is transparent becomes white here
        small[values == transparent] = 255
    return Image.fromarray(small)


def explain_unidentified(data: bytes) -> RejectedSample:
    """Return the rejection of bytes that no decoder accepts, by what they begin with."""
    # Text files may begin with a byte order mark and spaces
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    for prefix, (reason, detail) in FILE_SIGNATURES.items():
        if start.startswith(prefix):
            return RejectedSample(reason, detail)
    if data[4:12] == b"ftypavif":
        return RejectedSample(Reason.damaged, "an AVIF that does not decode")
    if data[4:8] == b"ftyp":
        return RejectedSample(
            Reason.unsupported_format, f"{data[8:12].decode('ascii', 'replace')}, such as HEIC or a video"
        )
    return RejectedSample(Reason.not_a_picture, f"it starts with {data[:8]!r}")


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """Return (3, size, size), float32 in [-1, 1]: the short side resized, then the centre cropped."""
    square = center_crop(resize(image, [size], InterpolationMode.BICUBIC), [size])
    return pil_to_tensor(square).float() / 127.5 - 1
