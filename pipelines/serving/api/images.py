"""Images as requests send them and as responses return them."""

import base64
from io import BytesIO

from PIL import Image
from t2i.pipelines.jobs.records import encode_png_image
from t2i.pipelines.serving.api.errors import build_field_error
from t2i.pipelines.serving.drawing import DrawnImage

from t2i.data.pictures import Reading, decode_image
from t2i.data.reasons import RejectedSample

MAX_UPLOAD_PIXELS = 16_000_000
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
READING = Reading(max_pixels=MAX_UPLOAD_PIXELS)
PAINTED_BELOW = 128  # alpha of a pixel that is to be painted


def read_upload(field: str, data: bytes) -> Image.Image:
    """Return an uploaded image, upright, in RGB. Raises ApiError for what is no image, or too large."""
    try:
        return decode_image(data, READING)
    except RejectedSample as error:
        raise build_field_error(field, f"{field} cannot be read: {error}", "invalid_image") from error


def read_alpha(field: str, data: bytes) -> Image.Image | None:
    """Return where an uploaded image is transparent, white there and black elsewhere; None if it has no transparency.

    Raises ApiError for what is no image, or too large.
    """
    read_upload(field, data)  # its checks come before its pixels are decoded another time
    with Image.open(BytesIO(data)) as image:
        if "A" not in image.getbands() and "transparency" not in image.info:
            return None
        alpha = image.convert("RGBA").getchannel("A")
    return alpha.point([255 if value < PAINTED_BELOW else 0 for value in range(256)])


def encode_image(drawn: DrawnImage, output_format: str, compression: int | None) -> bytes:
    """Return an image's file. A PNG has its record; others have none.

    compression: the quality of jpeg and webp, 0 to 100; None is 100.
    """
    if output_format == "png":
        return encode_png_image(drawn.image, drawn.record)
    buffer = BytesIO()
    drawn.image.save(buffer, output_format.upper(), quality=100 if compression is None else compression)
    return buffer.getvalue()


def encode_base64(data: bytes) -> str:
    """Return bytes as the API's b64_json has them."""
    return base64.b64encode(data).decode()
