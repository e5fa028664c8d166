"""The words of the captions that a CLIP was trained on, to find the words of a prompt that it never saw."""

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from t2i.errors import InputError
from t2i.files.untrusted import read_json
from t2i.texts import normalize_text

WORDS_FILE = "words.json"  # beside the tokenizer
MAX_WORDS_BYTES = 2**20  # with more words than fit in it, nearly all that people type are known
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
MAX_NEAREST = 16  # unknown words for which a near one is sought at once: each is compared to all known ones
LIKENESS = 0.75  # of a misspelled word to the known one, as difflib computes it
# Words that name nothing to draw: they are not reported
FUNCTION_TEXT = """
a an and are as at be been but by can did do does for from had has have he her here him his how i if in into is it its
just like me my no not of on one or our out over she so some than that the their them then there these they this to
too under up us very was we were what when where which who will with would you your
"""
FUNCTION_WORDS = frozenset(FUNCTION_TEXT.split())
PLURAL_ENDINGS = (
    *(("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""), ("'s", ""), ("’s", "")),
    *(("men", "man"), ("children", "child"), ("people", "person"), ("mice", "mouse")),
    *(("feet", "foot"), ("teeth", "tooth"), ("geese", "goose")),
)


def split_words(text: str) -> list[str]:
    """Return the words of a text, in lower case, without numbers and punctuation."""
    return WORD.findall(unicodedata.normalize("NFKC", normalize_text(text)).lower())


def list_word_forms(word: str) -> list[str]:
    """Return a word with its singulars and plurals, as English forms them."""
    singulars = [word.removesuffix(end) + start for end, start in PLURAL_ENDINGS if word.endswith(end)]
    plurals = [word.removesuffix(start) + end for end, start in PLURAL_ENDINGS if word.endswith(start)]
    return [word, *singulars, *plurals]


@dataclass(frozen=True)
class UnknownWord:
    """A word of a prompt that is in no caption.

    nearest: a known word that is spelled much like it, if there is one; of a keyword, the caption. is_keyword: whether
    it is in keywords, so that it is known, but less well.
    """

    word: str
    nearest: str | None
    is_keyword: bool

    def __str__(self) -> str:
        if self.is_keyword:
            return f'"{self.word}" is in no caption, but a keyword of: {self.nearest}'
        return f'"{self.word}" is in no caption' + (f"; nearest known: {self.nearest}" if self.nearest else "")


@dataclass(frozen=True)
class KnownWords:
    """The words of captions, and those that occur in keywords alone, each with a caption whose keyword it is.

    It is the caption that has the word earliest among its keywords, or else the shortest.
    """

    captions: frozenset[str]
    keywords: dict[str, str]

    @classmethod
    def collect(cls, rows: Iterable[dict[str, Any]]) -> "KnownWords":
        """Return the words of `captions` and `keywords`, lists of texts in each row."""
        captions: set[str] = set()
        keywords: dict[str, tuple[int, int, str]] = {}
        for row in rows:
            captions.update(word for text in row["captions"] for word in split_words(text))
            shortest = min(map(normalize_text, row["captions"]), key=len)
            for rank, text in enumerate(row["keywords"]):
                for word in split_words(text):
                    known = (rank, len(shortest), shortest)
                    keywords[word] = min(keywords.get(word, known), known)
        return cls(frozenset(captions), {word: keywords[word][-1] for word in sorted(keywords.keys() - captions)})

    def find_unknown_words(self, *texts: str) -> list[UnknownWord]:
        """Return the words of texts that are in no caption, also not in singular or plural, without repetitions.

        Of many, the first `MAX_NEAREST` alone have a nearest one.
        """
        found, sought = [], 0
        for word in dict.fromkeys(word for text in texts for word in split_words(text)):
            forms = list_word_forms(word)
            if word in FUNCTION_WORDS or not self.captions.isdisjoint(forms):
                continue
            captions = [self.keywords[form] for form in forms if form in self.keywords]
            nearest = captions
            # A keyword is spelled well; only other words may be misspelled
            if not captions and sought < MAX_NEAREST:
                nearest, sought = get_close_matches(word, [*self.captions, *self.keywords], 1, LIKENESS), sought + 1
            found.append(UnknownWord(word, nearest[0] if nearest else None, bool(captions)))
        return found

    def merge(self, other: "KnownWords") -> "KnownWords":
        """Return the words of both."""
        captions = self.captions | other.captions
        keywords = {word: text for word, text in (other.keywords | self.keywords).items() if word not in captions}
        return KnownWords(captions, keywords)

    def save(self, folder: Path) -> None:
        """Write `words.json`, unless it would be larger than the limit."""
        # Each caption once, because it is longer than its words
        by_caption: dict[str, list[str]] = {}
        for word, caption in sorted(self.keywords.items()):
            by_caption.setdefault(caption, []).append(word)
        content = {
            "captions": " ".join(sorted(self.captions)),
            "keywords": {caption: " ".join(words) for caption, words in sorted(by_caption.items())},
        }
        data = json.dumps(content, ensure_ascii=False, indent=0).encode()
        if len(data) <= MAX_WORDS_BYTES:
            (folder / WORDS_FILE).write_bytes(data)

    @classmethod
    def load(cls, folder: Path) -> "KnownWords | None":
        """Return the words that `save` wrote; None if there are none. Raises InputError for a damaged file."""
        file = folder / WORDS_FILE
        if not file.exists():
            return None
        content = read_json(file, MAX_WORDS_BYTES)
        captions, keywords = content.get("captions"), content.get("keywords")
        texts = [captions, *(keywords.values() if isinstance(keywords, dict) else [None])]
        if not isinstance(keywords, dict) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{str(file)!r} has no words of captions and keywords; `t2i train clip` writes them")
        words = {word: caption for caption, text in keywords.items() for word in text.split()}
        return cls(frozenset(str(captions).split()), words)
