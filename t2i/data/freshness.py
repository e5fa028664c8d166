"""Comparison of a manifest with the current state of its source."""

from pathlib import Path

import pyarrow.parquet as pq

from t2i.data.manifest import find_manifest, read_manifest_metadata
from t2i.data.reasons import Reason
from t2i.data.sources.metadata import METADATA_FILES
from t2i.data.sources.open_data_source import open_data_source
from t2i.data.sources.samples import Columns
from t2i.errors import InputError

PRESENT_ROWS = [("status", "!=", Reason.missing_file.name)]


def find_changes(path: str | Path) -> str | None:
    """Return one phrase about files that are new, gone or changed since a folder was checked, or None.

    Names, sizes and captions are compared; no image is read. For tars and Parquet files `open_manifest` compares the
    sizes instead. Raises InputError if there is no manifest.
    """
    # Open the source again as the check did
    file = find_manifest(Path(path))
    about = read_manifest_metadata(file)
    root = (file.parent / about["root"]).resolve()
    if about["containers"] or not root.is_dir():
        return None
    try:
        source = open_data_source(str(root), Columns())
    except InputError as error:  # no images any more, or columns that were given as options of the check
        return str(error) if "no images" in str(error) else None

    # Compare its samples with the rows of the manifest
    rows = pq.read_table(file, columns=["file", "size", "captions"], filters=PRESENT_ROWS, partitioning=None)
    before = {row["file"]: row for row in rows.to_pylist() if row["file"]}
    # Captions of metadata may be in a column that was an option of the check: compare those of text files alone.
    has_text_files = not any(next(root.rglob(name), None) for name in METADATA_FILES)
    samples = (sample for sample in source.iterate_samples(root) if sample.file)
    now = {sample.file: sample for sample in samples if (root / sample.file).is_file()}
    changes = {"new": now.keys() - before.keys(), "gone": before.keys() - now.keys(), "changed": set[str]()}
    for name in now.keys() & before.keys():
        size = before[name]["size"]
        other_captions = has_text_files and now[name].captions != before[name]["captions"]
        if other_captions or (size is not None and (root / name).stat().st_size != size):
            changes["changed"].add(name)
    phrases = [f"{len(names):,} {kind} (such as {min(names)!r})" for kind, names in changes.items() if names]
    return ", ".join(phrases) or None
