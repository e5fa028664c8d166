"""The reasons for which samples are rejected."""

from enum import Enum

from t2i.errors import InputError


class Reason(Enum):
    """Reason for rejecting a sample: the name is in the manifest, the value is for people."""

    # captions
    no_caption = "an image without a caption"
    empty_caption = "a caption of nothing but spaces"
    caption_too_long = "a caption of more than 4,096 characters, or captions of more than 64 KiB together"
    caption_not_text = "a caption that is not UTF-8 text"
    # the image's file
    no_picture = "a caption without an image"
    bad_name = "a name that is too long or not UTF-8 text"
    bad_row = "a row of the metadata that cannot be used"
    repeated_key = "several samples of the same name, so that captions cannot be assigned"
    outside_folder = "a name or link that leads out of the folder"
    missing_file = "a file that does not exist"
    not_a_file = "a folder, pipe or device instead of a file"
    unreadable = "a file that the system does not let us read"
    empty_file = "an empty file"
    too_many_bytes = "an image of more than 256 MiB"
    # the image itself
    not_a_picture = "a file that is not an image"
    unsupported_format = "an image in an unsupported format"
    animated = "an image of several frames or pages"
    truncated = "an image that ends early"
    damaged = "an image that does not decode"
    too_many_pixels = "an image of more pixels than --max-megapixels allows, according to its header"
    too_small = "an image whose short side is below --min-size"
    duplicate = "a copy of an earlier image, rejected by --drop-duplicates"
    changed = "an image whose bytes have changed since it was checked"


class RejectedSample(InputError):
    """A sample cannot be used: the reason, and details of this sample."""

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(reason.value + (f" ({detail})" if detail else ""))
        self.reason = reason
        self.detail = " ".join(detail.split())
