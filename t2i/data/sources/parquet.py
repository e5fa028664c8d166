"""Parquet files and data sets on the hub, with the images' bytes in a column.

Parquet compresses pages of many rows, so images cannot be read from it by offset. Arrow files contain the bytes as
they are: Parquet files are copied into Arrow files beside the manifest, and `datasets` caches data sets as Arrow files.
"""

from collections.abc import Iterator
from dataclasses import replace
from os.path import commonpath
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t2i.data.reasons import Reason, RejectedSample
from t2i.data.sources.samples import (
    Columns,
    Sample,
    Source,
    SourceNotes,
    choose_column,
    escape_name,
    infer_splits,
    iterate_batch_rows,
)
from t2i.errors import InputError
from t2i.files.file_systems import measure_free_bytes
from t2i.files.untrusted import check_file_name, check_no_stand_in, read_json

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
OPTIONAL_COLUMNS = ("keywords", "split")  # used if they are there
COPY_BATCH_SIZE = 64  # rows
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"  # of `save_to_disk` of `datasets`


def open_parquet(root: Path, files: list[Path], columns: Columns, notes: SourceNotes | None = None) -> Source:
    """Return the source of Parquet files with the same columns. Raises InputError, with the columns of the file."""
    notes = notes or SourceNotes()
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    notes.count_ignored(file for file in files if file not in tables)

    # Refuse bad columns, and count the bytes to copy, before any work
    total = needed = 0
    chosen: list[Columns] = []
    for table in tables:
        parquet = open_table(table)
        chosen.append(choose_columns(parquet.schema_arrow, columns, table))
        total += parquet.metadata.num_rows
        needed += count_uncompressed_bytes(parquet.metadata, list_used_columns(parquet.schema_arrow, chosen[-1]))
    names = [table.relative_to(root).as_posix() for table in tables]

    def iterate_samples(scratch_folder: Path) -> Iterator[Sample]:
        if (free := measure_free_bytes(scratch_folder)) < needed:
            sizes = f"that takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
            copied = f"are copied uncompressed into {str(scratch_folder.parent)!r}"
            raise InputError(f"the rows of {str(root)!r} {copied}: {sizes}")
        (scratch_folder / "rows").mkdir(exist_ok=True)
        for number, (table, used, name, split) in enumerate(zip(tables, chosen, names, infer_splits(names))):
            copy = scratch_folder / "rows" / f"{number:05}.arrow"
            copy_rows(table, used, copy)
            yield from index_arrow_rows(copy, scratch_folder, escape_name(name), used, split, notes)

    return Source(None, iterate_samples, notes, total)


def has_image_column(table: Path) -> bool:
    """Return True if a Parquet file has a column of bytes."""
    try:
        return any(is_bytes_type(column.type) for column in open_table(table).schema_arrow)
    except InputError:
        return False


