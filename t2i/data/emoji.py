"""The emoji of Unicode as a data set: pictures from the Noto Color Emoji font, captions from Unicode's names.

Names, groups and order come from Unicode's `emoji-test.txt`, keywords from CLDR's annotations.
"""

import hashlib
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from t2i.checks import check_integer
from t2i.data.manifest import write_manifest
from t2i.data.sources.samples import Columns
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.texts import split_lines

FONT_FILE = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST_FILE = Path("/usr/share/unicode/emoji/emoji-test.txt")
CLDR_FOLDER = Path("/usr/share/unicode/cldr/common")
BITMAP_SIZE = 109  # the only size of the font's bitmaps, which are 136 x 128 pixels
EMOJI_PRESENTATION = "\ufe0f"  # not a part of CLDR's keys


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


def render_emoji(
    folder: str | Path, size: int = 128, font: Path = FONT_FILE, names: Path = EMOJI_TEST_FILE
) -> list[Emoji]:
    """Draw every fully-qualified emoji into `folder`, which must be new or empty, at `size` x `size` pixels on white.

    Writes a PNG for each and `metadata.jsonl` in the imagefolder convention; the folder appears complete or not at all.
    Then the manifest is written into it. Raises InputError if the font or a data file is missing, or Pillow lacks raqm.
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
    keywords = read_keywords(CLDR_FOLDER)
    for item in emoji:
        item.keywords = keywords.get(item.characters.replace(EMOJI_PRESENTATION, ""), [])
    mark_held_out(emoji)

    # Draw and write
    face = ImageFont.truetype(str(font), BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
    with (
        create_folder_atomically(folder) as unfinished,
        open(unfinished / "metadata.jsonl", "w", encoding="utf-8") as metadata,
    ):
        for item in emoji:
            render_character(item.characters, face, size).save(unfinished / item.file_name, optimize=True)
            row = {"file_name": item.file_name, **asdict(item)}
            del row["characters"]
            metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_manifest(folder, columns=Columns(label="group"), quiet=True)
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


def read_keywords(folder: Path) -> dict[str, list[str]]:
    """Return CLDR's English keywords by emoji."""
    keywords = {}
    for path in (folder / "annotations/en.xml", folder / "annotationsDerived/en.xml"):
        if not path.is_file():
            raise InputError(f"no file {str(path)!r}; install it (apt-get install unicode-cldr-core)")
        for element in ElementTree.parse(path).iter("annotation"):
            if element.get("type") != "tts" and element.text:
                keywords[element.attrib["cp"]] = [word.strip() for word in element.text.split("|")]
    return keywords


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
