"""The manifest: one Parquet row for every sample that a source indexes, good or bad. Training reads nothing else."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from t2i.data.labels import LABELS, label_of, write_labels
from t2i.data.pictures import decode, silent
from t2i.data.reasons import Reason, Rejected
from t2i.data.report import Duplicates, Report
from t2i.data.sources.open_source import open_source, written_by_check
from t2i.data.sources.samples import Columns, Sample, Source, open_inside, read_range
from t2i.errors import InputError
from t2i.files.atomic import new_folder

NAME = "manifest.parquet"
FOLDER = "t2i"  # below a source folder
WRITTEN = {NAME, LABELS, "report.json", "sizes.png", "rows"}  # all that a check leaves in its folder
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "file": pa.string(),  # relative to the root in the metadata, POSIX
        "offset": pa.int64(),  # of the picture's bytes in the file
        "size": pa.int64(),  # of the picture, in bytes
        "sha256": pa.binary(32),  # of the picture's bytes
        "captions": pa.list_(pa.string()),
        "keywords": pa.list_(pa.string()),
        "split": pa.string(),  # train or held_out
        "width": pa.int32(),  # upright
        "height": pa.int32(),
        "status": pa.string(),  # ok, or the name of a Reason
        "detail": pa.string(),
    }
)
METADATA = b"t2i"  # the key of our JSON in the Parquet metadata
VERSION = 1
ROW_GROUP = 4_096
OK = "ok"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Row:
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
    status: str = OK
    detail: str = ""

    def reject(self, reason: Reason, detail: str) -> None:
        self.status, self.detail = reason.name, detail


def write_manifest(
    name: str | Path,
    out: Path | None = None,
    columns: Columns | None = None,
    held_out: float = 0.01,
    min_size: int = 8,
    drop_duplicates: bool = False,
    quiet: bool = False,
) -> Report:
    """Read every sample of a source once and write the folder `out`: manifest.parquet, report.json, sizes.png; and
    labels.parquet, if `columns` names a column of labels.

    The folder appears whole or not at all, and replaces one that an earlier check wrote. Raises InputError if there is
    no source to read, no sample in it, a picture without a label or with two, or `out` cannot be written; whatever else
    is wrong with single samples stands in the manifest.
    """
    out = out or default_folder(str(name))
    label, labels = columns and columns.label, dict[str, str]()
    source = open_source(str(name), columns or Columns())
    check_target(out, str(name))
    report = Report(str(name), str(out / NAME))
    out = out.resolve()
    with new_folder(out) as unfinished, silent():
        root = source.root or unfinished

        def samples() -> Iterator[Sample]:
            for sample in source.samples(unfinished):
                report.indexed += 1
                if label and sample.problem is None:
                    labels[sample.key] = label_of(sample, label)
                yield sample

        rows = in_order(lambda sample: examine(sample, root, held_out, min_size), samples())
        rows = rejecting_duplicates(rows) if drop_duplicates else rows
        bar = tqdm(rows, desc="checking", unit=" pictures", total=source.total, disable=True if quiet else None)
        with pq.ParquetWriter(unfinished / NAME, SCHEMA, compression="zstd") as writer:
            for group in grouped(bar, ROW_GROUP):
                for row in group:
                    report.add(row.status, row.key, row.detail, len(row.captions), row.split, row.width, row.height)
                writer.write_table(pa.Table.from_pylist([asdict(row) for row in group], SCHEMA))
            about = {"version": VERSION, "source": str(name), "root": root_from(source, out)}
            about["containers"] = source.notes.containers
            writer.add_key_value_metadata({METADATA: json.dumps(about).encode()})
        assert report.ok + report.rejected == report.indexed == pq.read_metadata(unfinished / NAME).num_rows
        if label:
            write_labels(unfinished, label, labels)
        report.notes, report.duplicates = source.notes, find_duplicates(unfinished / NAME)
        if not report.indexed and (complaint := report.complaint()):
            raise InputError(complaint)  # what an earlier check found stays
        report.write(unfinished)
    return report


def default_folder(name: str) -> Path:
    """Where the manifest of a source goes; for hub:ORGANISATION/NAME, data/ORGANISATION--NAME."""
    path = Path(name)
    if path.is_dir():
        return path / FOLDER
    if path.is_file():
        return path.with_name(f"{path.stem}-{FOLDER}")
    return Path("data") / "--".join(name.removeprefix("hub:").strip("/").split("/")[-2:])


def check_target(out: Path, source: str) -> None:
    """Refuse to replace the source, what no check wrote, and what cannot be written."""
    path = Path(source.removeprefix("hub:"))
    if path.exists() and path.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{str(out)!r} is or holds the source {source!r}; give another folder with --out")
    if out.is_dir() and any(out.iterdir()) and not written_by_check(out):
        raise InputError(f"{str(out)!r} is not empty and holds no manifest; give another folder with --out")
    if out.is_dir() and (others := {path.name for path in out.iterdir()} - WRITTEN):
        raise InputError(f"{str(out)!r} holds {min(others)!r}, which no check wrote; give another folder with --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file; give a folder with --out")
    parent = next(parent for parent in out.resolve().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{str(out)!r} cannot be written; give another folder with --out")


def root_from(source: Source, out: Path) -> str:
    """The root as it is written down: relative where both move together."""
    if source.root in (None, out):
        return "."
    return ".." if source.root == out.parent else str(source.root)


def examine(sample: Sample, root: Path, held_out: float, min_size: int) -> Row:
    """Read and decode the picture of a sample."""
    row = Row(sample.key, sample.file, sample.offset, sample.size, split=sample.split or "train")
    row.captions, row.keywords = sample.captions, sample.keywords
    try:
        if sample.problem:
            raise sample.problem
        data = read_range(root, sample.file, sample.offset, sample.size)
        row.size, row.sha256 = len(data), hashlib.sha256(data).digest()
        if sample.split is None and chosen_by_hash(row.sha256, held_out):
            row.split = "held_out"
        row.width, row.height = decode(data).size
        if min(row.width, row.height) < min_size:
            raise Rejected(Reason.too_small, f"{row.width} x {row.height}")
    except Rejected as error:
        row.reject(error.reason, error.detail)
    return row


def chosen_by_hash(digest: bytes, share: float) -> bool:
    """For about this share of the pictures; the same answer for every copy of one."""
    return int.from_bytes(digest[:8]) < share * 2**64


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` in threads (decoders let go of Python's lock), with few items under way at any time."""
    threads = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def rejecting_duplicates(rows: Iterable[Row]) -> Iterator[Row]:
    """The first of equal pictures stays."""
    seen: set[bytes] = set()
    for row in rows:
        if row.status == OK and row.sha256 is not None:
            if row.sha256 in seen:
                row.reject(Reason.duplicate, "")
            seen.add(row.sha256)
        yield row


