"""Text diffs of the style of real emoji: "pizza, flat" becomes "pizza, 3D"."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Generator, Tensor

from t2i.data import SampleText
from t2i.evaluation.contact_sheet import build_labelled_rows, to_pil_images
from t2i.evaluation.emoji.artist import Artist, save_sheet
from t2i.evaluation.emoji.real_emoji import RealEmoji, draw_sample

STYLE_DIFFS = 50  # real emoji, each changed into one other style
SHEET_DIFFS = 25


@dataclass(frozen=True)
class StyleDiff:
    """A real emoji and the real one of the same name in another style."""

    source: SampleText
    target: SampleText


def choose_style_diffs(real: RealEmoji, samples: int | None = None) -> list[StyleDiff]:
    """Return pairs of training emoji with one name in two styles, by default 50, the same at every call."""
    by_name: dict[str, dict[str, SampleText]] = {}
    for record in real.records:
        if record.split == "train":
            by_name.setdefault(real.strip_style(record), {})[real.find_style(record)] = record
    chosen = draw_sample([name for name, styles in by_name.items() if len(styles) > 1], samples or STYLE_DIFFS)
    return [StyleDiff(*random.Random(name).sample([*by_name[name].values()], 2)) for name in chosen]


def score_style_diffs(artist: Artist, real: RealEmoji, diffs: list[StyleDiff], out: Path) -> dict[str, Any]:
    """Draw the diffs, write a sheet of the first ones, and return the fractions that are right.

    artist: of a `TextDiffPipeline`. style: the nearest real emoji has the target's style; kept: it
    has the source's name; right: both.
    """
    # Draw. The paper's direction is left to models without a prior.
    direction = "text" if artist.pipeline.prior is None else "prior"
    sources = real.load_images([diff.source for diff in diffs])

    def draw_batch(part: slice) -> Tensor:
        before, after = ([getattr(diff, end).text for diff in diffs[part]] for end in ("source", "target"))
        seeds = [Generator().manual_seed(i) for i in range(part.start, part.stop)]
        options = {"generator": seeds, "direction": direction, "output_type": "pt"}
        images = artist.pipeline(to_pil_images(sources[part]), before, after, **options).images
        return images.float().cpu() * 2 - 1

    images = artist.run_batches(draw_batch, len(diffs), "changing styles")

    # Judge
    nearest = real.find_nearest(images)
    changed = [real.find_style(one) == real.find_style(diff.target) for one, diff in zip(nearest, diffs)]
    kept = [real.find_name(one) == real.find_name(diff.source) for one, diff in zip(nearest, diffs)]
    hits = {"style": changed, "kept": kept, "right": [a and b for a, b in zip(changed, kept)]}
    shown = diffs[:SHEET_DIFFS]
    rows = {"real": to_pil_images(sources[: len(shown)]), "changed": to_pil_images(images[: len(shown)])}
    rows["real, target style"] = to_pil_images(real.load_images([diff.target for diff in shown]))
    save_sheet(build_labelled_rows(rows, [diff.target.text for diff in shown]), out / "style-diffs.png")
    return {"asked": len(diffs), "direction": direction} | {
        name: round(sum(hit) / len(diffs), 4) for name, hit in hits.items()
    }
