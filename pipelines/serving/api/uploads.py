"""Uploads: the files of a form, and the turns in which their images are checked."""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

from t2i.pipelines.serving.api.errors import build_size_error
from t2i.pipelines.serving.api.images import GivenImage, StoredImage, count_upload_pixels, read_image
from t2i.pipelines.serving.draw_request import BYTES_PER_PIXEL


@dataclass(frozen=True)
class Upload:
    """A file of a form."""

    name: str
    data: bytes = field(repr=False)

    @property
    def base_name(self) -> str:
        """The name without folders, as records have it."""
        # Some clients send a whole path, also one of Windows
        return self.name.replace("\\", "/").rsplit("/", 1)[-1][:200] or "image"

    @cached_property
    def image(self) -> GivenImage:
        """The image: decoded here as a check, and again when its pixels are used. Raises ApiError."""
        data, found = self.data, read_image("image", self.data)
        pixels, mask = StoredImage(found.pixels, lambda: read_image("image", data).pixels), found.transparent
        return GivenImage(pixels, mask and StoredImage(mask, lambda: read_image("image", data).transparent))


class UploadReader:
    """Checks the images of requests by decoding them: one image at a time.

    A key that sends many images keeps the others waiting for one of them at a time; without keys, a request does.
    max_bytes: of the decoded images of a request.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.image_turn = asyncio.Semaphore(1)
        self.key_turns: dict[str, asyncio.Semaphore] = {}

    async def read(
        self,
        images: list[Upload],
        mask: Upload | None,
        key: str,
        finish: Callable[[], object],
    ) -> None:
        """Check images, and call `finish`, which checks the mask; in threads.

        Raises ApiError for what is no image, and before a pixel is decoded for images that are too large together.
        """
        uploads = [("image", upload) for upload in images] + ([] if mask is None else [("mask", mask)])
        if await asyncio.to_thread(count_decoded_bytes, uploads) > self.max_bytes:
            # It would never fit, however often it is sent again
            raise build_size_error("the request with its decoded images", self.max_bytes)
        async with self.key_turns.setdefault(key, asyncio.Semaphore(1)) if key else nullcontext():
            for upload in images:
                async with self.image_turn:
                    await asyncio.to_thread(getattr, upload, "image")
            async with self.image_turn:
                await asyncio.to_thread(finish)


def count_decoded_bytes(uploads: list[tuple[str, Upload]]) -> int:
    """Return the bytes of images, each with its field, when they are decoded. Raises ApiError for what is no image."""
    return BYTES_PER_PIXEL * sum(count_upload_pixels(field, upload.data) for field, upload in uploads)
