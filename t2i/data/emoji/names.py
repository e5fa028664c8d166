"""Names, groups and order of the emoji of Unicode, from its `emoji-test.txt`, and which are held out."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i.texts import split_lines

EMOJI_TEST_FILE = Path("/usr/share/unicode/emoji/emoji-test.txt")
SKIN_TONE = " skin tone"  # ends the part of a name


@dataclass
class Emoji:
    """A fully-qualified emoji with its names, in a style: "" is that of the Noto Color Emoji font."""

    characters: str
    text: str  # the name, as in "man: dark skin tone, red hair"
    group: str
    subgroup: str
    keywords: list[str] = field(default_factory=list)
    split: str = "train"
    style: str = ""

    @property
    def file_name(self) -> str:
        name = "-".join(f"{ord(character):x}" for character in self.characters) + ".png"
        return f"{self.style.lower()}-{name}" if self.style else name

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

    def build_row(self) -> dict[str, Any]:
        """Return the row of `metadata.jsonl`. All words of an emoji in a style name the style; without: Noto."""
        captions: str | list[str] = self.text
        keywords, concept = self.keywords, self.concept
        if self.style:
            captions = [f"{self.text}, {self.style}", f"{self.style} {self.text}"]
            keywords = [f"{self.style} {keyword}" for keyword in keywords]
            concept = f"{concept}, {self.style}"
        return {
            "file_name": self.file_name,
            "text": captions,
            "group": self.group,
            "subgroup": self.subgroup,
            "keywords": keywords,
            "split": self.split,
            "concept": concept,
            "kind": self.kind,
        }


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


def is_chosen(text: str, one_in: int) -> bool:
    """Return True for about one text in so many, always the same ones, by a hash."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % one_in == 0


def mark_held_out(emoji: list[Emoji], one_in: int = 16) -> None:
    """Mark about one composition in 16 as held out, by a hash of its caption, if all its parts occur in training.

    A composition is a person or body part with modifiers: skin tones, hair, genders.
    """
    compositions = [item for item in emoji if item.group == "People & Body" and len(item.composition_parts) > 1]
    for item in compositions:
        if is_chosen(item.text, one_in):
            item.split = "held_out"
    trained_parts = {part for item in emoji if item.split == "train" for part in item.composition_parts}
    # Back to training where a part would be seen nowhere
    for item in compositions:
        if not trained_parts.issuperset(item.composition_parts):
            item.split = "train"
