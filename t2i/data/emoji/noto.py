"""The emoji of Unicode, drawn with the Noto Color Emoji font. Captions are Unicode's names.

Names, groups and order come from Unicode's `emoji-test.txt`, keywords from CLDR's annotations and other lists.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw, ImageFont, features

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
from t2i.data.manifest import write_manifest
from t2i.data.sources.samples import Columns
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.progress import Progress
from t2i.texts import split_lines

FONT_FILE = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST_FILE = Path("/usr/share/unicode/emoji/emoji-test.txt")
BITMAP_SIZE = 109  # the only size of the font's bitmaps, which are 136 x 128 pixels
SKIN_TONE = " skin tone"  # ends the part of a name
LABEL_COLUMNS = ("group", "subgroup", "concept", "kind")  # the first is that of classifiers


@dataclass
class Emoji:
    """A fully-qualified emoji with its names."""

    characters: str
    text: str  # the name, as in "man: dark skin tone, red hair"
    group: str
    subgroup: str
    keywords: list[str] = field(default_factory=list)
    split: str = "train"

    @property
    def file_name(self) -> str:
        return "-".join(f"{ord(character):x}" for character in self.characters) + ".png"

    @property
    def composition_parts(self) -> list[str]:
        """Return the parts of the name: man, dark skin tone and red hair of "man: dark skin tone, red hair"."""
        base, _, modifiers = self.text.partition(": ")
        return [base, *modifiers.split(", ")] if modifiers else [base]

    @property
    def concept(self) -> str:
        """The name without skin tones, so that an emoji with all its tones is one concept."""
        base, *modifiers = self.composition_parts
        modifiers = [part for part in modifiers if not part.endswith(SKIN_TONE)]
        return f"{base}: {', '.join(modifiers)}" if modifiers else base

    @property
    def kind(self) -> str:
        """Kind of the drawing: flags, symbols, skin tones, people without one, or things, which are all others."""
        if self.group in ("Flags", "Symbols"):
            return self.group.lower()
        if self.concept != self.text:
            return "skin tones"
        return "people" if self.group == "People & Body" else "things"


def render_emoji(
    folder: str | Path,
    size: int = 128,
    font: Path = FONT_FILE,
    names: Path = EMOJI_TEST_FILE,
    lists: Sequence[KeywordList] = (),
    packages: Path | None = None,
) -> list[Emoji]:
    """Draw every fully-qualified emoji into `folder`, which must be new or empty, at `size` x `size` pixels on white.

    Writes a PNG for each and `metadata.jsonl` in the imagefolder convention; the folder appears complete or not at all.
    Then the manifest is written into it. `lists` add keywords to CLDR's; npm puts their packages into `packages`, by
    default into a temporary folder. Raises InputError if the font, a data file or a package is missing, or Pillow lacks
    raqm.
    """
    # Check everything before an emoji is drawn
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} exists and is not an empty folder; give a new one")
    check_integer("size", size, 16, 1024)
    for path, package in {font: "fonts-noto-color-emoji", names: "unicode-data"}.items():
        if not path.is_file():
            raise InputError(f"no file {str(path)!r}; install it (apt-get install {package})")
    if not features.check("raqm"):  # joins the characters of a sequence; Pillow's wheels have it, but not fribidi
        raise InputError("Pillow does not find raqm; install libfribidi0 (apt-get install libfribidi0)")

    # Collect names and keywords
    emoji = read_emoji_names(names)
    keywords = read_cldr_keywords(CLDR_FOLDER)
    with TemporaryDirectory() as temporary:
        others = [read_keyword_list(source, packages or Path(temporary)) for source in lists]
    for item in emoji:
        item.keywords = merge_keywords(
            keywords.get(get_code(item.characters), []), find_keywords(item.characters, others)
        )
    mark_held_out(emoji)

    # Draw and write
    face = ImageFont.truetype(str(font), BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
    with (
        Progress("drawing", len(emoji), "emoji") as progress,
        create_folder_atomically(folder) as unfinished,
        open(unfinished / "metadata.jsonl", "w", encoding="utf-8") as metadata,
    ):
        for item in progress.iterate(emoji):
            render_character(item.characters, face, size).save(unfinished / item.file_name, optimize=True)
            row = {"file_name": item.file_name, **asdict(item), "concept": item.concept, "kind": item.kind}
            del row["characters"]
            metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_manifest(folder, columns=Columns(labels=LABEL_COLUMNS), quiet=True)
    return emoji


def read_emoji_names(path: Path) -> list[Emoji]:
    """Return every fully-qualified emoji of an `emoji-test.txt`."""
    emoji, group, subgroup = [], "", ""
    for line in split_lines(path.read_text(encoding="utf-8")):
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif "; fully-qualified" in line:
            codes, _, comment = line.partition(";")
            characters = "".join(chr(int(code, 16)) for code in codes.split())
            name = comment.split("#", 1)[1].split(maxsplit=2)[2]  # "😀 E1.0 grinning face"
            emoji.append(Emoji(characters, name, group, subgroup))
    return emoji


def mark_held_out(emoji: list[Emoji], one_in: int = 16) -> None:
    """Mark about one composition in 16 as held out, by a hash of its caption, if all its parts occur in training.

    A composition is a person or body part with modifiers: skin tones, hair, genders.
    """
    compositions = [item for item in emoji if item.group == "People & Body" and len(item.composition_parts) > 1]
    for item in compositions:
        if int(hashlib.sha256(item.text.encode()).hexdigest(), 16) % one_in == 0:
            item.split = "held_out"
    trained_parts = {part for item in emoji if item.split == "train" for part in item.composition_parts}
    # Back to training where a part would be seen nowhere
    for item in compositions:
        if not trained_parts.issuperset(item.composition_parts):
            item.split = "train"


def render_character(characters: str, face: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """Draw an emoji, centred on a white square."""
    left, top, right, bottom = (int(edge) for edge in face.getbbox(characters))
    # No smaller than a bitmap's width, so that narrow emoji keep their size relative to others
    side = max(right - left, bottom - top, 136)
    canvas = Image.new("RGB", (side, side), "white")
    corner = ((side - right - left) // 2, (side - bottom - top) // 2)
    ImageDraw.Draw(canvas).text(corner, characters, font=face, embedded_color=True)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)
