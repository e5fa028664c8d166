"""Labels of pictures for classifiers: one for each picture, in a table beside the manifest."""

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from t2i.errors import InputError

LABELS_FILE = "labels.parquet"
LABELS_SCHEMA = pa.schema({"key": pa.string(), "label": pa.string()})  # key: as in the manifest
MAX_CLASSES = 100_000


def get_single_label(sample: Any, column: str) -> str:
    """Return the label of a sample. Raises InputError if it has none or several."""
    labels = list(dict.fromkeys(sample.labels))
    if len(labels) != 1:
        number = f"{len(labels)} labels, {', '.join(map(repr, labels))}" if labels else "no label"
        raise InputError(f"{sample.key!r} has {number} in column {column!r}; every picture needs one")
    return labels[0]


def write_labels(folder: Path, column: str, labels: dict[str, str]) -> None:
    """Write the label of each key into `folder/labels.parquet`."""
    schema = LABELS_SCHEMA.with_metadata({b"column": column.encode()})
    table = pa.table({"key": list(labels), "label": list(labels.values())}, schema)
    pq.write_table(table, folder / LABELS_FILE, compression="zstd")


class Labels:
    """The classes of a data set, sorted by name, and the class of each key.

    Raises InputError if there are no labels beside the manifest, a key has several, or there is only one class.
    """

    def __init__(self, manifest: Path):
        self.file = file = manifest.parent / LABELS_FILE
        remedy = f"`t2i data check {shlex.quote(str(manifest.parent.parent))} --label-column COLUMN` writes them"
        if not file.is_file():
            raise InputError(f"no labels in {str(file)!r}; {remedy}")
        try:
            table = pq.read_table(file, columns=["key", "label"], partitioning=None)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{str(file)!r} contains no labels ({error}); {remedy}") from error
        # One label for each key, and more than one class
        keys, labels = (table[name].to_pylist() for name in ("key", "label"))
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise InputError(f"{str(file)!r} gives {twice[0]!r} {keys.count(twice[0])} labels; every picture needs one")
        self.classes = sorted(set(labels))
        if not 2 <= len(self.classes) <= MAX_CLASSES:
            raise InputError(f"{str(file)!r} has {len(self.classes)} classes; it needs from 2 to {MAX_CLASSES:,}")
        number = {name: i for i, name in enumerate(self.classes)}
        self.class_numbers = {key: number[label] for key, label in zip(keys, labels)}

    def find_classes(self, dataset: Any) -> torch.Tensor:
        """Return the class of each sample, (len(dataset),), int64. Raises InputError for a sample without a label."""
        keys = [dataset.get_sample_key(index) for index in range(len(dataset))]
        if missing := [key for key in keys if key not in self.class_numbers]:
            number = f"{len(missing)} of {len(keys)} pictures have no label, such as {missing[0]!r}"
            raise InputError(f"{number}; {str(self.file)!r} must have one for each")
        return torch.tensor([self.class_numbers[key] for key in keys])
