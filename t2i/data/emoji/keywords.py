"""Keywords of emoji: CLDR's, and public lists in packages of npm whose licences allow any use."""

import ast
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i.data.emoji.packages import Package, fetch_package, read_package_file
from t2i.errors import InputError
from t2i.texts import normalize_text

CLDR_FOLDER = Path("/usr/share/unicode/cldr/common")
EMOJI_PRESENTATION = "\ufe0f"  # not a part of CLDR's keys
SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
MAX_KEYWORD_LENGTH = 60  # characters; longer ones are sentences or faults
# Words, and no emoticons such as :D or shortcodes such as +1
KEYWORD = re.compile(r"[^\W_][\w '’&.!-]*")

Entries = Iterable[tuple[str, Iterable[str]]]  # emoji and its keywords


@dataclass(frozen=True)
class KeywordList:
    """A file of a package, and the function that reads its content."""

    package: Package
    file: str  # in the archive
    read: Callable[[str], Entries]


def read_emojilib(text: str) -> Entries:
    return json.loads(text).items()


def read_gemoji(text: str) -> Entries:
    # A list in JavaScript; with its keys as texts it is one in Python, too
    records = re.search(r"^export const gemoji = (\[.*^\])", text, re.DOTALL | re.MULTILINE)
    if records is None:
        raise ValueError("no list named gemoji")
    for record in ast.literal_eval(re.sub(r"^(\s+)(\w+):", r'\1"\2":', records[1], flags=re.MULTILINE)):
        yield record["emoji"], [*record["names"], *record["tags"]]


def read_emoji_mart(text: str) -> Entries:
    for record in json.loads(text)["emojis"].values():
        yield record["skins"][0]["native"], [record["name"], *record["keywords"]]


def read_emojibase(text: str) -> Entries:
    for record in json.loads(text):
        yield record["emoji"], [record["label"], *record.get("tags", [])]


# Emojibase has all tags of OpenMoji's data that come from CLDR (versions 17). OpenMoji is not read: its data, too, is
# under CC BY-SA, which asks the same licence of what is made from it.
KEYWORD_LISTS = {
    "emojilib": KeywordList(Package("emojilib", "4.0.3", "MIT"), "package/dist/emoji-en-US.json", read_emojilib),
    "gemoji": KeywordList(Package("gemoji", "8.1.0", "MIT"), "package/index.js", read_gemoji),
    "emoji-mart": KeywordList(
        Package("@emoji-mart/data", "1.2.1", "MIT"), "package/sets/15/native.json", read_emoji_mart
    ),
    "emojibase": KeywordList(Package("emojibase-data", "17.0.0", "MIT"), "package/en/data.json", read_emojibase),
}


def choose_keyword_lists(names: str) -> list[KeywordList]:
    """Return the lists in a text with commas; "all" stands for every list. Raises InputError for an unknown one."""
    chosen = list(KEYWORD_LISTS) if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in KEYWORD_LISTS:
            raise InputError(f"keywords must be all, or some of {', '.join(KEYWORD_LISTS)}, got {name!r}")
    return [KEYWORD_LISTS[name] for name in dict.fromkeys(chosen)]


def read_keyword_list(source: KeywordList, folder: Path) -> dict[str, list[str]]:
    """Return the keywords of a list by emoji, as `get_code` gives it; npm puts a missing package into `folder`."""
    file = fetch_package(source.package, folder)
    keywords: dict[str, list[str]] = {}
    try:
        for characters, phrases in source.read(read_package_file(file, source.file).decode()):
            keywords.setdefault(get_code(characters), []).extend(clean_keywords(phrases))
    except (ValueError, SyntaxError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise InputError(f"{source.file!r} in {str(file)!r} is no list of keywords as expected ({error!r})") from error
    return keywords


def clean_keywords(phrases: Iterable[Any]) -> Iterator[str]:
    """Yield keywords in lower case and with spaces between words; leave out what is no word."""
    for phrase in phrases:
        if not isinstance(phrase, str):
            raise TypeError(f"{phrase!r:.80} is not a text")
        phrase = normalize_text(phrase.replace("_", " ")).lower()
        if len(phrase) <= MAX_KEYWORD_LENGTH and KEYWORD.fullmatch(phrase):
            yield phrase


def get_code(characters: str) -> str:
    """Return an emoji without what some lists leave out."""
    return characters.replace(EMOJI_PRESENTATION, "")


def find_keywords(characters: str, lists: list[dict[str, list[str]]]) -> list[str]:
    """Return the keywords of an emoji in all lists, in their order. With a skin tone it also has those without."""
    codes = dict.fromkeys([get_code(characters), SKIN_TONES.sub("", get_code(characters))])
    return [keyword for words in lists for code in codes for keyword in words.get(code, [])]


def merge_keywords(keywords: list[str], others: list[str]) -> list[str]:
    """Return `keywords`, then those of `others` that differ from all before in more than upper case."""
    known = {keyword.lower() for keyword in keywords}
    return keywords + [keyword for keyword in dict.fromkeys(others) if keyword.lower() not in known]


def read_cldr_keywords(folder: Path) -> dict[str, list[str]]:
    """Return CLDR's English keywords by emoji."""
    keywords = {}
    for path in (folder / "annotations/en.xml", folder / "annotationsDerived/en.xml"):
        if not path.is_file():
            raise InputError(f"no file {str(path)!r}; install it (apt-get install unicode-cldr-core)")
        for element in ElementTree.parse(path).iter("annotation"):
            if element.get("type") != "tts" and element.text:
                keywords[element.attrib["cp"]] = [word.strip() for word in element.text.split("|")]
    return keywords
