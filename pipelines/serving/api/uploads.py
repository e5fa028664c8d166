"""Uploads: the files of a form, and the turns in which their images are decoded."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from t2i.pipelines.serving.api.images import GivenImage, count_upload_pixels, read_image

BYTES_PER_PIXEL = 4  # of decoded images, also of those in RGB


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
        """The image, decoded once. Raises ApiError for what is no image."""
        return read_image("image", self.data)


class UploadReader:
    """Decodes the images of requests: one image at a time, and those of one request of each key.

    A large image takes hundreds of megabytes while it is decoded; and a key that sends many images does not keep the
    others waiting for more than one of them.
    """

    def __init__(self) -> None:
        self.image_turn = asyncio.Semaphore(1)
        self.key_turns: dict[str, asyncio.Semaphore] = {}

    async def read(
        self,
        images: list[Upload],
        mask: Upload | None,
        key: str,
        hold: Callable[[int], object],
        finish: Callable[[], object],
    ) -> None:
        """Decode images, and call `finish`, which decodes the mask; in threads.

        hold: counts the memory of images before the first pixel is decoded, and then no longer that of files, which the
        caller drops. Raises ApiError for what is no image, and as `hold` does.
        """
        uploads = [("image", upload) for upload in images] + ([] if mask is None else [("mask", mask)])
        async with self.key_turns.setdefault(key, asyncio.Semaphore(1)):
            hold(await asyncio.to_thread(count_decoded_bytes, uploads))
            for upload in images:
                async with self.image_turn:
                    await asyncio.to_thread(getattr, upload, "image")
            async with self.image_turn:
                await asyncio.to_thread(finish)
        hold(-sum(len(upload.data) for _, upload in uploads))


def count_decoded_bytes(uploads: list[tuple[str, Upload]]) -> int:
    """Return the bytes of images, each with its field, when they are decoded. Raises ApiError for what is no image."""
    return BYTES_PER_PIXEL * sum(count_upload_pixels(field, upload.data) for field, upload in uploads)
