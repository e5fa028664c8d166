"""Decoding of images: bytes in, tensors out. Every image that is read passes through `to_rgb`.

Outside the models, images are (3, H, W), float32 in [-1, 1].
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import (
    InterpolationMode,
    center_crop,
    crop,
    get_image_size,
    pil_to_tensor,
    resize,
)

from t2i.data.colors import (
    SIXTEEN_BITS,
    convert_to_srgb,
    find_sample_range,
    find_srgb_transform,
    scale_to_eight_bits,
)
from t2i.data.extra_formats import ADVICE, MODULES, find_extra_format, format_name, read_jxl_size, register_extra_format
from t2i.data.reasons import Reason, RejectedSample
from t2i.errors import InputError
from t2i.limits import find_max_pixels

if TYPE_CHECKING:
    from t2i.networks.clip import CLIP

PILLOW_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # of eight bits a channel
# The formats that Pillow may try, beside those of `MODULES`. Of its some forty others, EPS runs another program and
# many are hardly maintained.
PILLOW_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
CONVERTED = "converted"  # key of a decoded image's `info`
PngImagePlugin.MAX_TEXT_MEMORY = 2**23  # bytes of decompressed text in a PNG; Pillow allows eight times as many
# First bytes of files that are often found in place of a readable image
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
    b"version https://git-lfs": (Reason.not_a_picture, "a Git LFS pointer; `git lfs pull` fetches the image"),
}


@dataclass(frozen=True)
class Reading:
    """Settings for reading images. A manifest stores it, so that training reads images as they were checked.

    profiles: convert colours by an embedded profile to sRGB.
    sample_ranges: take the range of deep grey values from the file; else it is that of 16 bits.
    max_pixels: largest width times height; None is that of `t2i.limits`.
    """

    profiles: bool = True
    sample_ranges: bool = True
    max_pixels: int | None = None


Picture = TypeVar("Picture", Image.Image, Tensor)
Convert: TypeAlias = Callable[[Image.Image, Reading], Image.Image]
READING = Reading()
OLD_READING = Reading(profiles=False, sample_ranges=False)  # of manifests that store none


def open_image(path: str | Path, convert: Convert | None = None) -> Image.Image:
    """Read an RGB image in sRGB, upright, transparency on white; or what `convert` makes of the stored one.

    Raises InputError if it does not decode or is too large.
    """
    try:
        with silence_pillow():
            return decode_image(Path(path).read_bytes(), READING, convert or to_rgb)
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


def decode_image(data: bytes, reading: Reading = READING, convert: Convert | None = None) -> Image.Image:
    """Decode the bytes of a file to an RGB image in sRGB, upright, transparency on white. Raises RejectedSample.

    convert: makes the image of the stored one; None is `to_rgb`.
    """
    with open_checked(data, reading) as file:
        file.load()
        return (convert or to_rgb)(file, reading)


def measure_image(data: bytes, reading: Reading = READING) -> tuple[int, int]:
    """Return the width and height that a file is stored with, by its header alone. Raises RejectedSample."""
    with open_checked(data, reading) as file:
        return file.size


@contextmanager
def open_checked(data: bytes, reading: Reading) -> Iterator[Image.Image]:
    """Open an image by its header, for its pixels to be decoded inside. Raises RejectedSample, for their errors too."""
    if not data:
        raise RejectedSample(Reason.empty_file)
    try:
        with Image.open(io.BytesIO(data), formats=prepare_formats(data, reading.max_pixels)) as file:
            check_image_header(file, reading.max_pixels)
            yield file
    except InputError:
        # Also RejectedSample, by the checks of the header
        raise
    except UnidentifiedImageError as error:
        raise explain_unidentified(data) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectedSample(Reason.too_many_pixels, "more than twice as many") from error
    except Exception as error:  # decoders raise errors of any type for damaged data
        if find_extra_format(data) == "JXL":  # its decoder's messages are about libraries
            raise explain_unidentified(data) from error
        is_truncated = isinstance(error, EOFError) or "truncat" in str(error).lower()
        reason = Reason.truncated if is_truncated else Reason.damaged
        raise RejectedSample(reason, f"{str(error) or type(error).__name__}"[:200]) from error


def prepare_formats(data: bytes, max_pixels: int | None = None) -> list[str]:
    """Return the formats to read that this build of Pillow has, with that of `MODULES` which the file seems to have.

    data: the file, or its beginning. Raises RejectedSample for a JPEG XL of too many pixels.
    """
    Image.init()  # loads all plugins, which fill `Image.OPEN`
    extra = find_extra_format(data)
    if extra is not None:
        register_extra_format(extra)
    if extra == "JXL" and (size := read_jxl_size(data)):
        check_image_pixels(width=size[0], height=size[1], max_pixels=max_pixels)
    return [name for name in (*PILLOW_FORMATS, *MODULES) if name in Image.OPEN]


def check_image_pixels(width: int, height: int, max_pixels: int | None) -> None:
    """Refuse an image of too many pixels. Raises RejectedSample."""
    most = max_pixels or find_max_pixels()
    if width * height > most:
        raise RejectedSample(Reason.too_many_pixels, f"{width} x {height}, at most {most / 1e6:g} million")


def check_image_header(file: Image.Image, max_pixels: int | None = None) -> None:
    """Refuse an image by its header, before a pixel is decoded. Raises RejectedSample."""
    check_image_pixels(file.width, file.height, max_pixels)
    # Phones append a second view or a depth map to an image and call the file MPO: it is not animated.
    if file.format != "MPO" and (frames := getattr(file, "n_frames", 1)) > 1:
        raise RejectedSample(Reason.animated, f"{file.format} of {frames} frames")
    if file.mode not in PILLOW_MODES and not file.mode.startswith("I"):
        # Of an image in memory the caller knows the range; in a folder, one file's values say nothing about another's
        advice = (
            "; a file does not state the range of such values, save it with 8 or 16 bits" if file.mode == "F" else ""
        )
        raise RejectedSample(Reason.unsupported_format, f"{file.format} of mode {file.mode}{advice}")


def to_rgb(image: Image.Image, reading: Reading = READING) -> Image.Image:
    """Convert to 8-bit RGB in sRGB: upright, transparency on white, deep grey scaled down.

    The result's `info` is empty but for `CONVERTED`, where the values are others than those of `OLD_READING`. Raises
    RejectedSample for values outside their range.
    """
    upright, is_converted = to_eight_bits(image, reading)
    colors = convert_to_srgb(upright) if reading.profiles else upright
    is_converted |= colors is not upright
    if colors.has_transparency_data:
        colors = Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors.convert("RGBA"))
    rgb = colors.convert("RGB")
    rgb.info = {CONVERTED: True} if is_converted else {}
    return rgb


def to_eight_bits(image: Image.Image, reading: Reading = READING) -> tuple[Image.Image, bool]:
    """Return an image upright, with 8 bits a channel, and whether it has other values than by `OLD_READING`."""
    old = SIXTEEN_BITS if image.mode.startswith("I") else None
    samples = find_sample_range(image) if reading.sample_ranges else old
    if is_turned(image):
        format_name = image.format
        image = ImageOps.exif_transpose(image)
        # The turned copy has lost it, and messages name it
        image.format = format_name
    return (image, False) if samples is None else (scale_to_eight_bits(image, samples), samples != old)


def is_turned(image: Image.Image) -> bool:
    """Return True if an image's EXIF has another orientation than upright. Broken EXIF has none."""
    if image.format == "JXL" and not getattr(image, "jpeg", False):  # its decoder turns it, unless it is a packed JPEG
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # Pillow's parsers raise errors of many types
        return False


