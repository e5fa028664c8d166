"""Metadata."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from t2i.data.reasons import Reason, Rejected
from t2i.data.sources.samples import (
    CAPTION_COLUMNS,
    Columns,
    Notes,
    Sample,
    Source,
    captions_of,
    choose_column,
    ignore,
    is_picture,
    keywords_of,
    labels_of,
    located,
    printable,
    refuse_column,
    relative,
    rows_of,
    split_of,
    splits_by_name,
)
from t2i.errors import InputError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_LINE = 2**20  # of metadata.jsonl
LOOKED_AT = 100  # rows of a metadata file that tell its columns


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
