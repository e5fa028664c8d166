"""Folders of images that a metadata.jsonl, .csv or .parquet lists."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from t2i.data.reasons import Reason, RejectedSample
from t2i.data.sources.names import FolderNames, LookalikeName
from t2i.data.sources.samples import (
    CAPTION_COLUMNS,
    Columns,
    Sample,
    Source,
    SourceNotes,
    build_file_sample,
    choose_column,
    escape_name,
    infer_splits,
    is_image_file,
    iterate_batch_rows,
)
from t2i.errors import InputError
from t2i.texts import find_encoding

FILE_COLUMN = "file_name"  # as `datasets` calls it
OTHER_FILE_COLUMNS = (
    "filename", "file", "filepath", "file_path", "path", "image", "image_file", "image_path", "img", "picture",
)  # fmt: skip
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_LINE_BYTES = 2**20  # of metadata.jsonl
DELIMITERS = (",", ";", "\t")  # spreadsheets write that of the language
INSPECTED_ROWS = 100  # rows of a metadata file from which its columns are found


def open_metadata(root: Path, files: list[Path], notes: SourceNotes, columns: Columns) -> Source:
    """Return the source of a folder with metadata.

    A row has file_name, relative to the metadata file, text or caption, and optionally keywords, split and a label.
    `columns.image` is the name of the column in place of file_name.
    """
    # Choose the columns of each metadata file, so that a wrong one is refused before any work
    tables = [file for file in files if file.name in METADATA_FILES]
    for first, second in zip(tables, tables[1:]):
        if first.parent == second.parent:
            raise InputError(f"both {first.name} and {second.name} are in {str(first.parent)!r}; remove one")
    chosen = {table: choose_table_columns(table, columns) for table in tables}
    splits = infer_splits([table.parent.relative_to(root).as_posix() for table in tables])
    notes.count_ignored(file for file in files if not is_image_file(file) and file not in chosen)

    paths = FolderNames(root, (file.relative_to(root).as_posix() for file in files))

    def iterate_listed_samples() -> Iterator[Sample]:
        for table, split in zip(tables, splits):
            name = PurePosixPath(table.relative_to(root).as_posix())
            for number, row in iterate_metadata_rows(table):
                yield build_metadata_sample(paths, name.parent, f"{name}:{number}", row, chosen[table], split)

    def iterate_samples(scratch_folder: Path) -> Iterator[Sample]:
        """Yield the samples of the metadata, then the image files that it does not name."""
        left = {file.relative_to(root).as_posix() for file in files if is_image_file(file)}
        # Read the metadata twice rather than keep it in memory
        rows = Counter(sample.file for sample in iterate_listed_samples() if sample.file)
        for sample in iterate_listed_samples():
            if (count := rows[sample.file]) > 1:
                detail = f"in {count} rows; one row can have a list of captions"
                sample.problem = RejectedSample(Reason.repeated_key, detail)
            left.discard(sample.file)
            if isinstance(sample.problem, LookalikeName):
                left.difference_update(sample.problem.alike)
            yield sample
        # Images that no row lists are rejected, not forgotten
        for name in sorted(left):
            sample = build_file_sample(name)
            sample.problem = sample.problem or RejectedSample(Reason.no_caption, "the metadata does not list it")
            yield sample

    # About as many as there are images: a row more for each that lists a missing one
    return Source(root, iterate_samples, notes, sum(map(is_image_file, files)))


def choose_table_columns(table: Path, columns: Columns) -> Columns:
    """Choose the columns of file name, caption and label. Raises InputError if a column is missing or ambiguous."""
    rows = (row for _, row in islice(iterate_metadata_rows(table), INSPECTED_ROWS) if isinstance(row, dict))
    names = list(dict.fromkeys(map(str, chain.from_iterable(rows))))
    if not names:
        # No row could be read so far; later ones may have the usual columns.
        return replace(columns, image=columns.image or FILE_COLUMN, caption=columns.caption or CAPTION_COLUMNS[0])
    if columns.image is None and not {FILE_COLUMN, *OTHER_FILE_COLUMNS} & {name.lower() for name in names}:
        raise InputError(f"no column file_name in {str(table)!r}; its columns: {', '.join(map(escape_name, names))}")
    image = choose_column("image", columns.image, (FILE_COLUMN,), names, table, OTHER_FILE_COLUMNS)
    return replace(columns.choose_texts(names, table), image=image)


def iterate_metadata_rows(table: Path) -> Iterator[tuple[int, dict[str, Any] | RejectedSample]]:
    """Yield the number and content of each row, without blanks around the names of columns.

    A row that does not parse is a RejectedSample.
    """
    for number, row in iterate_stored_rows(table):
        yield number, row if isinstance(row, RejectedSample) else {str(key).strip(): row[key] for key in row}


def iterate_stored_rows(table: Path) -> Iterator[tuple[int, dict[str, Any] | RejectedSample]]:
    """Yield the line or row number and the values of each row of a JSON Lines, CSV or Parquet table."""
    if not table.is_file():
        raise InputError(f"{str(table)!r} is not an ordinary file")
    with open(table, "rb") as file:
        encoding = find_encoding(file.read(2))
    if table.suffix == ".jsonl":
        # Latin-1 has a character for each byte: lines end as in `t2i.texts`, and one that is not UTF-8 ends no other.
        with open_json_lines(table, encoding) as lines:
            yield from iterate_json_rows(lines)
    elif table.suffix == ".csv":
        try:
            with open(table, encoding=encoding, newline="") as text:
                yield from iterate_csv_rows(text, table)
        except (csv.Error, UnicodeError) as error:
            advice = "spreadsheets write it as CSV UTF-8"
            raise InputError(f"{str(table)!r} is not CSV in UTF-8 or UTF-16: {error}; {advice}") from error
    else:
        try:
            batches = pq.ParquetFile(table).iter_batches(1_000)
            yield from enumerate(chain.from_iterable(map(iterate_batch_rows, batches)))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{str(table)!r} cannot be read as Parquet: {error}") from error


def iterate_csv_rows(text: TextIO, table: Path) -> Iterator[tuple[int, dict[str, Any] | RejectedSample]]:
    """Yield the row number and the values of each row of a CSV file, whose delimiter its first line decides."""
    delimiter = find_delimiter(text.readline())
    text.seek(0)
    reader = csv.DictReader(text, delimiter=delimiter)
    names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{str(table)!r} has several columns {repeated[0]!r}; names of columns must differ")
    # Line 1 has the names
    for number, row in enumerate(reader, start=2):
        if None in row:  # a delimiter outside quotes cut a text in two
            detail = f"more than {len(names)} values; a text with {delimiter!r} needs quotes"
            yield number, RejectedSample(Reason.bad_row, detail)
        else:
            yield number, dict(row)


def find_delimiter(header: str) -> str:
    """Return the character between the columns of a CSV file: that which finds a file's name and most columns."""

    def count_names(delimiter: str) -> tuple[bool, int]:
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
        return not {FILE_COLUMN, *OTHER_FILE_COLUMNS}.isdisjoint(names), len(names)

    return max(DELIMITERS, key=count_names)


