"""The manifest: a Parquet file with one row for every sample of a source, accepted or rejected.

`t2i data check` writes it. Training reads it and the images that it lists, nothing else.
"""

import hashlib
import json
import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from t2i.data.labels import LABELS_FILE, get_single_label, write_labels
from t2i.data.pictures import CONVERTED, OLD_READING, READING, Reading, decode_image, silence_pillow
from t2i.data.reasons import Reason, RejectedSample
from t2i.data.report import Duplicates, Report
from t2i.data.sources.open_data_source import is_check_output, open_data_source
from t2i.data.sources.samples import (
    Columns,
    Sample,
    Source,
    open_inside_root,
    read_change_time,
    read_range,
    read_unchanged_range,
)
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.progress import Progress

MANIFEST_FILE = "manifest.parquet"
MANIFEST_FOLDER = "t2i"  # below a source folder
CHECK_OUTPUTS = {MANIFEST_FILE, LABELS_FILE, "report.json", "sizes.png", "rows"}  # all files that a check writes
SPLITS = ("train", "held_out")
MANIFEST_SCHEMA = pa.schema(
    {
        "key": pa.string(),  # the sample's name
        "file": pa.string(),  # relative to the root in the metadata, POSIX
        "offset": pa.int64(),  # of the image's bytes in the file
        "size": pa.int64(),  # of the image, in bytes
        "sha256": pa.binary(32),  # of the image's bytes
        "captions": pa.list_(pa.string()),
        "keywords": pa.list_(pa.string()),
        "split": pa.string(),  # train or held_out
        "width": pa.int32(),  # upright
        "height": pa.int32(),
        "status": pa.string(),  # ok, or the name of a Reason
        "detail": pa.string(),  # of a rejected sample; of an accepted one, how its image is converted
    }
)
TRAINING_COLUMNS = ["key", "file", "offset", "size", "sha256", "captions", "keywords", "split", "detail"]
TRAINING_COLUMNS += ["width", "height"]
METADATA_KEY = b"t2i"  # of our JSON in the Parquet metadata
MANIFEST_VERSION = 1
ROW_GROUP_SIZE = 4_096
READ_BATCH_SIZE = 65_536  # rows; larger batches cost less memory than one per row group
MIN_FILE_AGE = 2 * 10**9  # nanoseconds; the coarsest file times in use (FAT's) are 2 seconds apart
STATUS_OK = "ok"
DETAIL_CONVERTED = "converted to sRGB of 8 bits"  # a part of the digest of data, so it stays

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class ManifestRow:
    """A row of the manifest."""

    key: str
    file: str = ""
    offset: int = 0
    size: int | None = None
    sha256: bytes | None = None
    captions: list[str] = field(default_factory=list)
    keywords: list[str] = field(default_factory=list)
    split: str = "train"
    width: int | None = None
    height: int | None = None
    status: str = STATUS_OK
    detail: str = ""

    def mark_rejected(self, reason: Reason, detail: str) -> None:
        self.status, self.detail = reason.name, detail


def write_manifest(
    name: str | Path,
    out: Path | None = None,
    columns: Columns | None = None,
    held_out: float = 0.01,
    min_size: int = 8,
    drop_duplicates: bool = False,
    quiet: bool = False,
    reading: Reading = READING,
) -> Report:
    """Check every sample of a source and write the folder `out`.

    The folder gets manifest.parquet, report.json and sizes.png, and labels.parquet if `columns` names columns of
    labels. It appears complete or not at all, and replaces the result of an earlier check. Raises InputError if the
    source does not exist or has no samples, an image has no label or several, or `out` cannot be written. Faults of
    single samples go into the manifest.
    """
    # Open the source, and refuse what cannot work before any image is read
    columns = columns or Columns()
    out = out or get_default_manifest_folder(str(name))
    source = open_data_source(str(name), columns)
    check_output_folder(out, str(name))
    report, labels = (
        Report(str(name), str(out / MANIFEST_FILE)),
        {column: dict[str, str]() for column in columns.labels},
    )
    out = out.resolve()
    with create_folder_atomically(out) as unfinished, silence_pillow():
        # Read and decode in threads, write in order
        root, manifest = source.root or unfinished, unfinished / MANIFEST_FILE
        samples = count_samples(source.iterate_samples(unfinished), report, labels)
        rows = map_in_order(lambda sample: examine_sample(sample, root, held_out, min_size, reading), samples)
        rows = reject_duplicates(rows) if drop_duplicates else rows
        about = {"version": MANIFEST_VERSION, "source": str(name), "root": format_source_root(source, out)}
        about["reading"] = asdict(reading)
        with Progress("checking", source.total, is_shown=not quiet) as progress:
            about |= {"containers": source.notes.containers}
            write_rows(manifest, progress.iterate(rows), report, about)
        assert report.ok + report.rejected_count == report.indexed == pq.read_metadata(manifest).num_rows

        # Report; a source without samples is refused, and the result of an earlier check stays
        report.notes, report.duplicates = source.notes, find_duplicates(manifest)
        if not report.indexed and (complaint := report.format_complaint()):
            raise InputError(complaint)
        if labels:
            write_labels(unfinished, labels)
        report.write_files(unfinished)
    return report


