"""Labels of images: one of each column for each image, in a table beside the manifest.

The first column holds the classes of classifiers. Training may sample by any of them.
"""

import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from t2i.errors import InputError

LABELS_FILE = "labels.parquet"
PREFIX = "label:"  # of the further columns
MAX_CLASSES = 100_000


def get_single_label(sample: Any, column: str) -> str:
    """Return the label of a sample. Raises InputError if it has none or several."""
    labels = list(dict.fromkeys(sample.labels.get(column, [])))
    if len(labels) != 1:
        number = f"{len(labels)} labels, {', '.join(map(repr, labels))}" if labels else "no label"
        raise InputError(f"{sample.key!r} has {number} in column {column!r}; every image needs one")
    return labels[0]


def write_labels(folder: Path, labels: dict[str, dict[str, str]]) -> None:
    """Write the labels of each column, by the keys of the manifest, into `folder/labels.parquet`."""
    # The first column is "label", as in files of earlier versions; a prefix keeps the others' names apart from it
    first, *others = labels
    names = {"label": first} | {f"{PREFIX}{column}": column for column in others}
    keys = list(labels[first])
    table = pa.table({"key": keys, **{name: [labels[column][key] for key in keys] for name, column in names.items()}})
    pq.write_table(table.replace_schema_metadata({b"column": first.encode()}), folder / LABELS_FILE, compression="zstd")


def read_labels(manifest: Path, column: str) -> dict[str, str]:
    """Return the label of each key in a column. Raises InputError, with the columns there are, if it was not kept."""
    file = manifest.parent / LABELS_FILE
    remedy = (
        f"`t2i data check {shlex.quote(str(manifest.parent.parent))} --label-column {shlex.quote(column)}` keeps it"
    )
    if not file.is_file():
        raise InputError(f"no column {column!r}: there is no {str(file)!r}; {remedy}")
    with explain_label_errors(file, remedy):
        table = pq.read_table(file, partitioning=None)
        first = (table.schema.metadata or {})[b"column"].decode()
        names = {first: "label"} | {name.removeprefix(PREFIX): name for name in table.column_names if PREFIX in name}
        if column not in names:
            raise InputError(f"no column {column!r} in {str(file)!r}; it has {', '.join(names)}; {remedy}")
        return dict(zip(table["key"].to_pylist(), table[names[column]].to_pylist()))


@contextmanager
def explain_label_errors(file: Path, remedy: str) -> Iterator[None]:
    """Turn an error of reading inside the block into an InputError of one line."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{str(file)!r} contains no labels ({error}); {remedy}") from error


class Labels:
    """The classes of a data set, sorted by name, and the class of each key.

    Raises InputError if there are no labels beside the manifest, a key has several, or there is only one class.
    """

    def __init__(self, manifest: Path):
        self.file = file = manifest.parent / LABELS_FILE
        remedy = f"`t2i data check {shlex.quote(str(manifest.parent.parent))} --label-column COLUMN` writes them"
        if not file.is_file():
            raise InputError(f"no labels in {str(file)!r}; {remedy}")
        with explain_label_errors(file, remedy):
            table = pq.read_table(file, columns=["key", "label"], partitioning=None)
        # One label for each key, and more than one class
        keys, labels = (table[name].to_pylist() for name in ("key", "label"))
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise InputError(f"{str(file)!r} gives {twice[0]!r} {keys.count(twice[0])} labels; every image needs one")
        self.classes = sorted(set(labels))
        if not 2 <= len(self.classes) <= MAX_CLASSES:
            raise InputError(f"{str(file)!r} has {len(self.classes)} classes; it needs from 2 to {MAX_CLASSES:,}")
        number = {name: i for i, name in enumerate(self.classes)}
        self.class_numbers = {key: number[label] for key, label in zip(keys, labels)}

    def find_classes(self, dataset: Any) -> torch.Tensor:
        """Return the class of each sample, (len(dataset),), int64. Raises InputError for a sample without a label."""
        keys = [dataset.get_sample_key(index) for index in range(len(dataset))]
        if missing := [key for key in keys if key not in self.class_numbers]:
            number = f"{len(missing)} of {len(keys)} images have no label, such as {missing[0]!r}"
            raise InputError(f"{number}; {str(self.file)!r} must have one for each")
        return torch.tensor([self.class_numbers[key] for key in keys])
