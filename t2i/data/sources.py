"""Where captioned pictures come from: folders with text files or metadata, tars, parquet files, the hub.

A source gives samples: where the bytes of a picture lie, and its captions. No picture is decoded here. All kinds come
down to the same three things, a file, an offset and a size, so that one way of reading serves them all.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from t2i.data.reasons import Reason, Rejected
from t2i.errors import InputError

PICTURES = {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Pictures too, but in formats that are not read; their files are not opened.
UNREAD = {".arw", ".cr2", ".cr3", ".dng", ".eps", ".exr", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".nef", ".orf"}
UNREAD |= {".ai", ".pdf", ".ps", ".psd", ".raf", ".rw2", ".svg", ".svgz", ".tga", ".wmf", ".xcf"}
PICTURE_SUFFIXES = PICTURES | UNREAD
CAPTIONS = (".txt", ".caption")  # the first wins
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption", "captions")
HELD_OUT = {"held_out", "test", "validation", "valid", "val", "dev", "eval"}
LEFTOVER = (".unfinished", ".replaced")  # of a folder that was being written

MAX_CAPTION = 4_096  # characters
MAX_CAPTIONS = 65_536  # bytes of a text file, characters of all captions and keywords of one picture
MAX_LINE = 2**20  # of metadata.jsonl
MAX_NAME = 1_024
LOOKED_AT = 100  # rows of a metadata file that tell its columns


@dataclass
class Sample:
    """A picture's place and its captions, or why it has none."""

    key: str
    file: str = ""  # relative to the source's root, POSIX
    offset: int = 0
    size: int | None = None  # None: the whole file
    captions: list[str] = field(default_factory=list)
    keywords: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # of a column that the user names
    split: str | None = None  # train, held_out, or None if the source does not say
    problem: Rejected | None = None


@dataclass
class Notes:
    """What a source saw beside its samples."""

    ignored: Counter[str] = field(default_factory=Counter)  # files by suffix
    shards: list[str] = field(default_factory=list)  # what is wrong with which shard
    containers: dict[str, int] = field(default_factory=dict)  # files that hold many pictures, with their sizes


@dataclass
class Source:
    """`samples(work)` gives every sample once; a source that must write files of its own does so below `work`."""

    root: Path | None  # what files are relative to; None: the folder of the manifest
    samples: Callable[[Path], Iterator[Sample]]
    notes: Notes
    total: int | None = None  # samples, if known before


