"""Folders of images with a text file beside each: name.png with name.txt, name.caption or name.png.txt."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from t2i.data.reasons import Reason, RejectedSample
from t2i.data.sources.names import describe_names, fold_look, fold_name
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
    """Return the source of a folder of images with text files. Each line of a text file is a caption."""
    columns.check_unset("image", "caption", "label", reason="images with text files have no columns")
    names = [file.relative_to(root).as_posix() for file in files if is_image_file(file)]
    if not names:
        kinds = "name.png with name.txt, images with metadata.jsonl or .csv, .tar files, or .parquet files"
        raise InputError(f"no images in {str(root)!r}; it can contain {kinds}")
    pairs = pair_names(names, [file.relative_to(root).as_posix() for file in files if is_text_file(file)])
    notes.ignored.update({"text files of images that have another": pairs.unread} if pairs.unread else {})
    notes.count_ignored(file for file in files if file.suffix.lower() not in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES))

    def iterate_samples(scratch_folder: Path) -> Iterator[Sample]:
        """Yield a sample for each image file, then the text files without an image."""
        for name in names:
            sample = build_file_sample(name)
            if sample.problem is None:
                try:
                    with open_inside_root(root, pairs.find_text(name)) as file:
                        sample.captions = parse_caption_bytes(file.read(MAX_TEXT_SIZE + 1))
                except RejectedSample as error:
                    sample.problem = error
            yield sample
        # Text files without an image are rejected samples, so that nothing is lost silently
        for name in pairs.lone:
            yield Sample(escape_name(name), problem=RejectedSample(Reason.no_picture))

    return Source(root, iterate_samples, notes, len(names) + len(pairs.lone))


def is_text_file(file: Path) -> bool:
    return file.suffix.lower() in CAPTION_SUFFIXES


def has_pairs(files: list[Path]) -> bool:
    """Return True if any image has a text file of its name."""
    names = (file.as_posix() for file in files if is_image_file(file))
    return bool(pair_names(names, [file.as_posix() for file in files if is_text_file(file)]).texts)


@dataclass
class NamePairs:
    """Images and text files that belong together, by their names."""

    texts: dict[str, str]  # the text file of an image
    uses: Counter[str]  # the number of images of a text file
    alike: dict[str, str]  # for an image without a text file: one whose name looks like that of its text file
    lone: list[str]  # text files without an image
    unread: int  # text files of images that have another one

    def find_text(self, name: str) -> str:
        """Return the name of an image's text file. Raises RejectedSample if there is none, or others share it."""
        stem = Path(name).stem
        if name in self.alike:
            detail = f"{describe_names(name, self.alike[name])}: their names differ"
            raise RejectedSample(Reason.no_caption, detail)
        if name not in self.texts:
            raise RejectedSample(Reason.no_caption, f"no {stem}.txt")
        if (count := self.uses[self.texts[name]]) > 1:
            raise RejectedSample(Reason.repeated_key, f"{count} images {stem} with one text file")
        return self.texts[name]


def pair_names(names: Iterable[str], texts: list[str]) -> NamePairs:
    """Pair images and text files: name.png with name.png.txt, or else with name.txt.

    Names in the same spelling come first, and .txt before .caption.
    """
    by_stem = defaultdict[str, list[str]](list)
    for text in sorted(texts, key=lambda text: (rank_suffix(text), text)):
        stem = remove_suffix(text)
        for spelling in dict.fromkeys((stem, unicodedata.normalize("NFC", stem), fold_name(stem))):
            by_stem[spelling].append(text)

    # Each image gets the first text file under one of its names
    found: dict[str, str] = {}
    used: set[str] = set()  # by any image, as its text file or as one that comes later
    without = []
    for name in names:
        stem = remove_suffix(name)
        spellings = (name, stem, fold_name(name), unicodedata.normalize("NFC", stem))
        choices = [text for spelling in dict.fromkeys(spellings) for text in by_stem.get(spelling, [])]
        used.update(choices)
        if choices:
            found[name] = choices[0]
        else:
            without.append(name)

    # Of the others, name what looks alike; such an image and text file count as one sample
    lone = [text for text in texts if text not in used]
    by_look = {fold_look(remove_suffix(text)): text for text in lone}
    looks = {name: by_look.get(fold_look(remove_suffix(name))) for name in without}
    alike = {name: text for name, text in looks.items() if text is not None}
    lone = [text for text in lone if text not in alike.values()]
    uses = Counter(found.values())
    return NamePairs(found, uses, alike, lone, unread=len(used) - len(uses))


def remove_suffix(name: str) -> str:
    return name.removesuffix(Path(name).suffix)


def rank_suffix(name: str) -> tuple[int, bool]:
    """Return the order of a text file among those of one name."""
    suffix = Path(name).suffix
    return CAPTION_SUFFIXES.index(suffix.lower()), suffix != suffix.lower()