def grouped(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    group: list[Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def find_duplicates(manifest: Path) -> Duplicates:
    """Which accepted pictures are there more than once, byte by byte."""
    table = pq.read_table(
        manifest, columns=["key", "sha256", "split"], filters=[("status", "=", OK)], partitioning=None
    )
    wanted = [("key", "count"), ("key", "min"), ("key", "max"), ("split", "count_distinct")]
    groups = table.group_by("sha256").aggregate(wanted)
    groups = groups.filter(pc.greater(groups["key_count"], 1))
    examples = groups.slice(0, Report.EXAMPLES).select(["key_min", "key_max"]).to_pylist()
    return Duplicates(
        len(groups),
        (pc.sum(groups["key_count"]).as_py() or 0) - len(groups),
        len(groups.filter(pc.greater(groups["split_count_distinct"], 1))),
        [[example["key_min"], example["key_max"]] for example in examples],
    )


class Manifest:
    """The accepted samples of a split, as Arrow columns: a hundred thousand of them are some twenty megabytes."""

    def __init__(self, path: str | Path, split: str | None = "train"):
        """`path` as in `data.path`. Raises InputError if there is no manifest, no sample, or a shard that changed."""
        file = find_manifest(Path(path))
        about = read_about(file)
        filters = [("status", "=", OK)] + ([] if split is None else [("split", "=", split)])
        columns = ["key", "file", "offset", "size", "sha256", "captions", "keywords", "split"]
        self.table = pq.read_table(file, columns=columns, filters=filters, partitioning=None)
        if not len(self.table):
            which = "" if split is None else f" of split {split!r}"
            raise InputError(
                f"no pictures{which} in {str(file)!r}; it needs at least one, see {file.parent}/report.json"
            )
        self.root = (file.parent / about["root"]).resolve()
        for name, size in about["containers"].items():
            self.check_container(file, name, size)

    def check_container(self, manifest: Path, name: str, size: int) -> None:
        """Refuse a tar or Arrow file that is gone or has another size than it had."""
        try:
            with open_inside(self.root, name) as file:
                now = file.seek(0, os.SEEK_END)
        except Rejected as error:
            raise InputError(f"{str(self.root / name)!r}, which {str(manifest)!r} lists: {error}") from error
        if now != size:
            sizes = f"it has {now:,} bytes, and had {size:,} when it was checked"
            raise InputError(f"{str(self.root / name)!r} is another file: {sizes}; `t2i data check` it again")

    def __len__(self) -> int:
        return len(self.table)

    def value(self, column: str, index: int) -> Any:
        return self.table[column][index].as_py()

    def rows(self, *columns: str) -> Iterator[dict[str, Any]]:
        """All rows in order, a few at a time in memory."""
        for batch in self.table.select(columns).to_batches(max_chunksize=ROW_GROUP):
            yield from batch.to_pylist()

    def read(self, index: int) -> bytes:
        """The picture's bytes, which are those that were checked. Raises Rejected."""
        file, offset, size = (self.value(column, index) for column in ("file", "offset", "size"))
        data = read_range(self.root, file, offset, size)
        if hashlib.sha256(data).digest() != self.value("sha256", index):
            raise Rejected(Reason.changed)
        return data


def splits_of(path: str | Path) -> list[str]:
    """The splits that a manifest has accepted samples of."""
    file = find_manifest(Path(path))
    table = pq.read_table(file, columns=["split"], filters=[("status", "=", OK)], partitioning=None)
    return sorted(table["split"].unique().to_pylist())


def find_manifest(path: Path) -> Path:
    """A manifest itself, or the one of a source or of a folder that a check wrote."""
    for file in (path, path / NAME, path / FOLDER / NAME, default_folder(str(path)) / NAME):
        if file.suffix == ".parquet" and file.is_file() and METADATA in (pq_metadata(file) or {}):
            return file
    raise InputError(f"no manifest in {str(path)!r}; `t2i data check {path}` writes one")


def pq_metadata(file: Path) -> dict[bytes, bytes] | None:
    try:
        return pq.read_metadata(file).metadata
    except (pa.ArrowException, OSError):
        return None


def read_about(file: Path) -> dict[str, Any]:
    """What a manifest says of itself. Raises InputError if this version cannot read it."""
    try:
        about = json.loads((pq_metadata(file) or {})[METADATA])
        version = about["version"]
        complete = isinstance(about["root"], str) and isinstance(about["containers"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(file)!r} is not a whole manifest; `t2i data check` writes one") from error
    if version != VERSION or not complete or not pq.read_schema(file).remove_metadata().equals(SCHEMA):
        what = f"a manifest of version {version!r}, this reads {VERSION}"
        raise InputError(f"{str(file)!r} is {what}; `t2i data check` writes it anew")
    return about
