"""Images as requests send them and as responses return them."""

import base64
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image
from t2i.pipelines.inputs import extract_luminance, extract_transparency
from t2i.pipelines.jobs.records import build_exif, encode_png_image
from t2i.pipelines.serving.api.errors import build_field_error
from t2i.pipelines.serving.drawing import DrawnImage

from t2i.data.pictures import Convert, Reading, decode_image, measure_image, to_rgb
from t2i.data.reasons import RejectedSample

MAX_UPLOAD_PIXELS = 16_000_000
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
READING = Reading(max_pixels=MAX_UPLOAD_PIXELS)
DECODER = threading.Lock()  # a large image takes hundreds of megabytes while it is decoded: one at a time


@dataclass(frozen=True)
class GivenImage:
    """An uploaded image. pixels: upright, in RGB. transparent: white where it is transparent; None unless a part is."""

    pixels: Image.Image
    transparent: Image.Image | None


class StoredImage(Image.Image):
    """An image as its file, decoded when its pixels are used, so that requests hold files and small images alone.

    decoded: the image, of which mode and size are kept. decode: returns it again.
    """

    def __init__(self, decoded: Image.Image, decode: Callable[[], Image.Image | None]):
        super().__init__()
        self._mode, self._size, self.decode = decoded.mode, decoded.size, decode

    def decode_pixels(self) -> Image.Image:
        image = self.decode()
        assert image is not None
        return image

    def convert(self, mode: str | None = None, *arguments: Any, **options: Any) -> Image.Image:
        # Pipelines begin so, and then resize: this image stays a file while they draw
        image = self.decode_pixels()
        return image if mode == image.mode else image.convert(mode, *arguments, **options)

    def load(self) -> Any:
        # It becomes the decoded image, as stubs of Pillow's own do, and lets go of the file
        image = self.decode_pixels()
        self.__class__, self.__dict__ = image.__class__, image.__dict__  # type: ignore[assignment]
        return image.load()


def read_image(field: str, data: bytes) -> GivenImage:
    """Return an uploaded image. Raises ApiError for what is no image, or too large."""
    found: list[Image.Image] = []

    def convert(file: Image.Image, reading: Reading) -> Image.Image:
        # Its pixels are decoded once
        if file.has_transparency_data:
            found.append(mark_painted(extract_transparency(file, reading)))
        return to_rgb(file, reading)

    pixels = decode_upload(field, data, convert)
    return GivenImage(pixels, found[0] if found and found[0].getextrema() == (0, 255) else None)


def read_mask_values(data: bytes, mode: str) -> Image.Image | None:
    """Return an uploaded mask, white where it is transparent, or where it is white, by the mode "alpha" or "white".

    None for "alpha" without transparency. Raises ApiError for what is no image, or too large.
    """
    marked: list[Image.Image] = []

    def convert(file: Image.Image, reading: Reading) -> Image.Image:
        extract = extract_luminance if mode == "white" else extract_transparency
        if mode == "white" or file.has_transparency_data:
            marked.append(mark_painted(extract(file, reading)))
        return file

    decode_upload("mask", data, convert)
    return marked[0] if marked else None


def decode_upload(field: str, data: bytes, convert: Convert) -> Image.Image:
    """Decode an uploaded image. Raises ApiError."""
    with DECODER, explain_rejection(field):
        return decode_image(data, READING, convert)


def count_upload_pixels(field: str, data: bytes) -> int:
    """Return the pixels of an uploaded image by its header. Raises ApiError for what is no image, or too large."""
    with explain_rejection(field):
        width, height = measure_image(data, READING)
    return width * height


@contextmanager
def explain_rejection(field: str) -> Iterator[None]:
    """Raise ApiError for files that are rejected inside."""
    try:
        yield
    except RejectedSample as error:
        raise build_field_error(field, f"{field} cannot be read: {error}", "invalid_image") from error


def mark_painted(values: Image.Image) -> Image.Image:
    """Return white for values from half the range on, as masks of the pipelines are read; else black."""
    return values.point([255 if value >= 128 else 0 for value in range(256)])


def encode_image(drawn: DrawnImage, output_format: str, compression: int | None) -> bytes:
    """Return an image's file, with its record if it has one.

    compression: the quality of jpeg and webp, 0 to 100; None is 100.
    """
    if output_format == "png":
        return encode_png_image(drawn.image, drawn.record)
    buffer = BytesIO()
    quality = 100 if compression is None else compression
    exif = {"exif": build_exif(drawn.image, drawn.record)} if drawn.record else {}
    drawn.image.save(buffer, output_format.upper(), quality=quality, **exif)
    return buffer.getvalue()


def encode_base64(data: bytes) -> str:
    """Return bytes as the API's b64_json has them."""
    return base64.b64encode(data).decode()