def open_table(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise InputError(f"{str(path)!r} is not an ordinary file")
    check_no_stand_in(path)
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{str(path)!r} cannot be read as Parquet: {error}") from error


def choose_columns(schema: pa.Schema, columns: Columns, table: Path | str) -> Columns:
    """Choose the columns of image, caption and label: those given, else by type and name. Raises InputError."""
    pictures = [column.name for column in schema if is_bytes_type(column.type)]
    if columns.image is not None:
        image = choose_column("image", columns.image, (), schema.names, table)
        if image not in pictures:
            kind = schema.field(image).type
            raise InputError(f"column {image!r} of {str(table)!r} has the type {kind}; it must contain bytes")
    elif not pictures:
        raise InputError(f"no column of {str(table)!r} contains images; its columns: {', '.join(schema.names)}")
    else:
        # A single column of bytes is the image whatever its name
        image = pictures[0] if len(pictures) == 1 else choose_column("image", None, IMAGE_COLUMNS, pictures, table)
    return replace(columns.choose_texts(schema.names, table), image=image)


def is_bytes_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # `datasets` stores an image as a struct of bytes and path
        return kind.get_field_index("bytes") >= 0 and is_bytes_type(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def list_used_columns(schema: pa.Schema, columns: Columns) -> list[str]:
    """Return the names of the columns in use: the image's, the caption's, and others that the table has."""
    assert columns.image and columns.caption
    others = [name for name in (*columns.labels, *OPTIONAL_COLUMNS) if name in schema.names]
    return [columns.image, *dict.fromkeys([columns.caption, *others])]


def count_uncompressed_bytes(metadata: pq.FileMetaData, names: list[str]) -> int:
    """Return the uncompressed size of columns in bytes, from the file's metadata."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    parts = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in names)


def copy_rows(table: Path, columns: Columns, copy: Path) -> None:
    """Copy the columns in use into an uncompressed Arrow stream."""
    parquet = open_table(table)
    names = dict.fromkeys(list_used_columns(parquet.schema_arrow, columns))
    schema = pa.schema([parquet.schema_arrow.field(name) for name in names])
    try:
        with pa.OSFile(str(copy), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in parquet.iter_batches(COPY_BATCH_SIZE, columns=schema.names):
                writer.write_batch(batch.select(schema.names))
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # an error of the disk, such as no space left
            raise
        raise InputError(f"{str(table)!r} cannot be read to its end: {error}") from error


def open_hub(name: str, columns: Columns) -> Source:
    """Return the source of a data set on the hub, without decoding its images."""
    if not name:
        raise InputError("the name after hub: is empty; give hub:ORGANISATION/NAME")
    import datasets

    # Load it, which may download it
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # of a dozen types: network, files, the builder of the data set
        reason = str(error) or type(error).__name__
        raise InputError(f"{name!r} is neither a file here nor a data set that loads: {reason}") from error

    # Find its Arrow files
    parts = [(part, Path(file["filename"])) for part in loaded for file in loaded[part].cache_files]
    if not parts:
        raise InputError(f"the data set {name!r} has no Arrow files in the cache of `datasets`")
    root = Path(commonpath([path.parent.resolve() for _, path in parts]))
    return open_arrow_parts(name, root, parts, columns, sum(part.num_rows for part in loaded.values()))


def is_saved_dataset(folder: Path) -> bool:
    """Return True for a folder that `save_to_disk` of `datasets` wrote, with splits or without."""
    return any((folder / name).is_file() for name in (SPLITS_FILE, STATE_FILE))


def open_saved_dataset(root: Path, columns: Columns) -> Source:
    """Return the source of a folder that `save_to_disk` of `datasets` wrote, without decoding its images."""
    splits = [""]
    if (root / SPLITS_FILE).is_file():
        splits = read_json(root / SPLITS_FILE).get("splits") or []
        splits = [check_file_name(f"a split in {str(root / SPLITS_FILE)!r}", split) for split in splits]
    parts = []
    for split in splits:
        state = root / split / STATE_FILE
        for entry in read_json(state).get("_data_files") or []:
            name = check_file_name(f"a file in {str(state)!r}", entry.get("filename"))
            parts.append((split, root / split / name))
    if not parts:
        raise InputError(f"{str(root)!r} names no Arrow files; `save_to_disk` of `datasets` writes it anew")
    return open_arrow_parts(str(root), root, parts, columns, None)


def open_arrow_parts(
    name: str, root: Path, parts: list[tuple[str, Path]], columns: Columns, total: int | None
) -> Source:
    """Return the source of Arrow files, each with the name of its split; "" is none."""
    splits: dict[str, str] = {}  # of the manifest, by the data set's
    if len({part for part, _ in parts}) > 1 and "train" in dict(parts):
        # Beside a part of the name train, all others are held out
        splits = dict.fromkeys(dict(parts), "held_out") | {"train": "train"}
    chosen = {path: choose_columns(open_arrow(path).schema, columns, f"{name}, {part}") for part, path in parts}
    notes = SourceNotes()

    def iterate_samples(scratch_folder: Path) -> Iterator[Sample]:
        for part, path in parts:
            key = f"{part}/{path.name}" if part else path.name
            yield from index_arrow_rows(path.resolve(), root, key, chosen[path], splits.get(part), notes)

    return Source(root, iterate_samples, notes, total)


def open_arrow(path: Path) -> pa.RecordBatchStreamReader:
    check_no_stand_in(path)
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path)).read_buffer())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{str(path)!r} cannot be read as an Arrow stream: {error}") from error


def index_arrow_rows(
    path: Path, root: Path, name: str, columns: Columns, split: str | None, notes: SourceNotes
) -> Iterator[Sample]:
    """Yield the samples of an Arrow file, with the offset of each image's bytes in it."""
    file = path.relative_to(root).as_posix()
    buffer = pa.memory_map(str(path)).read_buffer()
    notes.containers[file] = buffer.size
    number = 0
    for batch in pa.ipc.open_stream(buffer):
        image, *names = list_used_columns(batch.schema, columns)
        rows, pictures = iterate_batch_rows(batch.select(names)), batch.column(image)
        for picture, place, row in zip(pictures, iterate_cell_ranges(pictures, buffer), rows):
            sample = Sample(f"{name}/{number}", split=split)
            number += 1
            try:
                if isinstance(row, RejectedSample):
                    raise row
                # Before the captions, so that a row without an image counts as that
                check_cell_bytes(picture)
                sample.file, (sample.offset, sample.size) = file, place
                sample.read_row(row, columns, split)
            except RejectedSample as error:
                sample.problem = error
            yield sample


def iterate_cell_ranges(pictures: pa.Array, file: pa.Buffer) -> Iterator[tuple[int, int]]:
    """Yield offset and size of each cell's bytes in a file that is mapped into memory."""
    if pa.types.is_struct(pictures.type):
        pictures = pictures.field("bytes")
    _, edges, values = pictures.buffers()
    kind = np.int64 if pa.types.is_large_binary(pictures.type) else np.int32
    ends = np.frombuffer(edges, kind)[pictures.offset :][: len(pictures) + 1].tolist()
    # Arrow reads a mapped file without copying, so the distance of addresses is the offset in the file.
    start = values.address - file.address if values is not None else 0
    assert 0 <= start <= file.size, "the column is a copy, not a part of the mapped file"
    return ((start + first, last - first) for first, last in zip(ends, ends[1:]))


def check_cell_bytes(picture: Any) -> None:
    """Refuse a cell without bytes. Raises RejectedSample."""
    if isinstance(picture, pa.StructScalar) and picture.is_valid:
        if not picture["bytes"].is_valid and "path" in picture and picture["path"].is_valid:
            path = escape_name(repr(picture["path"].as_py())[:100])
            raise RejectedSample(
                Reason.no_picture, f"the row has only the path {path}; download the files and check their folder"
            )
        picture = picture["bytes"]
    if not picture.is_valid:
        raise RejectedSample(Reason.no_picture)
