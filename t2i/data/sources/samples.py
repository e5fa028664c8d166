"""Samples and sources: the types, parsing of captions and columns, and guarded reading of files."""

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

from t2i.data.reasons import Reason, RejectedSample
from t2i.errors import InputError
from t2i.texts import decode_text, normalize_text, split_lines

SUPPORTED_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg", ".jxl", ".pgm", ".png", ".ppm",
    ".tif", ".tiff", ".webp",
}  # fmt: skip
# Images in formats that are not read. Samples with them are rejected without opening the file.
UNSUPPORTED_SUFFIXES = {
    ".ai", ".arw", ".cr2", ".cr3", ".dng", ".eps", ".exr", ".ico", ".jp2", ".nef", ".orf", ".pdf",
    ".ps", ".psd", ".raf", ".rw2", ".svg", ".svgz", ".tga", ".wmf", ".xcf",
}  # fmt: skip
IMAGE_SUFFIXES = SUPPORTED_SUFFIXES | UNSUPPORTED_SUFFIXES
CAPTION_SUFFIXES = (".txt", ".caption")  # in order of preference
CAPTION_COLUMNS = ("text", "caption", "captions")
OTHER_CAPTION_COLUMNS = ("prompt", "prompts", "description", "alt_text", "alt")  # where there is none of the usual
HELD_OUT_NAMES = {"held_out", "test", "validation", "valid", "val", "dev", "eval"}

MAX_CAPTION_LENGTH = 4_096  # characters
MAX_TEXT_SIZE = 65_536  # bytes of a text file; characters of all captions, or of all keywords, of an image
MAX_NAME_LENGTH = 1_024
MAX_IMAGE_BYTES = 2**28


@dataclass
class Sample:
    """The place of an image and its captions, or the problem that rejects it."""

    key: str
    file: str = ""  # relative to the source's root, POSIX
    offset: int = 0
    size: int | None = None  # None: the whole file
    captions: list[str] = field(default_factory=list)
    keywords: list[str] = field(default_factory=list)
    labels: dict[str, list[str]] = field(default_factory=dict)  # by column, of those given by --label-column
    split: str | None = None  # train, held_out, or None: the check decides
    problem: RejectedSample | None = None

    def read_row(self, row: dict[str, Any], columns: "Columns", split: str | None) -> None:
        """Take captions, keywords, labels and split from a row of a table; `split`: where the row has none.

        Raises RejectedSample.
        """
        self.captions = parse_captions(row.get(str(columns.caption)))
        self.keywords = parse_keywords(row.get("keywords"))
        self.labels = {column: parse_labels(row.get(column)) for column in columns.labels}
        self.split = parse_split(row.get("split")) or split


@dataclass
class SourceNotes:
    """Facts about a source beside its samples."""

    ignored: Counter[str] = field(default_factory=Counter)  # files by suffix
    shards: list[str] = field(default_factory=list)  # a line for each problem
    containers: dict[str, int] = field(default_factory=dict)  # files with many images: sizes in bytes

    def count_ignored(self, files: Iterable[Path]) -> None:
        self.ignored.update(file.suffix.lower() or "no suffix" for file in files)


@dataclass
class Source:
    """A collection of samples, which are read in order."""

    root: Path | None  # folder that file names are relative to; None: the folder of the manifest
    iterate_samples: Callable[[Path], Iterator[Sample]]  # takes a folder for the files that the source must write
    notes: SourceNotes
    total: int | None = None  # number of samples, or about that, if known before they are read


@dataclass(frozen=True)
class Columns:
    """Column names from the command line; None: chosen by name and type."""

    image: str | None = None
    caption: str | None = None
    labels: tuple[str, ...] = ()  # the first one holds the classes of classifiers

    def choose_texts(self, names: list[str], table: Path | str) -> "Columns":
        """Return the columns with that of the captions in a table with these `names`. Raises InputError."""
        caption = choose_column("caption", self.caption, CAPTION_COLUMNS, names, table, OTHER_CAPTION_COLUMNS)
        for label in self.labels:
            choose_column("label", label, (), names, table)
        return replace(self, caption=caption)

    def check_unset(self, *kinds: str, reason: str) -> None:
        """Raise InputError if the command line names a column of these kinds, which the source does not have."""
        given = {"image": [self.image], "caption": [self.caption], "label": self.labels}
        for kind in kinds:
            for column in given[kind]:
                if column is not None:
                    raise InputError(f"--{kind}-column {column!r} does not apply: {reason}")