@dataclass(frozen=True)
class Columns:
    """What the user says of the columns; None: found by name."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None  # None: there are no labels


def open_source(name: str, columns: Columns) -> Source:
    """The source that a path or a name on the hub stands for. Raises InputError if there is none to read."""
    from t2i.data import rows, tars

    path = Path(name)
    here = path.exists() or path.parts[:1] and Path(path.parts[0]).exists()  # data/typo is no name on the hub
    if name.startswith("hub:") or (not here and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)):
        return rows.open_hub(name.removeprefix("hub:"), columns)
    if not path.exists():
        raise InputError(f"no file or folder {name!r}; give one, or hub:ORGANISATION/NAME")
    path = path.resolve()
    if path.is_file():
        if tars.is_compressed(path):
            raise InputError(f"{name!r} is compressed and cannot be read by offset; unpack it to a plain .tar")
        if path.suffix.lower() == ".tar":
            return tars.open_tars(path.parent, [path], columns)
        if path.suffix.lower() == ".parquet":
            return rows.open_parquet(path.parent, [path], columns)
        raise InputError(f"{name!r} is neither a .tar nor a .parquet file; give one of them, or a folder")
    if not path.is_dir():
        raise InputError(f"{name!r} is no ordinary file and no folder")
    files = list(walk(path, notes := Notes()))
    if any(file.name in METADATA for file in files):
        return open_metadata(path, files, notes, columns)
    shards = [file for file in files if tars.is_tar(file)]
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    pairs = has_pairs(files)  # then a .tar or .parquet may have strayed in
    if shards and (not pairs or any(map(tars.holds_pictures, shards))):
        return tars.open_tars(path, files, columns, notes)
    if tables and (not pairs or any(map(rows.holds_pictures, tables))):
        return rows.open_parquet(path, files, columns, notes)
    return open_sidecars(path, files, notes, columns)


def refuse_column(what: str, given: str | None, where: str) -> None:
    if given is not None:
        raise InputError(f"--{what}-column {given!r} says nothing here: {where}")


def walk(root: Path, notes: Notes) -> Iterator[Path]:
    """The files below a folder, in order of their names, without hidden ones and those that a check wrote."""

    def stop(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=stop):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        notes.ignored.update({"linked folders": len(links)} if links else {})
        folders[:] = sorted(name for name in folders if name not in links and not skipped(here / name))
        for name in sorted(names):
            if name.startswith("."):
                notes.ignored["hidden files"] += 1
            else:
                yield here / name


def skipped(folder: Path) -> bool:
    return folder.name.startswith(".") or folder.name.endswith(LEFTOVER) or written_by_check(folder)


def written_by_check(folder: Path) -> bool:
    return (folder / "manifest.parquet").is_file() and (folder / "report.json").is_file()


def ignore(path: Path, notes: Notes) -> None:
    notes.ignored[path.suffix.lower() or "no suffix"] += 1


# ---- a picture and a text file of the same name ----


def open_sidecars(root: Path, files: list[Path], notes: Notes, columns: Columns) -> Source:
    """`name.png` with `name.txt` or `name.caption`, each line of which is a caption."""
    for what, given in (("image", columns.image), ("caption", columns.caption), ("label", columns.label)):
        refuse_column(what, given, "pictures with text files have no columns")
    pictures = [file for file in files if is_picture(file)]
    if not pictures:
        kinds = "name.png with name.txt, pictures with metadata.jsonl or .csv, .tar or .parquet files"
        raise InputError(f"no pictures in {str(root)!r}; it can hold {kinds}")
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in CAPTIONS}
    pictured = Counter(file.with_suffix("") for file in pictures)
    lone = [file for file in files if file.suffix.lower() in CAPTIONS and file.with_suffix("") not in pictured]
    for file in files:
        if file.suffix.lower() not in CAPTIONS and not is_picture(file):
            ignore(file, notes)

    def samples(work: Path) -> Iterator[Sample]:
        for picture in pictures:
            sample = located(relative(picture, root))
            if sample.problem is None:
                try:
                    if picture.with_suffix("") not in texts:
                        raise Rejected(Reason.no_caption, f"no {picture.stem}.txt")
                    if (count := pictured[picture.with_suffix("")]) > 1:
                        raise Rejected(Reason.repeated_key, f"{count} pictures {picture.stem} with one text")
                    sample.captions = read_sidecar(root, picture)
                except Rejected as error:
                    sample.problem = error
            yield sample
        for file in lone:
            yield Sample(printable(relative(file, root)), problem=Rejected(Reason.no_picture))

    return Source(root, samples, notes, len(pictures) + len(lone))


def has_pairs(files: list[Path]) -> bool:
    """Whether any picture has a text file of its name."""
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in CAPTIONS}
    return any(is_picture(file) and file.with_suffix("") in texts for file in files)


def is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_SUFFIXES


def relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def located(name: str) -> Sample:
    """The sample of a picture with a file of its own."""
    try:
        key = checked_name(name)
    except Rejected as error:
        return Sample(printable(name), problem=error)
    sample = Sample(key, key)
    if Path(name).suffix.lower() in UNREAD:
        sample.problem = Rejected(Reason.unsupported_format, Path(name).suffix)
    return sample


def checked_name(name: str) -> str:
    """A name that can be written down. Raises Rejected."""
    if len(name) > MAX_NAME or "\0" in name or not is_utf8(name):
        raise Rejected(Reason.bad_name, printable(name))
    return name


def printable(name: str) -> str:
    return name[:MAX_NAME].encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def is_utf8(text: str) -> bool:
    """False for lone surrogates: bytes of a file name, or of JSON, that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_sidecar(root: Path, picture: Path) -> list[str]:
    for suffix in CAPTIONS:
        for text in (picture.with_suffix(suffix), picture.with_suffix(suffix.upper())):
            if text.exists() or text.is_symlink():
                with open_inside(root, relative(text, root)) as file:
                    return captions_of_bytes(file.read(MAX_CAPTIONS + 1))
    raise Rejected(Reason.no_caption, f"no {picture.stem}.txt")


def captions_of_bytes(data: bytes) -> list[str]:
    """Each line that is not empty is a caption. Raises Rejected."""
    if len(data) > MAX_CAPTIONS:
        raise Rejected(Reason.caption_too_long, f"more than {MAX_CAPTIONS:,} bytes of text")
    try:
        return captions_of(data.decode("utf-8-sig").split("\n"))
    except UnicodeDecodeError as error:
        raise Rejected(Reason.caption_not_text, str(error)) from error


