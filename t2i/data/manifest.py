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

from t2i.data.labels import LABELS_FILE, get_single_label, write_labels
from t2i.data.pictures import decode_image, silence_pillow
from t2i.data.reasons import Reason, RejectedSample
from t2i.data.report import Duplicates, Report
from t2i.data.sources.open_source import is_check_output, open_source
from t2i.data.sources.samples import Columns, Sample, Source, open_inside_root, read_range
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically

MANIFEST_FILE = "manifest.parquet"
MANIFEST_FOLDER = "t2i"  # below a source folder
CHECK_OUTPUTS = {
    MANIFEST_FILE,
    LABELS_FILE,
    "report.json",
    "sizes.png",
    "rows",
}  # all that a check leaves in its folder
MANIFEST_SCHEMA = pa.schema(
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
METADATA_KEY = b"t2i"  # the key of our JSON in the Parquet metadata
MANIFEST_VERSION = 1
ROW_GROUP_SIZE = 4_096
STATUS_OK = "ok"

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
) -> Report:
    """Read every sample of a source once and write the folder `out`: manifest.parquet, report.json, sizes.png; and
    labels.parquet, if `columns` names a column of labels.

    The folder appears whole or not at all, and replaces one that an earlier check wrote. Raises InputError if there is
    no source to read, no sample in it, a picture without a label or with two, or `out` cannot be written; whatever else
    is wrong with single samples stands in the manifest.
    """
    out = out or default_manifest_folder(str(name))
    label, labels = columns and columns.label, dict[str, str]()
    source = open_source(str(name), columns or Columns())
    check_output_folder(out, str(name))
    report = Report(str(name), str(out / MANIFEST_FILE))
    out = out.resolve()
    with create_folder_atomically(out) as unfinished, silence_pillow():
        root = source.root or unfinished

        def iterate_samples() -> Iterator[Sample]:
            for sample in source.iterate_samples(unfinished):
                report.indexed += 1
                if label and sample.problem is None:
                    labels[sample.key] = get_single_label(sample, label)
                yield sample

        rows = map_in_order(lambda sample: examine_sample(sample, root, held_out, min_size), iterate_samples())
        rows = reject_duplicates(rows) if drop_duplicates else rows
        bar = tqdm(rows, desc="checking", unit=" pictures", total=source.total, disable=True if quiet else None)
        with pq.ParquetWriter(unfinished / MANIFEST_FILE, MANIFEST_SCHEMA, compression="zstd") as writer:
            for group in iterate_groups(bar, ROW_GROUP_SIZE):
                for row in group:
                    report.count_row(
                        row.status, row.key, row.detail, len(row.captions), row.split, row.width, row.height
                    )
                writer.write_table(pa.Table.from_pylist([asdict(row) for row in group], MANIFEST_SCHEMA))
            about = {"version": MANIFEST_VERSION, "source": str(name), "root": format_source_root(source, out)}
            about["containers"] = source.notes.containers
            writer.add_key_value_metadata({METADATA_KEY: json.dumps(about).encode()})
        assert (
            report.ok + report.rejected_count == report.indexed == pq.read_metadata(unfinished / MANIFEST_FILE).num_rows
        )
        if label:
            write_labels(unfinished, label, labels)
        report.notes, report.duplicates = source.notes, find_duplicates(unfinished / MANIFEST_FILE)
        if not report.indexed and (complaint := report.format_complaint()):
            raise InputError(complaint)  # what an earlier check found stays
        report.write_files(unfinished)
    return report


def default_manifest_folder(name: str) -> Path:
    """Where the manifest of a source goes; for hub:ORGANISATION/NAME, data/ORGANISATION--NAME."""
    path = Path(name)
    if path.is_dir():
        return path / MANIFEST_FOLDER
    if path.is_file():
        return path.with_name(f"{path.stem}-{MANIFEST_FOLDER}")
    return Path("data") / "--".join(name.removeprefix("hub:").strip("/").split("/")[-2:])


