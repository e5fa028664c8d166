"""Labels of pictures, which classifiers learn: one a picture, in a table beside the manifest."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from t2i.errors import InputError

LABELS_FILE = "labels.parquet"
LABELS_SCHEMA = pa.schema({"key": pa.string(), "label": pa.string()})  # the key is the manifest's
MAX_CLASSES = 100_000


def get_single_label(sample: Any, column: str) -> str:
    """The one label of a sample. Raises InputError for none, or several."""
    labels = list(dict.fromkeys(sample.labels))
    if len(labels) != 1:
        found = f"{len(labels)} labels, {', '.join(map(repr, labels))}" if labels else "no label"
        raise InputError(f"{sample.key!r} has {found} in column {column!r}; every picture needs one")
    return labels[0]


def write_labels(folder: Path, column: str, labels: dict[str, str]) -> None:
    """`folder/labels.parquet`: the label of each key."""
    table = pa.table({"key": list(labels), "label": list(labels.values())}, LABELS_SCHEMA)
    pq.write_table(
        table.replace_schema_metadata({b"column": column.encode()}), folder / LABELS_FILE, compression="zstd"
    )


class Labels:
    """The classes of a data set, sorted by name, and the class of each key.

    Raises InputError if there are no labels beside the manifest, a key has two, or there is only one class.
    """

    def __init__(self, manifest: Path):
        self.file = file = manifest.parent / LABELS_FILE
        remedy = f"`t2i data check {manifest.parent.parent} --label-column COLUMN` writes them"
        if not file.is_file():
            raise InputError(f"no labels in {str(file)!r}; {remedy}")
        try:
            table = pq.read_table(file, columns=["key", "label"], partitioning=None)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{str(file)!r} holds no labels ({error}); {remedy}") from error
        keys, labels = (table[name].to_pylist() for name in ("key", "label"))
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise InputError(f"{str(file)!r} gives {twice[0]!r} {keys.count(twice[0])} labels; every picture needs one")
        self.classes = sorted(set(labels))
        if not 2 <= len(self.classes) <= MAX_CLASSES:
            raise InputError(f"{str(file)!r} has {len(self.classes)} classes; from 2 to {MAX_CLASSES:,} can be learnt")
        number = {name: i for i, name in enumerate(self.classes)}
        self.class_numbers = {key: number[label] for key, label in zip(keys, labels)}

    def find_classes(self, dataset: Any) -> torch.Tensor:
        """(len(dataset),), int64: the class of each sample. Raises InputError for one without a label."""
        keys = [dataset.sample_key(index) for index in range(len(dataset))]
        if missing := [key for key in keys if key not in self.class_numbers]:
            what = f"{len(missing)} of {len(keys)} pictures have no label, such as {missing[0]!r}"
            raise InputError(f"{what}; {str(self.file)!r} must give one to each")
        return torch.tensor([self.class_numbers[key] for key in keys])