def is_image_file(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def build_file_sample(name: str) -> Sample:
    """Return the sample of an image in a file of its own."""
    try:
        key = check_name(name)
    except RejectedSample as error:
        return Sample(escape_name(name), problem=error)
    sample = Sample(key, key)
    if Path(name).suffix.lower() in UNSUPPORTED_SUFFIXES:
        sample.problem = RejectedSample(Reason.unsupported_format, Path(name).suffix)
    return sample


def check_name(name: str) -> str:
    """Return a name if the manifest can store it. Raises RejectedSample."""
    if len(name) > MAX_NAME_LENGTH or "\0" in name or not is_utf8(name):
        raise RejectedSample(Reason.bad_name, escape_name(name))
    return name


def escape_name(name: str) -> str:
    return name[:MAX_NAME_LENGTH].encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def is_utf8(text: str) -> bool:
    """Return False for lone surrogates, which stand for bytes of a file name or JSON that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_caption_bytes(data: bytes) -> list[str]:
    """Return the lines of a text file that are not empty. Raises RejectedSample."""
    if len(data) > MAX_TEXT_SIZE:
        raise RejectedSample(Reason.caption_too_long, f"more than {MAX_TEXT_SIZE:,} bytes of text")
    try:
        return parse_captions(split_lines(decode_text(data)))
    except UnicodeDecodeError as error:
        raise RejectedSample(Reason.caption_not_text, str(error)) from error


def parse_captions(value: Any) -> list[str]:
    """Return the captions in a value: a text or a list of texts. Raises RejectedSample."""
    if value is None or value == []:
        raise RejectedSample(Reason.no_caption)
    captions = parse_texts(value, Reason.caption_not_text)
    if not captions:
        raise RejectedSample(Reason.empty_caption)
    for caption in captions:
        if len(caption) > MAX_CAPTION_LENGTH:
            raise RejectedSample(Reason.caption_too_long, f"{len(caption):,} characters: {caption[:40]} ...")
    return captions


def parse_texts(value: Any, reason: Reason) -> list[str]:
    """Return the texts that are not empty in a text or a list of texts. Raises RejectedSample."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RejectedSample(reason, f"{escape_name(repr(value)[:80])} is neither a text nor a list of texts")
    if any("\0" in text or not is_utf8(text) for text in texts):
        raise RejectedSample(reason, "it contains a NUL or an incomplete character")
    if sum(map(len, texts)) > MAX_TEXT_SIZE:
        raise RejectedSample(Reason.caption_too_long, f"more than {MAX_TEXT_SIZE:,} characters")
    return list(filter(None, map(normalize_text, texts)))


def choose_column(
    kind: str,
    column: str | None,
    default_names: tuple[str, ...],
    names: list[str],
    table: Path | str,
    other_names: tuple[str, ...] = (),
) -> str:
    """Return `column` if given, else the only one of `names` with a default name, or else with one of `other_names`.

    Raises InputError with the columns of the table if there is none, or more than one.
    """
    columns = f"the columns of {str(table)!r}: {', '.join(map(escape_name, names))}"
    if column is not None:
        if column not in names:
            raise InputError(f"no column {column!r}; {columns}")
        return column
    candidates = [name for name in names if name.strip().lower() in default_names]
    candidates = candidates or [name for name in names if name.strip().lower() in other_names]
    if len(candidates) != 1:
        number = "several columns" if candidates else "no column"
        raise InputError(f"{number} for the {kind}; give --{kind}-column; {columns}")
    return candidates[0]


def iterate_batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | RejectedSample]:
    """Yield the rows of a batch; a row whose text is not UTF-8 is a RejectedSample."""
    # Arrow does not validate texts: the error comes with the conversion, for the batch as a whole.
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield RejectedSample(Reason.caption_not_text, str(error))