def count_samples(samples: Iterable[Sample], report: Report, labels: dict[str, dict[str, str]]) -> Iterator[Sample]:
    """Pass samples on; count them in `report` and add their labels to the columns of `labels`."""
    for sample in samples:
        report.indexed += 1
        report.split_by_source += sample.split is not None
        if sample.problem is None:
            for column, known in labels.items():
                known[sample.key] = get_single_label(sample, column)
        yield sample


def write_rows(file: Path, rows: Iterable[ManifestRow], report: Report, about: dict[str, Any]) -> None:
    """Write a manifest and count its rows in `report`.

    `about` is the JSON of the metadata. It is written last, for sources find their containers while they are read.
    """
    with pq.ParquetWriter(file, MANIFEST_SCHEMA, compression="zstd") as writer:
        remaining = map(asdict, rows)
        while group := list(islice(remaining, ROW_GROUP_SIZE)):
            for row in group:
                report.count_row(row)
            writer.write_table(pa.Table.from_pylist(group, MANIFEST_SCHEMA))
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(about).encode()})


def get_default_manifest_folder(name: str) -> Path:
    """Return the folder of a source's manifest; for hub:ORGANISATION/NAME, data/ORGANISATION--NAME."""
    path = Path(name)
    if path.is_dir():
        return path / MANIFEST_FOLDER
    if path.is_file():
        return path.with_name(f"{path.stem}-{MANIFEST_FOLDER}")
    return Path("data") / "--".join(name.removeprefix("hub:").strip("/").split("/")[-2:])


