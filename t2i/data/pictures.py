"""Pictures: files in, tensors out.

Pictures are (3, H, W), float32, in [-1, 1] everywhere outside the models.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from t2i.errors import InputError

MAX_PIXELS = 40_000_000  # a larger picture is refused from its header


def open_picture(path: str | Path) -> Image.Image:
    """An RGB picture, upright, transparency on white. Raises InputError if it does not decode or is too large."""
    with decoding(path) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


@contextmanager
def decoding(path: str | Path) -> Iterator[Image.Image]:
    """An open picture whose header has been read; what is wrong with it, also later, as an InputError."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise InputError(f"{str(path)!r} has {file.width} x {file.height} pixels; at most {MAX_PIXELS:,}")
            yield file
    except InputError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"{str(path)!r} does not decode as a picture ({error})") from error


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """-> (3, size, size), float32 in [-1, 1]: short side resized, centre cropped."""
    transform = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])
    return transform(image).float() / 127.5 - 1