def captions_of(value: Any) -> list[str]:
    """The captions in the value of a column: a text or a list of them. Raises Rejected."""
    if value is None or value == []:
        raise Rejected(Reason.no_caption)
    captions = texts_of(value, Reason.caption_not_text)
    if not captions:
        raise Rejected(Reason.empty_caption)
    for caption in captions:
        if len(caption) > MAX_CAPTION:
            raise Rejected(Reason.caption_too_long, f"{len(caption):,} characters: {caption[:40]} ...")
    return captions


def texts_of(value: Any, reason: Reason) -> list[str]:
    """The texts that are not empty in a text or a list of them."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Rejected(reason, f"{printable(repr(value)[:80])} is neither a text nor a list of texts")
    if any("\0" in text or not is_utf8(text) for text in texts):
        raise Rejected(reason, "it holds a NUL or half a character")
    if sum(map(len, texts)) > MAX_CAPTIONS:
        raise Rejected(Reason.caption_too_long, f"more than {MAX_CAPTIONS:,} characters")
    return [text.strip() for text in texts if text.strip()]


# ---- metadata.jsonl, .csv or .parquet ----


def open_metadata(root: Path, files: list[Path], notes: Notes, columns: Columns) -> Source:
    """Rows of file_name (relative to the metadata), text or caption, and keywords and split if there are any."""
    refuse_column("image", columns.image, "metadata names its pictures in file_name")
    tables = [file for file in files if file.name in METADATA]
    for first, second in zip(tables, tables[1:]):
        if first.parent == second.parent:
            raise InputError(f"both {first.name} and {second.name} in {str(first.parent)!r}; leave one")
    column = {table: caption_column(table, columns) for table in tables}
    splits = splits_by_name([relative(table.parent, root) for table in tables])
    for file in files:
        if not is_picture(file) and file not in column:
            ignore(file, notes)

    def named() -> Iterator[Sample]:
        for table, split in zip(tables, splits):
            folder = "" if table.parent == root else relative(table.parent, root) + "/"
            for number, row in metadata_rows(table):
                chosen = Columns(caption=column[table], label=columns.label)
                yield metadata_sample(folder, f"{relative(table, root)}:{number}", row, chosen, split)

    def samples(work: Path) -> Iterator[Sample]:
        left = {relative(file, root) for file in files if is_picture(file)}
        rows = Counter(sample.file for sample in named() if sample.file)  # the metadata is read twice, not held
        for sample in named():
            if (count := rows[sample.file]) > 1:
                sample.problem = Rejected(Reason.repeated_key, f"in {count} rows; captions can be a list")
            left.discard(sample.file)
            yield sample
        for name in sorted(left):
            sample = located(name)
            sample.problem = sample.problem or Rejected(Reason.no_caption, "the metadata does not name it")
            yield sample

    return Source(root, samples, notes)


def caption_column(table: Path, columns: Columns) -> str:
    rows = (row for _, row in islice(metadata_rows(table), LOOKED_AT) if isinstance(row, dict))
    names = list(dict.fromkeys(map(str, chain.from_iterable(rows))))
    if names and "file_name" not in names:
        raise InputError(f"no column file_name in {str(table)!r}; its columns: {', '.join(map(printable, names))}")
    if columns.label is not None:
        choose_column("label", columns.label, (), names, table)
    return choose_column("caption", columns.caption, CAPTION_COLUMNS, names, table) if names else "text"


def choose_column(what: str, given: str | None, usual: tuple[str, ...], names: list[str], where: Path | str) -> str:
    """The column that is given, or the only one with a usual name. Raises InputError with the columns there are."""
    there = f"the columns of {str(where)!r}: {', '.join(map(printable, names))}"
    if given is not None:
        if given not in names:
            raise InputError(f"no column {given!r}; {there}")
        return given
    found = [name for name in names if name.lower() in usual]
    if len(found) != 1:
        number = "several columns" if found else "no column"
        raise InputError(f"{number} that can hold the {what}; give --{what}-column; {there}")
    return found[0]


def metadata_rows(table: Path) -> Iterator[tuple[int, dict[str, Any] | Rejected]]:
    """(number, row); a row that does not parse is what is wrong with it."""
    if not table.is_file():
        raise InputError(f"{str(table)!r} is no ordinary file")
    if table.suffix == ".jsonl":
        with open(table, "rb") as lines:
            yield from json_rows(lines)
    elif table.suffix == ".csv":
        try:
            with open(table, encoding="utf-8-sig", newline="") as text:
                yield from csv_rows(text, table)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{str(table)!r} is not CSV in UTF-8: {error}") from error
    else:
        try:
            yield from enumerate(chain.from_iterable(map(rows_of, pq.ParquetFile(table).iter_batches(1_000))))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{str(table)!r} does not read as parquet: {error}") from error


def csv_rows(text: TextIO, table: Path) -> Iterator[tuple[int, dict[str, Any] | Rejected]]:
    reader = csv.DictReader(text)
    names = reader.fieldnames or []
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"column {repeated[0]!r} of {str(table)!r} is there twice; columns need names of their own")
    for number, row in enumerate(reader, start=2):
        if None in row:  # what a comma without quotes cuts off
            yield number, Rejected(Reason.bad_row, f"more than {len(names)} values; a text with commas needs quotes")
        else:
            yield number, dict(row)


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Rejected]:
    """The rows of a batch; Arrow takes any bytes for text until somebody looks at them."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Rejected(Reason.caption_not_text, str(error))


