"""Whether a manifest still says what lies in its source."""

from pathlib import Path

import pyarrow.parquet as pq

from t2i.data.manifest import find_manifest, read_manifest_metadata
from t2i.data.reasons import Reason
from t2i.data.sources.metadata import METADATA_FILES
from t2i.data.sources.open_source import open_source
from t2i.data.sources.samples import Columns, Sample
from t2i.errors import InputError

PRESENT_ROWS = [("status", "!=", Reason.missing_file.name)]


def find_changes(path: str | Path) -> str | None:
    """What was added to, taken from or changed in a folder of pictures since it was checked: one phrase, or None.

    Names, sizes and captions are compared; no picture is read. Of tars and parquet files `Manifest` compares the sizes.
    Raises InputError if there is no manifest.
    """
    file = find_manifest(Path(path))
    about = read_manifest_metadata(file)
    root = (file.parent / about["root"]).resolve()
    if about["containers"] or not root.is_dir():
        return None
    try:
        source = open_source(str(root), Columns())
    except InputError as error:  # no pictures any more; or columns of a table that only the check was told
        return str(error) if "no pictures" in str(error) else None
    rows = pq.read_table(file, columns=["file", "size", "captions"], filters=PRESENT_ROWS, partitioning=None)
    before = {row["file"]: row for row in rows.to_pylist() if row["file"]}
    by_name = not any(next(root.rglob(name), None) for name in METADATA_FILES)  # name.txt: no column to be told
    now = {
        sample.file: sample for sample in source.iterate_samples(root) if sample.file and (root / sample.file).is_file()
    }
    new, gone = now.keys() - before.keys(), before.keys() - now.keys()
    other = {name for name in now.keys() & before.keys() if is_sample_changed(root, now[name], before[name], by_name)}
    counts = {"new": new, "gone": gone, "changed": other}
    found = [f"{len(names):,} {what} (such as {min(names)!r})" for what, names in counts.items() if names]
    return ", ".join(found) or None


def is_sample_changed(root: Path, sample: Sample, row: dict, captions: bool) -> bool:
    """Whether a picture has another size than when it was checked, or, if they are compared, other captions."""
    if captions and sample.captions != row["captions"]:
        return True
    return row["size"] is not None and (root / sample.file).stat().st_size != row["size"]
