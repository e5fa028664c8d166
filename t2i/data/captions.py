"""The caption of a sample for one use in training: its caption, with keywords, a keyword alone, or a whole sentence."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from t2i.config import resolve_shipped_file
from t2i.errors import InputError
from t2i.texts import normalize_text, read_lines

SLOT = "{}"
MAX_SENTENCES = 10_000


@dataclass(frozen=True)
class DrawnCaption:
    """A caption for one use in training, and the phrases of the sample that it is made of."""

    text: str
    phrases: list[str]


@dataclass(frozen=True)
class CaptionMix:
    """A way to draw captions from the captions and keywords of a sample.

    keyword_alone: fraction of single keywords. in_sentence: fraction of single phrases in one of `sentences`, each of
    which has one `{}` for the phrase.
    """

    keyword_alone: float = 0.0
    in_sentence: float = 0.0
    sentences: tuple[str, ...] = ()

    @classmethod
    def read(cls, keyword_alone: float, in_sentence: float, file: str | None) -> "CaptionMix":
        """Return the mix with the sentences of a text file, one a line. Raises InputError for a wrong line."""
        return cls(keyword_alone, in_sentence, read_sentences(resolve_shipped_file(Path(file))) if file else ())

    @property
    def sentences_digest(self) -> str | None:
        """Digest of the sentences and how often they are drawn; None without sentences."""
        if not self.sentences:
            return None
        return hashlib.sha256("\n".join([f"{self.in_sentence:g}", *self.sentences]).encode()).hexdigest()[:16]

    def draw(self, captions: list[str], keywords: list[str], rng: random.Random) -> DrawnCaption:
        """Draw a caption of a sample: a caption, one with keywords, keywords alone, or a phrase in a sentence.

        A caption without a sentence gets an article in a fifth of the cases, if there are keywords.
        """
        # The order of these draws is part of the format: caches and runs that resume depend on it
        text = captions[0] if len(captions) == 1 else rng.choice(captions)
        if self.in_sentence and rng.random() < self.in_sentence:
            # People type keywords as often as names
            phrase = rng.choice([text, rng.choice(keywords)]) if keywords else text
            return DrawnCaption(fill_sentence(rng.choice(self.sentences), phrase), [phrase])
        if not keywords:
            return DrawnCaption(text, [text])
        phrases = self.draw_phrases(text, keywords, rng)
        caption = " ".join(phrases)
        return DrawnCaption(f"{choose_article(caption)} {caption}" if rng.random() < 0.2 else caption, phrases)

    def draw_phrases(self, text: str, keywords: list[str], rng: random.Random) -> list[str]:
        """Draw the phrases of a caption: one keyword, the text, the text with keywords, or up to four keywords."""
        if self.keyword_alone and rng.random() < self.keyword_alone:
            return [rng.choice(keywords)]
        keywords = rng.sample(keywords, rng.randint(1, min(4, len(keywords))))
        kind = rng.random()
        if kind < 0.5:
            return [text]
        return [text, *keywords] if kind < 0.8 else keywords


def choose_article(text: str) -> str:
    """Return "a" or "an", by the first letter."""
    return "an" if text[0].lower() in "aeiou" else "a"


def fill_sentence(sentence: str, phrase: str) -> str:
    """Return a sentence with a phrase in its place, after an article that suits the phrase."""
    # Only an article of its own: "a" also ends other words
    article = f"a {SLOT}"
    start = sentence.find(article)
    if start == 0 or (start > 0 and sentence[start - 1] == " "):
        sentence = sentence.replace(article, f"{choose_article(phrase)} {SLOT}", 1)
    return sentence.replace(SLOT, phrase)


def read_sentences(file: Path) -> tuple[str, ...]:
    """Return the sentences of a text file, one a line. Raises InputError for a line without exactly one `{}`."""
    lines = read_lines(file, "sentences")
    for number, line in enumerate(lines, 1):
        if line.count(SLOT) != 1:
            raise InputError(f"{str(file)!r}, line {number}: {line!r:.80} has {line.count(SLOT)} of {SLOT}, not 1")
    sentences = tuple(normalize_text(line) for line in lines)
    if not 0 < len(sentences) <= MAX_SENTENCES:
        raise InputError(f"{str(file)!r} has {len(sentences):,} sentences; 1 to {MAX_SENTENCES:,} are allowed")
    return sentences