def check_output_folder(out: Path, source: str) -> None:
    """Refuse to replace the source or files that no check wrote, and a folder that cannot be written."""
    # `out` will be replaced as a whole: nothing in it may be lost
    path, advice = Path(source.removeprefix("hub:")), "give another folder with --out"
    if path.exists() and path.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{str(out)!r} is or contains the source {source!r}; {advice}")
    if out.is_dir():
        names = {file.name for file in out.iterdir()}
        if names and not is_check_output(out):
            raise InputError(f"{str(out)!r} is not empty and contains no manifest; {advice}")
        if others := names - CHECK_OUTPUTS:
            raise InputError(f"{str(out)!r} contains {min(others)!r}, which no check wrote; {advice}")
    elif out.exists():
        raise InputError(f"{str(out)!r} is a file; give a folder with --out")
    parent = next(parent for parent in out.resolve().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{str(out)!r} cannot be written; {advice}")


def format_source_root(source: Source, out: Path) -> str:
    """Return the root as the manifest stores it: relative if source and manifest move together."""
    if source.root in (None, out):
        return "."
    return ".." if source.root == out.parent else str(source.root)


def examine_sample(sample: Sample, root: Path, held_out: float, min_size: int, reading: Reading) -> ManifestRow:
    """Read and decode the image of a sample, and return its row."""
    # A rejected sample keeps what is known of it until the fault
    row = ManifestRow(sample.key, sample.file, sample.offset, sample.size, split=sample.split or "train")
    row.captions, row.keywords = sample.captions, sample.keywords
    try:
        if sample.problem:
            raise sample.problem
        data = read_range(root, sample.file, sample.offset, sample.size)
        row.size, row.sha256 = len(data), hashlib.sha256(data).digest()
        # By the hash of the image, so that its copies are in the same split
        if sample.split is None and int.from_bytes(row.sha256[:8]) < held_out * 2**64:
            row.split = "held_out"
        picture = decode_image(data, reading)
        row.width, row.height = picture.size
        row.detail = DETAIL_CONVERTED if CONVERTED in picture.info else ""
        if min(row.width, row.height) < min_size:
            raise RejectedSample(Reason.too_small, f"{row.width} x {row.height}")
    except RejectedSample as error:
        row.mark_rejected(error.reason, error.detail)
    return row


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map in threads and yield results in order, with at most 4 items a thread in memory.

    Threads suffice: Pillow's decoders and SHA-256 release the interpreter's lock.
    """
    # The processors that this process may use, which a scheduler may limit
    threads = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def reject_duplicates(rows: Iterable[ManifestRow]) -> Iterator[ManifestRow]:
    """Reject every image whose bytes were in an earlier row."""
    seen: set[bytes] = set()
    for row in rows:
        if row.status == STATUS_OK and row.sha256 is not None:
            if row.sha256 in seen:
                row.mark_rejected(Reason.duplicate, "")
            seen.add(row.sha256)
        yield row


def find_duplicates(manifest: Path) -> Duplicates:
    """Count the accepted images that occur more than once, byte by byte."""
    table = pq.read_table(
        manifest, columns=["key", "sha256", "split"], filters=[("status", "=", STATUS_OK)], partitioning=None
    )
    aggregates = [("key", "count"), ("key", "min"), ("key", "max"), ("split", "count_distinct")]
    groups = table.group_by("sha256").aggregate(aggregates)
    groups = groups.filter(pc.greater(groups["key_count"], 1))
    examples = groups.slice(0, Report.EXAMPLES).select(["key_min", "key_max"]).to_pylist()
    return Duplicates(
        len(groups),
        (pc.sum(groups["key_count"]).as_py() or 0) - len(groups),
        len(groups.filter(pc.greater(groups["split_count_distinct"], 1))),
        [[example["key_min"], example["key_max"]] for example in examples],
    )


class Manifest:
    """The accepted samples of a split as Arrow columns, about 200 bytes of memory a row.

    Python lists would take several times as much, once in each worker that decodes images.
    """

    def __init__(self, table: pa.Table, root: Path, reading: Reading):
        """`table` has the `TRAINING_COLUMNS`; `root` is the folder that its file names are relative to."""
        self.table, self.root, self.reading = table, root, reading
        # The same Arrow arrays, not copies: a table looks a column up anew at every access.
        self.columns = {name: table[name] for name in TRAINING_COLUMNS}
        # Change time of each image's file at its last SHA-256 comparison; 0: never compared
        self.verified_times = np.zeros(len(table), np.int64)

    def __len__(self) -> int:
        return len(self.table)

    def get_values(self, index: int, *columns: str) -> list[Any]:
        """Return the values of one row."""
        return [self.columns[name][index].as_py() for name in columns]

    def select_rows(self, mask: np.ndarray) -> "Manifest":
        """Return the manifest of some rows. mask: (N,), bool."""
        return Manifest(self.table.filter(pa.array(mask)), self.root, self.reading)

    def iterate_rows(self, *columns: str) -> Iterator[dict[str, Any]]:
        """Yield all rows in order, with few of them in memory."""
        for batch in self.table.select(columns).to_batches(max_chunksize=ROW_GROUP_SIZE):
            yield from batch.to_pylist()

    def read_image(self, index: int) -> bytes:
        """Return the bytes of an image, the same that were checked. Raises RejectedSample.

        The SHA-256 is compared when this object reads an image first, and again whenever its file has changed since.
        """
        file, offset, size = self.get_values(index, "file", "offset", "size")
        path, verified_time = os.path.join(self.root, file), int(self.verified_times[index])
        if verified_time and (data := read_unchanged_range(path, offset, size, verified_time)) is not None:
            return data
        start = time.time_ns()
        data = read_range(self.root, file, offset, size)
        if hashlib.sha256(data).digest() != self.get_values(index, "sha256")[0]:
            raise RejectedSample(Reason.changed)
        # File times are coarse: a file that was changed just now may change again and keep its time.
        change_time = read_change_time(path)
        if change_time < start - MIN_FILE_AGE:
            self.verified_times[index] = change_time
        return data


def open_manifest(path: str | Path, split: str | None = "train") -> Manifest:
    """Read the accepted samples of a split; None stands for all. Path and errors are those of `open_manifests`."""
    return open_manifests(path, (split,))[split]


def open_manifests(path: str | Path, splits: tuple[str | None, ...] = SPLITS) -> dict[str | None, Manifest]:
    """Read the accepted samples of several splits in one pass. A split without samples is left out.

    `path` leads to a manifest as `find_manifest` has it. Raises InputError if there is none, the first of `splits` has
    no samples, or a tar or Arrow file is missing or has changed in size.
    """
    file = find_manifest(Path(path))
    about = read_manifest_metadata(file)
    root = (file.parent / about["root"]).resolve()

    # Filter batch by batch, so that rejected rows do not fill the memory
    batches: dict[str | None, list[pa.RecordBatch]] = {split: [] for split in splits}
    for batch in pq.ParquetFile(file).iter_batches(READ_BATCH_SIZE, columns=[*TRAINING_COLUMNS, "status"]):
        accepted = batch.filter(pc.equal(batch["status"], STATUS_OK)).select(TRAINING_COLUMNS)
        for split in splits:
            part = accepted if split is None else accepted.filter(pc.equal(accepted["split"], split))
            batches[split] += [part] if len(part) else []
    if not batches[splits[0]]:
        kind = "" if splits[0] is None else f" of split {splits[0]!r}"
        raise InputError(f"no images{kind} in {str(file)!r}; {str(file.parent / 'report.json')!r} gives the reasons")
    # Images in tars are read by offset, which is wrong in another file of the same name
    for name, size in about["containers"].items():
        check_container(root, name, size, file)
    tables = {split: pa.Table.from_batches(parts) for split, parts in batches.items() if parts}
    return {split: Manifest(table, root, about["reading"]) for split, table in tables.items()}


def check_container(root: Path, name: str, size: int, manifest: Path) -> None:
    """Refuse a tar or Arrow file that is missing or has changed in size."""
    try:
        with open_inside_root(root, name) as file:
            current = file.seek(0, os.SEEK_END)
    except RejectedSample as error:
        raise InputError(f"{str(root / name)!r}, which {str(manifest)!r} lists: {error}") from error
    if current != size:
        sizes = f"it has {current:,} bytes, and had {size:,} when it was checked"
        raise InputError(f"{str(root / name)!r} is another file: {sizes}; run `t2i data check` again")


def find_manifest(path: Path) -> Path:
    """Return the manifest file of `path`: the file itself, the folder of a check, or a source that was checked."""
    candidates = (path, path / MANIFEST_FILE, path / MANIFEST_FOLDER / MANIFEST_FILE)
    for file in (*candidates, get_default_manifest_folder(str(path)) / MANIFEST_FILE):
        if file.suffix == ".parquet" and file.is_file() and METADATA_KEY in (read_parquet_metadata(file) or {}):
            return file
    raise InputError(f"no manifest in {str(path)!r}; `t2i data check {shlex.quote(str(path))}` writes one")


def read_parquet_metadata(file: Path) -> dict[bytes, bytes] | None:
    try:
        return pq.read_metadata(file).metadata
    except (pa.ArrowException, OSError):
        return None


def read_manifest_metadata(file: Path) -> dict[str, Any]:
    """Return the JSON in a manifest's metadata. Raises InputError if this version cannot read the manifest."""
    try:
        about = json.loads((read_parquet_metadata(file) or {})[METADATA_KEY])
        version = about["version"]
        complete = isinstance(about["root"], str) and isinstance(about["containers"], dict)
        about["reading"] = replace(OLD_READING, **about.get("reading", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(file)!r} is not a complete manifest; `t2i data check` writes one") from error
    schema = pq.read_schema(file).remove_metadata()
    if version != MANIFEST_VERSION or not complete or not schema.equals(MANIFEST_SCHEMA):
        versions = f"has version {version!r}, and this program reads version {MANIFEST_VERSION}"
        raise InputError(f"the manifest {str(file)!r} {versions}; `t2i data check` writes it anew")
    return about
