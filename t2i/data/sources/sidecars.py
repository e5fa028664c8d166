"""Folders of pictures with a text file beside each: name.png with name.txt or name.caption."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from t2i.data.reasons import Reason, RejectedSample
from t2i.data.sources.samples import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_TEXT_SIZE,
    Columns,
    Sample,
    Source,
    SourceNotes,
    build_file_sample,
    escape_name,
    is_image_file,
    open_inside_root,
    parse_caption_bytes,
)
from t2i.errors import InputError


def open_sidecars(root: Path, files: list[Path], notes: SourceNotes, columns: Columns) -> Source:
    """Return the source of a folder of pictures with text files. Each line of a text file is a caption."""
    columns.check_unset("image", "caption", "label", reason="pictures with text files have no columns")
    pictures = [file for file in files if is_image_file(file)]
    if not pictures:
        kinds = "name.png with name.txt, pictures with metadata.jsonl or .csv, .tar files, or .parquet files"
        raise InputError(f"no pictures in {str(root)!r}; it can contain {kinds}")

    # Pair pictures and text files by their names without suffix
    texts = [file for file in files if file.suffix.lower() in CAPTION_SUFFIXES]
    stems = {file.with_suffix("") for file in texts}
    counts = Counter(file.with_suffix("") for file in pictures)
    lone = [file for file in texts if file.with_suffix("") not in counts]
    notes.count_ignored(file for file in files if file.suffix.lower() not in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES))

    def iterate_samples(work: Path) -> Iterator[Sample]:
        for picture in pictures:
            sample = build_file_sample(picture.relative_to(root).as_posix())
            if sample.problem is None:
                try:
                    if picture.with_suffix("") not in stems:
                        raise RejectedSample(Reason.no_caption, f"no {picture.stem}.txt")
                    if (count := counts[picture.with_suffix("")]) > 1:
                        raise RejectedSample(Reason.repeated_key, f"{count} pictures {picture.stem} with one text file")
                    sample.captions = read_sidecar(root, picture)
                except RejectedSample as error:
                    sample.problem = error
            yield sample
        # Text files without a picture are rejected samples, so that nothing is lost silently
        for file in lone:
            name = escape_name(file.relative_to(root).as_posix())
            yield Sample(name, problem=RejectedSample(Reason.no_picture))

    return Source(root, iterate_samples, notes, len(pictures) + len(lone))


def has_pairs(files: list[Path]) -> bool:
    """Return True if any picture has a text file of its name."""
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in CAPTION_SUFFIXES}
    return any(is_image_file(file) and file.with_suffix("") in texts for file in files)


def read_sidecar(root: Path, picture: Path) -> list[str]:
    """Return the captions in the text file of a picture. Raises RejectedSample."""
    for suffix in CAPTION_SUFFIXES:
        # A file system may tell .txt and .TXT apart
        for text in (picture.with_suffix(suffix), picture.with_suffix(suffix.upper())):
            if text.exists() or text.is_symlink():
                with open_inside_root(root, text.relative_to(root).as_posix()) as file:
                    return parse_caption_bytes(file.read(MAX_TEXT_SIZE + 1))
    raise RejectedSample(Reason.no_caption, f"no {picture.stem}.txt")
