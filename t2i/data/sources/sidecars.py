"""Folders of pictures with a text file beside each: name.png with name.txt or name.caption."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from t2i.data.reasons import Reason, RejectedSample
from t2i.data.sources.samples import (
    CAPTION_SUFFIXES,
    MAX_TEXT_SIZE,
    Columns,
    Sample,
    Source,
    SourceNotes,
    build_file_sample,
    check_column_unset,
    count_ignored_file,
    escape_name,
    get_relative_name,
    is_image_file,
    open_inside_root,
    parse_caption_bytes,
)
from t2i.errors import InputError


def open_sidecars(root: Path, files: list[Path], notes: SourceNotes, columns: Columns) -> Source:
    """Return the source of a folder of pictures with text files. Each line of a text file is a caption."""
    for kind, column in (("image", columns.image), ("caption", columns.caption), ("label", columns.label)):
        check_column_unset(kind, column, "pictures with text files have no columns")
    pictures = [file for file in files if is_image_file(file)]
    if not pictures:
        kinds = "name.png with name.txt, pictures with metadata.jsonl or .csv, .tar files, or .parquet files"
        raise InputError(f"no pictures in {str(root)!r}; it can contain {kinds}")
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in CAPTION_SUFFIXES}
    counts = Counter(file.with_suffix("") for file in pictures)
    lone = [file for file in files if file.suffix.lower() in CAPTION_SUFFIXES and file.with_suffix("") not in counts]
    for file in files:
        if file.suffix.lower() not in CAPTION_SUFFIXES and not is_image_file(file):
            count_ignored_file(file, notes)

    def iterate_samples(work: Path) -> Iterator[Sample]:
        for picture in pictures:
            sample = build_file_sample(get_relative_name(picture, root))
            if sample.problem is None:
                try:
                    if picture.with_suffix("") not in texts:
                        raise RejectedSample(Reason.no_caption, f"no {picture.stem}.txt")
                    if (count := counts[picture.with_suffix("")]) > 1:
                        raise RejectedSample(Reason.repeated_key, f"{count} pictures {picture.stem} with one text file")
                    sample.captions = read_sidecar(root, picture)
                except RejectedSample as error:
                    sample.problem = error
            yield sample
        for file in lone:
            yield Sample(escape_name(get_relative_name(file, root)), problem=RejectedSample(Reason.no_picture))

    return Source(root, iterate_samples, notes, len(pictures) + len(lone))


def has_pairs(files: list[Path]) -> bool:
    """Return True if any picture has a text file of its name."""
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in CAPTION_SUFFIXES}
    return any(is_image_file(file) and file.with_suffix("") in texts for file in files)


def read_sidecar(root: Path, picture: Path) -> list[str]:
    """Return the captions in the text file of a picture. Raises RejectedSample."""
    for suffix in CAPTION_SUFFIXES:
        for text in (picture.with_suffix(suffix), picture.with_suffix(suffix.upper())):
            if text.exists() or text.is_symlink():
                with open_inside_root(root, get_relative_name(text, root)) as file:
                    return parse_caption_bytes(file.read(MAX_TEXT_SIZE + 1))
    raise RejectedSample(Reason.no_caption, f"no {picture.stem}.txt")
