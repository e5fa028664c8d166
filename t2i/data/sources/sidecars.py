"""Sidecars."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from t2i.data.reasons import Reason, Rejected
from t2i.data.sources.samples import (
    CAPTIONS,
    MAX_CAPTIONS,
    Columns,
    Notes,
    Sample,
    Source,
    captions_of_bytes,
    ignore,
    is_picture,
    located,
    open_inside,
    printable,
    refuse_column,
    relative,
)
from t2i.errors import InputError

# ---- a picture and a text file of the same name ----


def open_sidecars(root: Path, files: list[Path], notes: Notes, columns: Columns) -> Source:
    """`name.png` with `name.txt` or `name.caption`, each line of which is a caption."""
    for what, given in (("image", columns.image), ("caption", columns.caption), ("label", columns.label)):
        refuse_column(what, given, "pictures with text files have no columns")
    pictures = [file for file in files if is_picture(file)]
    if not pictures:
        kinds = "name.png with name.txt, pictures with metadata.jsonl or .csv, .tar or .parquet files"
        raise InputError(f"no pictures in {str(root)!r}; it can hold {kinds}")
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in CAPTIONS}
    pictured = Counter(file.with_suffix("") for file in pictures)
    lone = [file for file in files if file.suffix.lower() in CAPTIONS and file.with_suffix("") not in pictured]
    for file in files:
        if file.suffix.lower() not in CAPTIONS and not is_picture(file):
            ignore(file, notes)

    def samples(work: Path) -> Iterator[Sample]:
        for picture in pictures:
            sample = located(relative(picture, root))
            if sample.problem is None:
                try:
                    if picture.with_suffix("") not in texts:
                        raise Rejected(Reason.no_caption, f"no {picture.stem}.txt")
                    if (count := pictured[picture.with_suffix("")]) > 1:
                        raise Rejected(Reason.repeated_key, f"{count} pictures {picture.stem} with one text")
                    sample.captions = read_sidecar(root, picture)
                except Rejected as error:
                    sample.problem = error
            yield sample
        for file in lone:
            yield Sample(printable(relative(file, root)), problem=Rejected(Reason.no_picture))

    return Source(root, samples, notes, len(pictures) + len(lone))


def has_pairs(files: list[Path]) -> bool:
    """Whether any picture has a text file of its name."""
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in CAPTIONS}
    return any(is_picture(file) and file.with_suffix("") in texts for file in files)


def read_sidecar(root: Path, picture: Path) -> list[str]:
    for suffix in CAPTIONS:
        for text in (picture.with_suffix(suffix), picture.with_suffix(suffix.upper())):
            if text.exists() or text.is_symlink():
                with open_inside(root, relative(text, root)) as file:
                    return captions_of_bytes(file.read(MAX_CAPTIONS + 1))
    raise Rejected(Reason.no_caption, f"no {picture.stem}.txt")