def json_rows(lines: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | Rejected]]:
    number = 0
    while line := lines.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while (rest := lines.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, Rejected(Reason.bad_row, f"a line of more than {MAX_LINE:,} bytes")
        elif line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
                yield number, row if isinstance(row, dict) else Rejected(Reason.bad_row, "no JSON object")
            except (ValueError, RecursionError) as error:
                yield number, Rejected(Reason.bad_row, str(error)[:200])


def metadata_sample(
    folder: str, place: str, row: dict[str, Any] | Rejected, columns: Columns, split: str | None
) -> Sample:
    sample = Sample(place)
    try:
        if isinstance(row, Rejected):
            raise row
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise Rejected(Reason.bad_row, "no file_name")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise Rejected(Reason.outside_folder, printable(name))
        sample = located(folder + PurePosixPath(name).as_posix())
        if sample.problem is None:
            sample.captions = captions_of(row.get(str(columns.caption)))
            sample.keywords = keywords_of(row.get("keywords"))
            sample.labels = labels_of(row.get(columns.label)) if columns.label else []
            sample.split = split_of(row.get("split")) or split
    except Rejected as error:
        sample.problem = error
    return sample


def keywords_of(value: Any) -> list[str]:
    """A list of texts, or one text with commas."""
    if value is None:
        return []
    return texts_of(value.split(",") if isinstance(value, str) else value, Reason.bad_row)


def labels_of(value: Any) -> list[str]:
    """A text or a whole number, or a list of them; none for nothing."""
    values = value if isinstance(value, list) else [value]
    return texts_of([str(one) if isinstance(one, int) else one for one in values if one is not None], Reason.bad_row)


def split_of(value: Any) -> str | None:
    """train or held_out for the names in use; None for nothing. Raises Rejected."""
    if value is None or value == "":
        return None
    name = value.lower() if isinstance(value, str) else value
    if name == "train":
        return "train"
    if isinstance(name, str) and name in HELD_OUT:
        return "held_out"
    raise Rejected(Reason.bad_row, f"split must be train or one of {', '.join(sorted(HELD_OUT))}, got {value!r}"[:200])


def splits_by_name(names: list[str]) -> list[str | None]:
    """The splits of files or folders, from names such as test/a.tar and train-00000.parquet.

    None for all if that would leave no picture to train on, or none held out.
    """
    splits = [split_by_name(name) for name in names]
    return splits if "train" in splits and "held_out" in splits else [None] * len(names)


def split_by_name(name: str) -> str | None:
    for part in PurePosixPath(name.lower()).parts:
        word = re.split(r"[-.]", part)[0]
        if word == "train" or word in HELD_OUT:
            return split_of(word)
    return None


# ---- reading ----


def open_inside(root: Path, name: str) -> BinaryIO:
    """An ordinary file below `root` (an absolute path without links), to be read. Raises Rejected.

    Nothing else is ever opened: opening a pipe can hang for ever, and opening a device can do things.
    """
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise Rejected(Reason.outside_folder, name)
    try:
        path = (root / name).resolve(strict=True)
        if not path.is_relative_to(root):
            raise Rejected(Reason.outside_folder, f"a link to {path}")
        if not path.is_file():
            raise Rejected(Reason.not_a_file, name)
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Rejected(Reason.missing_file, name) from error
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name too long, no permission
        raise error if isinstance(error, Rejected) else Rejected(Reason.unreadable, str(error)) from error


def read_range(root: Path, name: str, offset: int, size: int | None, limit: int = 2**28) -> bytes:
    """The bytes of a picture. Raises Rejected."""
    if size is not None and size > limit:
        raise Rejected(Reason.too_many_bytes, f"{size:,}")
    with open_inside(root, name) as file:
        try:
            file.seek(offset)
            data = file.read(limit + 1 if size is None else size)
        except OSError as error:
            raise Rejected(Reason.unreadable, str(error)) from error
    if len(data) > limit:
        raise Rejected(Reason.too_many_bytes)
    return data
