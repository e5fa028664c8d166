"""The real emoji that drawings are compared with, and the captions and words to draw."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from t2i.config import DataConfig
from t2i.data import CaptionedPictures, SampleText
from t2i.data.dataset import stack_views
from t2i.data.emoji.keywords import SKIN_TONES, get_code
from t2i.data.emoji.names import Emoji
from t2i.data.labels import read_labels
from t2i.data.manifest import find_manifest
from t2i.errors import InputError
from t2i.evaluation.emoji.measures import compute_pixel_features

EMOJI_SIZE = 128
TRAINING_CAPTIONS, KIND_CAPTIONS, KEYWORDS = 200, 50, 200  # drawn by default, of all kinds, of each kind, and alone
KINDS = ("things", "symbols", "flags", "people", "skin tones")
FIRST_STYLE = "noto"  # of emoji whose captions name no style
ALL = "all"  # where kinds are not known
PLAIN_KINDS = (*KINDS, ALL)  # those of the first style
HELD_OUT, HELD_OUT_STYLES = "held out", "held-out styles"  # count as kinds of their own
WORDS_FILE = Path(__file__).with_name("words.json")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """A prompt, and the indexes of the real emoji that answer it."""

    prompt: str
    answers: frozenset[int]


class RealEmoji:
    """All real emoji of a data set, of both splits. Raises InputError without a manifest, or without both splits."""

    def __init__(self, folder: str | Path):
        self.dataset = CaptionedPictures(DataConfig(str(folder), EMOJI_SIZE, 0), split=None)
        self.records = [self.dataset.get_record(index) for index in range(len(self.dataset))]
        manifest = find_manifest(Path(folder))
        self.groups, self.styles = (read_column(manifest, column) for column in ("group", "style"))
        self.kinds = [self.find_kind(record) for record in self.records]
        # Both splits need emoji of the first style, which the main scores are of
        plain = [record.split for record, kind in zip(self.records, self.kinds) if kind in PLAIN_KINDS]
        counts = [plain.count(split) for split in ("train", "held_out")]
        if not all(counts):
            raise InputError(f"{counts[0]} training and {counts[1]} held-out images; both kinds are needed")

    def find_kind(self, record: SampleText) -> str:
        """Return the kind of an emoji, from its group and name, or its style; "all" where the data has no groups."""
        if self.groups is None:
            return ALL
        style = self.find_style(record)
        if style != FIRST_STYLE:
            return style if record.split == "train" else HELD_OUT_STYLES
        return Emoji("", record.text, self.groups.get(record.key, ""), "").kind

    def find_style(self, record: SampleText) -> str:
        return FIRST_STYLE if self.styles is None else self.styles.get(record.key, FIRST_STYLE)

    def strip_style(self, record: SampleText) -> str:
        """Return the name without the style: "pizza" of "pizza, flat"."""
        return record.text.removesuffix(f", {self.find_style(record)}")

    def find_name(self, record: SampleText) -> str:
        """Return the name up to the modifier, without the style."""
        return strip_name_modifier(self.strip_style(record))

    def choose_captions(self, samples: int | None = None) -> dict[str, list[SampleText]]:
        """Return the captions to draw: "train", which are random ones, "held_out", and those of each kind and style.

        samples: number of each; by default 200, all, and at least 50. They are the same at every call, and those of
        a kind include the random ones of it. "train", "held_out" and the kinds are of the first style alone.
        """
        kinds = {record.index: self.kinds[record.index] for record in self.records}
        plain = [record for record in self.records if kinds[record.index] in PLAIN_KINDS]
        training = [record for record in plain if record.split == "train"]
        held_out = [record for record in plain if record.split == "held_out"]
        train = draw_sample(training, samples or TRAINING_CAPTIONS)
        held_out = held_out if samples is None else draw_sample(held_out, samples)
        chosen = {"train": train, "held_out": held_out}
        for kind in dict.fromkeys(name for name in PLAIN_KINDS if name in self.kinds):
            # The random ones of this kind come first, then as many as are lacking
            drawn = [record for record in train if kinds[record.index] == kind]
            others = [one for one in draw_sample(training, len(training)) if kinds[one.index] == kind]
            more = [record for record in others if record not in drawn]
            chosen[kind] = drawn + more[: max(0, (samples or KIND_CAPTIONS) - len(drawn))]
        chosen[HELD_OUT] = held_out
        for style in sorted(set(self.kinds).difference(PLAIN_KINDS)):  # what is held out of the styles is one of them
            count = samples or (TRAINING_CAPTIONS if style == HELD_OUT_STYLES else KIND_CAPTIONS)
            chosen[style] = draw_sample([record for record in self.records if kinds[record.index] == style], count)
        return chosen

    def choose_keywords(self, samples: int | None = None) -> list[Question]:
        """Return keywords that are no captions, the same at every call. All emoji with a keyword are right."""
        answers: dict[str, set[int]] = {}
        for record in self.records:
            for keyword in record.keywords if self.kinds[record.index] in PLAIN_KINDS else []:
                answers.setdefault(keyword.lower(), set()).add(record.index)
        # A keyword that is a caption too would be asked twice
        names = {record.text.lower() for record in self.records}
        keywords = sorted(answers.keys() - names)
        chosen = draw_sample(keywords, samples or KEYWORDS)
        return [Question(keyword, frozenset(answers[keyword])) for keyword in chosen]

    def read_words(self, samples: int | None = None) -> dict[str, list[Question]]:
        """Return the words that people type, alone and in a sentence each, of which the data has an emoji.

        Skin tones are right whatever they are.
        """
        # By the code without skin tone, which several emoji share
        indexes: dict[str, set[int]] = {}
        for record in self.records:
            indexes.setdefault(get_key_code(record.key), set()).add(record.index)
        questions: dict[str, list[Question]] = {"words": [], "sentences": []}
        for word, entry in json.loads(WORDS_FILE.read_text(encoding="utf-8")).items():
            answers = frozenset().union(*(indexes.get(get_code(one), set()) for one in entry["emoji"].split()))
            if answers:
                questions["words"].append(Question(word, answers))
                questions["sentences"].append(Question(entry["sentence"], answers))
        return {name: part[:samples] for name, part in questions.items()}

    def load_images(self, records: list[SampleText]) -> Tensor:
        """Return the real images, (N, 3, 128, 128) in [-1, 1]."""
        return torch.stack([self.dataset.load_image(record.index) for record in records])

    def load_seen_images(self, records: list[SampleText], clip: Any) -> Tensor:
        """Return the real images as a CLIP sees them, (N, 3, s, s) in [-1, 1]."""
        self.dataset.add_clip_view(clip)
        images, seen = stack_views([self.dataset.load_view(record.index) for record in records])
        return images if seen is None else seen

    @cached_property
    def features(self) -> Tensor:
        # In parts, so that never all images are in memory
        starts = range(0, len(self.records), 256)
        return torch.cat([compute_pixel_features(self.load_images(self.records[i : i + 256])) for i in starts])

    def find_nearest(self, images: Tensor) -> list[SampleText]:
        """Return the real emoji nearest to each image, (N, 3, H, W) in [-1, 1], by colours and edges."""
        distances = torch.cdist(compute_pixel_features(images), self.features)
        return [self.records[index] for index in distances.argmin(dim=1).tolist()]


def read_column(manifest: Path, column: str) -> dict[str, str] | None:
    """Return a column of labels by key; None if the data has none."""
    try:
        return read_labels(manifest, column)
    except InputError:
        return None


def draw_sample(items: Sequence[Item], count: int) -> list[Item]:
    """Return so many different items, or all, in random order, the same at every call."""
    return random.Random(0).sample(items, min(count, len(items)))


def get_key_code(key: str) -> str:
    """Return the emoji of an image's key, such as 1f44b-1f3fb.png, as far as words tell emoji apart."""
    parts = key.removesuffix(".png").split("-")
    try:
        characters = "".join(chr(int(part, 16)) for part in parts)
    except (ValueError, OverflowError):  # the key of another data set
        return ""
    return SKIN_TONES.sub("", get_code(characters))


def strip_name_modifier(text: str) -> str:
    """Return the name up to the modifier; after "flag:" and "keycap:" follows the content, not a modifier."""
    return text if text.startswith(("flag: ", "keycap: ")) else text.split(": ")[0]
