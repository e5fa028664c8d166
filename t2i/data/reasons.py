"""Why a sample is left out: every reason in one place."""

from enum import Enum

from t2i.errors import InputError


class Reason(Enum):
    """The name stands in the manifest, the value says it to a person."""

    # captions
    no_caption = "a picture without a caption"
    empty_caption = "a caption of nothing but spaces"
    caption_too_long = "a caption of more than 4,096 characters, or more than 64 KiB of captions"
    caption_not_text = "a caption that is not UTF-8 text"
    # where the picture should be
    no_picture = "a caption without a picture"
    bad_name = "a name that is not UTF-8 text, or too long"
    bad_row = "a row of the metadata that cannot be used"
    repeated_key = "the same name twice, so that nobody can say which caption is whose"
    outside_folder = "a name or link that leads out of the folder"
    missing_file = "a file that is not there"
    not_a_file = "no ordinary file: a folder, pipe or device"
    unreadable = "a file that the system does not let us read"
    empty_file = "a picture of no bytes"
    too_many_bytes = "a picture of more than 256 MiB"
    # the picture itself
    not_a_picture = "bytes in which no picture is recognised"
    unsupported_format = "a picture in a format that is not read"
    animated = "a picture of several frames or pages"
    truncated = "a picture that ends early"
    damaged = "a picture that does not decode"
    too_many_pixels = "a picture of more than 40 million pixels, by its header"
    too_small = "a picture whose short side is below --min-size"
    duplicate = "a further copy of a picture, left out by --drop-duplicates"
    changed = "other bytes than those that were checked"


class RejectedSample(InputError):
    """A sample is left out: why, and what about this one."""

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(reason.value + (f" ({detail})" if detail else ""))
        self.reason = reason
        self.detail = " ".join(detail.split())
