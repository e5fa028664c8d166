"""The emoji's data set: `t2i data emoji` writes it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from t2i.checks import check_integer
from t2i.data.emoji.keywords import (
    CLDR_FOLDER,
    KeywordList,
    find_keywords,
    get_code,
    merge_keywords,
    read_cldr_keywords,
    read_keyword_list,
)
from t2i.data.emoji.names import EMOJI_TEST_FILE, Emoji, mark_held_out, read_emoji_names
from t2i.data.emoji.noto import FONT_FILE, load_font, render_character
from t2i.data.emoji.styles import Style, StyledDrawings
from t2i.data.manifest import write_manifest
from t2i.data.sources.samples import Columns
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.progress import Progress

LABEL_COLUMNS = ("group", "subgroup", "concept", "kind")  # the first is that of classifiers
STYLE_COLUMNS = ("style", "emoji")  # an emoji in all styles and skin tones is one value of "emoji"


def render_emoji(
    folder: str | Path,
    size: int = 128,
    font: Path = FONT_FILE,
    names: Path = EMOJI_TEST_FILE,
    lists: Sequence[KeywordList] = (),
    styles: Sequence[Style] = (),
    packages: Path | None = None,
) -> list[Emoji]:
    """Draw every fully-qualified emoji into `folder`, which must be new or empty, at `size` x `size` pixels on white.

    Writes a PNG for each and `metadata.jsonl` in the imagefolder convention; the folder appears complete or not at all.
    Then the manifest is written into it. `lists` add keywords to CLDR's, `styles` add the drawings of other sets; npm
    puts their packages into `packages`, by default into a temporary folder. Raises InputError if the font, a data file,
    a package or what draws it is missing, or Pillow lacks raqm.
    """
    # Check everything before an emoji is drawn
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} exists and is not an empty folder; give a new one")
    check_integer("size", size, 16, 1024)
    if not names.is_file():
        raise InputError(f"no file {str(names)!r}; install it (apt-get install unicode-data)")
    face = load_font(font)

    # Collect names, keywords and the drawings of other sets
    with TemporaryDirectory() as temporary:
        packages = packages or Path(temporary)
        emoji = collect_emoji(names, lists, packages)
        sets = [StyledDrawings(style, emoji, packages) for style in styles]

    # Draw and write
    def draw_all() -> Iterator[tuple[Emoji, Image.Image]]:
        for item in emoji:
            yield item, render_character(item.characters, face, size)
        for drawings in sets:
            yield from drawings.render(size)

    count = len(emoji) + sum(len(drawings.emoji) for drawings in sets)
    drawn = []
    with (
        Progress("drawing", count, "emoji") as progress,
        create_folder_atomically(folder) as unfinished,
        open(unfinished / "metadata.jsonl", "w", encoding="utf-8") as metadata,
    ):
        for item, image in progress.iterate(draw_all()):
            image.save(unfinished / item.file_name, optimize=True)
            row = item.build_row() | ({"style": item.style or "noto", "emoji": item.concept} if sets else {})
            metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
            drawn.append(item)
    columns = Columns(labels=(*LABEL_COLUMNS, *STYLE_COLUMNS) if sets else LABEL_COLUMNS)
    write_manifest(folder, columns=columns, quiet=True)
    return drawn


def collect_emoji(names: Path, lists: Sequence[KeywordList], packages: Path) -> list[Emoji]:
    """Return all emoji with their keywords and splits."""
    emoji = read_emoji_names(names)
    keywords = read_cldr_keywords(CLDR_FOLDER)
    others = [read_keyword_list(source, packages) for source in lists]
    for item in emoji:
        item.keywords = merge_keywords(
            keywords.get(get_code(item.characters), []), find_keywords(item.characters, others)
        )
    mark_held_out(emoji)
    return emoji