def open_json_lines(table: Path, encoding: str) -> TextIO:
    """Open lines of JSON as their bytes in UTF-8, each read as a character of Latin-1."""
    if encoding != "utf-16":
        return open(table, encoding="latin-1", newline=None)
    try:
        return io.StringIO(table.read_text(encoding).encode().decode("latin-1"))
    except UnicodeError as error:
        raise InputError(f"{str(table)!r} is not UTF-16, as its byte-order mark says: {error}") from error


def iterate_json_rows(lines: TextIO) -> Iterator[tuple[int, dict[str, Any] | RejectedSample]]:
    """Yield the number and content of each line of JSON, whose bytes are read as Latin-1."""
    number = 0
    while line := lines.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith("\n"):
            # Skip the rest of the line in pieces, however long it is
            while (rest := lines.readline(MAX_LINE_BYTES)) and not rest.endswith("\n"):
                pass
            yield number, RejectedSample(Reason.bad_row, f"a line of more than {MAX_LINE_BYTES:,} bytes")
        elif line.strip():
            try:
                row = json.loads(line.encode("latin-1").decode("utf-8-sig"))
                yield number, row if isinstance(row, dict) else RejectedSample(Reason.bad_row, "not a JSON object")
            except (ValueError, RecursionError) as error:
                yield number, RejectedSample(Reason.bad_row, str(error)[:200])


def build_metadata_sample(
    paths: FolderNames,
    folder: PurePosixPath,
    key: str,
    row: dict[str, Any] | RejectedSample,
    columns: Columns,
    split: str | None,
) -> Sample:
    """Return the sample of a row of the metadata in a folder; `key` names it until its file name is known."""
    sample = Sample(key)
    try:
        if isinstance(row, RejectedSample):
            raise row
        name = row.get(str(columns.image))
        if not isinstance(name, str) or not name:
            raise RejectedSample(Reason.bad_row, f"no {columns.image}")
        # Refused before the name becomes the key of the sample
        sample = build_file_sample(paths.find_file(folder, name))
        if sample.problem is None:
            sample.read_row(row, columns, split)
    except RejectedSample as error:
        sample.problem = error
    return sample