def is_converted(path: str | Path) -> bool:
    """Return True if the values of a file's image are others than by `OLD_READING`. Its header alone is read."""
    try:
        with open(path, "rb") as start:
            formats = prepare_formats(start.read(2**16))
        with silence_pillow(), Image.open(path, formats=formats) as file:
            check_image_header(file)  # the range of mode F, which is refused, is in its pixels
            samples, old = find_sample_range(file), SIXTEEN_BITS if file.mode.startswith("I") else None
            mode = file.mode if samples is None else "L"
            return samples != old or find_srgb_transform(file.info.get("icc_profile"), mode) is not None
    except Exception:  # decoders raise errors of any type for damaged data, which are reported where it is decoded
        return False


def explain_unidentified(data: bytes) -> RejectedSample:
    """Return the rejection of bytes that no decoder accepts, by what they begin with."""
    # Text files may begin with a byte order mark and spaces
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    for prefix, (reason, detail) in FILE_SIGNATURES.items():
        if start.startswith(prefix):
            return RejectedSample(reason, detail)
    if extra := find_extra_format(data):
        if extra in Image.OPEN:
            return RejectedSample(Reason.damaged, f"a {format_name(extra)} that does not decode")
        return RejectedSample(Reason.unsupported_format, f"{format_name(extra)}; {ADVICE}")
    if data[4:12] == b"ftypavif":
        return RejectedSample(Reason.damaged, "an AVIF that does not decode")
    if data[4:8] == b"ftyp":
        return RejectedSample(Reason.unsupported_format, f"{data[8:12].decode('ascii', 'replace')}, such as a video")
    return RejectedSample(Reason.not_a_picture, f"it starts with {data[:8]!r}")


@dataclass(frozen=True)
class Resizing:
    """Settings for resizing images to squares.

    side: the new short side; or the new height and width; () for none.
    square: side of the square that is then cut out of the middle.
    interpolation: "bicubic" or "bilinear".
    rounds_down: half a pixel before the square is rounded down, as by transformers; else to an even number.
    """

    side: tuple[int, ...]
    square: int
    interpolation: str = "bicubic"
    rounds_down: bool = False

    @classmethod
    def for_clip(cls, clip: "CLIP") -> "Resizing":
        """Return the resizing after which a CLIP's own preprocessing only crops and normalizes."""
        steps = clip.resize_settings
        square = steps["side"][-1] if steps["side"] else clip.size
        return cls(steps["side"], square, steps["interpolation"], steps.get("rounds_down", False))

    @property
    def crops(self) -> bool:
        """True if the square is a part of an image, not the whole image squeezed."""
        return len(self.side) < 2

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the results."""
        return self.square, self.square

    def apply(self, picture: Picture) -> Picture:
        """Resize and crop a PIL image, or a tensor, (3, H, W)."""
        if self.side:
            picture = resize(picture, list(self.side), InterpolationMode(self.interpolation), antialias=True)
        if self.rounds_down:
            width, height = get_image_size(picture)
            # Drop a pixel at the end where the border would be uneven
            odd_height, odd_width = ((side - self.square) % 2 * (side > self.square) for side in (height, width))
            picture = crop(picture, 0, 0, height - odd_height, width - odd_width)
        return center_crop(picture, [self.square])


def to_tensor(image: Image.Image, size: int | Resizing) -> Tensor:
    """Return (3, size, size), float32 in [-1, 1]: the short side resized, then the centre cropped."""
    resizing = Resizing((size,), size) if isinstance(size, int) else size
    return pil_to_tensor(resizing.apply(image)).float() / 127.5 - 1
