"""Choice of the source: a folder with text files or metadata, tars, Parquet files, or a data set on the hub.

A source yields samples: the captions of an image, and its place as a file, an offset and a size, so that images of
all sources are read in the same way. No image is decoded here.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from t2i.data.sources import parquet, tars
from t2i.data.sources.metadata import METADATA_FILES, open_metadata
from t2i.data.sources.samples import Columns, Source, SourceNotes
from t2i.data.sources.sidecars import has_pairs, open_sidecars
from t2i.errors import InputError

LEFTOVER_SUFFIXES = (".unfinished", ".replaced")  # of folders whose writing was interrupted


def open_data_source(name: str, columns: Columns) -> Source:
    """Open the source of a path or of a name on the hub. Raises InputError if it does not exist or cannot be read."""
    # A name on the hub: not data/typo, whose first folder exists here
    path = Path(name)
    is_local = path.exists() or path.parts[:1] and Path(path.parts[0]).exists()
    if name.startswith("hub:") or (not is_local and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)):
        return parquet.open_hub(name.removeprefix("hub:"), columns)
    if not path.exists():
        raise InputError(f"no file or folder {name!r}; give one, or hub:ORGANISATION/NAME")

    # A single file
    path = path.resolve()
    if path.is_file():
        if tars.is_compressed(path):
            raise InputError(f"{name!r} is compressed and cannot be read by offset; decompress it to a plain .tar")
        if path.suffix.lower() == ".tar":
            return tars.open_tars(path.parent, [path], columns)
        if path.suffix.lower() == ".parquet":
            return parquet.open_parquet(path.parent, [path], columns)
        raise InputError(f"{name!r} is neither a .tar nor a .parquet file; give one of them, or a folder")
    if not path.is_dir():
        raise InputError(f"{name!r} is neither an ordinary file nor a folder")
    if parquet.is_saved_dataset(path):
        return parquet.open_saved_dataset(path, columns)

    # A folder, by the files in it. Metadata comes first: it lists images that may have text files beside them.
    files = list(walk_files(path, notes := SourceNotes()))
    if any(file.name in METADATA_FILES for file in files):
        return open_metadata(path, files, notes, columns)
    shards = [file for file in files if tars.is_tar(file)]
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    pairs = has_pairs(files)  # if so, tars and tables without images are ignored
    if shards and (not pairs or any(map(tars.has_images, shards))):
        return tars.open_tars(path, files, columns, notes)
    if tables and (not pairs or any(map(parquet.has_image_column, tables))):
        return parquet.open_parquet(path, files, columns, notes)
    return open_sidecars(path, files, notes, columns)


def walk_files(root: Path, notes: SourceNotes) -> Iterator[Path]:
    """Yield the files below a folder in order of their names, without hidden ones and those that a check wrote."""

    def raise_error(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=raise_error):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        # Links may form a circle, or lead out of the source
        notes.ignored.update({"linked folders": len(links)} if links else {})
        folders[:] = sorted(name for name in folders if name not in links and not is_skipped_folder(here / name))
        for name in sorted(names):
            if name.startswith("."):
                notes.ignored["hidden files"] += 1
            else:
                yield here / name


def is_skipped_folder(folder: Path) -> bool:
    return folder.name.startswith(".") or folder.name.endswith(LEFTOVER_SUFFIXES) or is_check_output(folder)


def is_check_output(folder: Path) -> bool:
    return (folder / "manifest.parquet").is_file() and (folder / "report.json").is_file()
