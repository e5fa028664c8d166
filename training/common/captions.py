"""Captions that are longer than a model's context, which cuts them: how many, and by how much."""

import math
from collections.abc import Sequence
from statistics import median

from t2i.data.dataset import CaptionedPictures
from t2i.networks.tokenizer import BaseTokenizer, PublicTokenizer, TextTokenizer
from t2i.terminal import print_note

AnyTokenizer = BaseTokenizer | PublicTokenizer | TextTokenizer
MAX_MEASURED_CAPTIONS = 2_000


def find_cut_captions(dataset: CaptionedPictures, tokenizer: AnyTokenizer) -> str | None:
    """Return a line about the captions of a data set that a tokenizer's model cuts, None if there are none."""
    return format_cut_captions(measure_caption_lengths(dataset, tokenizer), tokenizer.context_length)


def print_cut_captions(line: str | None) -> None:
    """Print a line of `find_cut_captions` as a warning."""
    if line is not None:
        print_note(f"warning: {line}")


def measure_caption_lengths(dataset: CaptionedPictures, tokenizer: AnyTokenizer) -> list[int]:
    """Return the tokens, start and end included, of at most 2,000 captions that are evenly spread over the data."""
    measured = range(0, len(dataset), math.ceil(len(dataset) / MAX_MEASURED_CAPTIONS))
    return tokenizer.count_tokens([dataset.get_caption(i, draw=i) for i in measured])


def format_cut_captions(lengths: Sequence[int], context_length: int) -> str | None:
    """Return a line about the captions that a context of so many tokens cuts, None if there are none."""
    lost = [length - context_length for length in lengths if length > context_length]
    if not lost:
        return None
    return (
        f"{len(lost):,} of {len(lengths):,} measured captions are longer than the context of {context_length} tokens "
        f"and are cut, by {median(lost):g} tokens in the median and {max(lost)} at most"
    )