def check_output_folder(out: Path, source: str) -> None:
    """Refuse to replace the source, what no check wrote, and what cannot be written."""
    path = Path(source.removeprefix("hub:"))
    if path.exists() and path.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{str(out)!r} is or holds the source {source!r}; give another folder with --out")
    if out.is_dir() and any(out.iterdir()) and not is_check_output(out):
        raise InputError(f"{str(out)!r} is not empty and holds no manifest; give another folder with --out")
    if out.is_dir() and (others := {path.name for path in out.iterdir()} - CHECK_OUTPUTS):
        raise InputError(f"{str(out)!r} holds {min(others)!r}, which no check wrote; give another folder with --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file; give a folder with --out")
    parent = next(parent for parent in out.resolve().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{str(out)!r} cannot be written; give another folder with --out")


def format_source_root(source: Source, out: Path) -> str:
    """The root as it is written down: relative where both move together."""
    if source.root in (None, out):
        return "."
    return ".." if source.root == out.parent else str(source.root)


def examine_sample(sample: Sample, root: Path, held_out: float, min_size: int) -> ManifestRow:
    """Read and decode the picture of a sample."""
    row = ManifestRow(sample.key, sample.file, sample.offset, sample.size, split=sample.split or "train")
    row.captions, row.keywords = sample.captions, sample.keywords
    try:
        if sample.problem:
            raise sample.problem
        data = read_range(root, sample.file, sample.offset, sample.size)
        row.size, row.sha256 = len(data), hashlib.sha256(data).digest()
        if sample.split is None and is_chosen_by_hash(row.sha256, held_out):
            row.split = "held_out"
        row.width, row.height = decode_image(data).size
        if min(row.width, row.height) < min_size:
            raise RejectedSample(Reason.too_small, f"{row.width} x {row.height}")
    except RejectedSample as error:
        row.mark_rejected(error.reason, error.detail)
    return row


def is_chosen_by_hash(digest: bytes, share: float) -> bool:
    """For about this share of the pictures; the same answer for every copy of one."""
    return int.from_bytes(digest[:8]) < share * 2**64


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
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


def reject_duplicates(rows: Iterable[ManifestRow]) -> Iterator[ManifestRow]:
    """The first of equal pictures stays."""
    seen: set[bytes] = set()
    for row in rows:
        if row.status == STATUS_OK and row.sha256 is not None:
            if row.sha256 in seen:
                row.mark_rejected(Reason.duplicate, "")
            seen.add(row.sha256)
        yield row


def iterate_groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
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
        manifest, columns=["key", "sha256", "split"], filters=[("status", "=", STATUS_OK)], partitioning=None
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
        about = read_manifest_metadata(file)
        filters = [("status", "=", STATUS_OK)] + ([] if split is None else [("split", "=", split)])
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
            with open_inside_root(self.root, name) as file:
                now = file.seek(0, os.SEEK_END)
        except RejectedSample as error:
            raise InputError(f"{str(self.root / name)!r}, which {str(manifest)!r} lists: {error}") from error
        if now != size:
            sizes = f"it has {now:,} bytes, and had {size:,} when it was checked"
            raise InputError(f"{str(self.root / name)!r} is another file: {sizes}; `t2i data check` it again")

    def __len__(self) -> int:
        return len(self.table)

    def get_value(self, column: str, index: int) -> Any:
        return self.table[column][index].as_py()

    def iterate_rows(self, *columns: str) -> Iterator[dict[str, Any]]:
        """All rows in order, a few at a time in memory."""
        for batch in self.table.select(columns).to_batches(max_chunksize=ROW_GROUP_SIZE):
            yield from batch.to_pylist()

    def read_image(self, index: int) -> bytes:
        """The picture's bytes, which are those that were checked. Raises RejectedSample."""
        file, offset, size = (self.get_value(column, index) for column in ("file", "offset", "size"))
        data = read_range(self.root, file, offset, size)
        if hashlib.sha256(data).digest() != self.get_value("sha256", index):
            raise RejectedSample(Reason.changed)
        return data


def read_splits(path: str | Path) -> list[str]:
    """The splits that a manifest has accepted samples of."""
    file = find_manifest(Path(path))
    table = pq.read_table(file, columns=["split"], filters=[("status", "=", STATUS_OK)], partitioning=None)
    return sorted(table["split"].unique().to_pylist())


def find_manifest(path: Path) -> Path:
    """A manifest itself, or the one of a source or of a folder that a check wrote."""
    for file in (
        path,
        path / MANIFEST_FILE,
        path / MANIFEST_FOLDER / MANIFEST_FILE,
        default_manifest_folder(str(path)) / MANIFEST_FILE,
    ):
        if file.suffix == ".parquet" and file.is_file() and METADATA_KEY in (read_parquet_metadata(file) or {}):
            return file
    raise InputError(f"no manifest in {str(path)!r}; `t2i data check {path}` writes one")


def read_parquet_metadata(file: Path) -> dict[bytes, bytes] | None:
    try:
        return pq.read_metadata(file).metadata
    except (pa.ArrowException, OSError):
        return None


def read_manifest_metadata(file: Path) -> dict[str, Any]:
    """What a manifest says of itself. Raises InputError if this version cannot read it."""
    try:
        about = json.loads((read_parquet_metadata(file) or {})[METADATA_KEY])
        version = about["version"]
        complete = isinstance(about["root"], str) and isinstance(about["containers"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(file)!r} is not a whole manifest; `t2i data check` writes one") from error
    if (
        version != MANIFEST_VERSION
        or not complete
        or not pq.read_schema(file).remove_metadata().equals(MANIFEST_SCHEMA)
    ):
        what = f"a manifest of version {version!r}, this reads {MANIFEST_VERSION}"
        raise InputError(f"{str(file)!r} is {what}; `t2i data check` writes it anew")
    return about