def parse_keywords(value: Any) -> list[str]:
    """Return the keywords in a list of texts or a text with commas. Raises RejectedSample."""
    if value is None:
        return []
    return parse_texts(value.split(",") if isinstance(value, str) else value, Reason.bad_row)


def parse_labels(value: Any) -> list[str]:
    """Return the labels in a text, an integer or a list of them; an empty list for None. Raises RejectedSample."""
    # Data sets for classification often number their classes
    values = value if isinstance(value, list) else [value]
    texts = [str(item) if isinstance(item, int) else item for item in values if item is not None]
    return parse_texts(texts, Reason.bad_row)


def parse_split(value: Any) -> str | None:
    """Return train or held_out for any usual name of a split, None for no value. Raises RejectedSample."""
    if value is None or value == "":
        return None
    name = str(value).lower()
    if name == "train":
        return "train"
    if name in HELD_OUT_NAMES:
        return "held_out"
    allowed = f"train or one of {', '.join(sorted(HELD_OUT_NAMES))}"
    raise RejectedSample(Reason.bad_row, f"split must be {allowed}, got {value!r}"[:200])


def infer_splits(names: list[str]) -> list[str | None]:
    """Return the splits of files or folders by names such as test/a.tar and train-00000.parquet.

    All are None unless there are names of both splits.
    """
    splits = [infer_split(name) for name in names]
    return splits if "train" in splits and "held_out" in splits else [None] * len(names)


def infer_split(name: str) -> str | None:
    for part in PurePosixPath(name.lower()).parts:
        word = re.split(r"[-.]", part)[0]
        if word == "train" or word in HELD_OUT_NAMES:
            return parse_split(word)
    return None


def open_inside_root(root: Path, name: str) -> BinaryIO:
    """Open an ordinary file below `root`, an absolute path without links, to read it. Raises RejectedSample.

    Nothing else is ever opened: opening a pipe can hang, and opening a device can have effects.
    """
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise RejectedSample(Reason.outside_folder, name)
    try:
        # A link may lead out of the root although its name does not
        path = (root / name).resolve(strict=True)
        if not path.is_relative_to(root):
            raise RejectedSample(Reason.outside_folder, f"a link to {path}")
        if not path.is_file():
            raise RejectedSample(Reason.not_a_file, name)
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RejectedSample(Reason.missing_file, name) from error
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name too long, no permission
        raise error if isinstance(error, RejectedSample) else RejectedSample(Reason.unreadable, str(error)) from error


def read_range(root: Path, name: str, offset: int, size: int | None) -> bytes:
    """Return the bytes of an image; `size` None: of the whole file. Raises RejectedSample."""
    if size is not None and size > MAX_IMAGE_BYTES:
        raise RejectedSample(Reason.too_many_bytes, f"{size:,}")
    with open_inside_root(root, name) as file:
        try:
            # One byte more than the limit is enough to see that a file is too large
            file.seek(offset)
            data = file.read(MAX_IMAGE_BYTES + 1 if size is None else size)
        except OSError as error:
            raise RejectedSample(Reason.unreadable, str(error)) from error
    if len(data) > MAX_IMAGE_BYTES:
        raise RejectedSample(Reason.too_many_bytes)
    return data


def read_unchanged_range(path: str, offset: int, size: int, change_time: int) -> bytes | None:
    """Return bytes of a file that was last changed at `change_time`; None if it is gone or has changed since."""
    # The first look is at the path, for opening a pipe could hang; the second at the file that was read.
    if read_change_time(path) != change_time:
        return None
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
            return data if len(data) == size and read_change_time(file.fileno()) == change_time else None
    except OSError:
        return None


def read_change_time(file: str | int) -> int:
    """Return when an ordinary file, by path or descriptor, was last changed, in nanoseconds; 0 if it is none."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return 0
    # ctime reveals what mtime may hide: a file that was moved here, or whose old mtime was restored.
    return max(status.st_mtime_ns, status.st_ctime_ns) if stat.S_ISREG(status.st_mode) else 0
