"""The result of `t2i data check`: text for the terminal, JSON for programs, and a chart of the sizes."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, ImageDraw, ImageFont

from t2i.data.buckets import MUCH_LOST, format_lost_line
from t2i.data.reasons import Reason
from t2i.data.sources.samples import SourceNotes

SIDE_BINS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # lower edges of the bins
MAX_LISTED = 10  # shards and kinds of ignored files in the terminal
SHAPE_LIMITS = {"tall": 0.6, "3:4": 0.9, "square": 1.1, "4:3": 1.6, "wide": float("inf")}  # width / height below


@dataclass
class Duplicates:
    """Counts of images that occur more than once, byte by byte."""

    groups: int = 0  # different images
    copies: int = 0  # beyond the first
    in_both_splits: int = 0  # groups
    examples: list[list[str]] = field(default_factory=list)  # two keys of each group


@dataclass
class Report:
    """Counts over the rows of a manifest, and problems of their source."""

    EXAMPLES: ClassVar[int] = 3  # of each reason

    source: str
    manifest: str
    indexed: int = 0
    ok: int = 0
    held_out: int = 0
    split_by_source: int = 0  # samples that are in a split of the source
    captions: int = 0
    converted: int = 0  # images with a colour profile or unusual grey values
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    sides: Counter[int] = field(default_factory=Counter)  # images by short side, in bins
    shapes: Counter[str] = field(default_factory=Counter)
    lost: float = 0.0  # fractions that a crop to a square takes, summed over all images
    much_lost: int = 0  # images that lose more than `MUCH_LOST`
    duplicates: Duplicates = field(default_factory=Duplicates)
    notes: SourceNotes = field(default_factory=SourceNotes)

    @property
    def rejected_count(self) -> int:
        return sum(self.reasons.values())

    def count_row(self, row: dict[str, Any]) -> None:
        """Add a row of the manifest to the counts."""
        if row["status"] != "ok":
            self.reasons[row["status"]] += 1
            examples = self.examples.setdefault(row["status"], [])
            if len(examples) < self.EXAMPLES:
                examples.append({"key": row["key"], "detail": row["detail"]})
            return
        width, height = row["width"], row["height"]
        self.ok += 1
        self.held_out += row["split"] == "held_out"
        self.captions += len(row["captions"])
        self.converted += bool(row["detail"])
        self.sides[max(edge for edge in SIDE_BINS if edge <= min(width, height))] += 1
        lost = 1 - min(width, height) / max(width, height)
        self.lost += lost
        self.much_lost += lost > MUCH_LOST
        self.shapes[next(name for name, limit in SHAPE_LIMITS.items() if width / height < limit)] += 1

    def write_files(self, folder: Path) -> None:
        """Write report.json and sizes.png."""
        (folder / "report.json").write_text(json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")
        plot_sizes(self).save(folder / "sizes.png")

    def as_json(self) -> dict[str, Any]:
        """Return the content of report.json."""
        rejected = {
            name: {"count": count, "meaning": Reason[name].value, "examples": self.examples[name]}
            for name, count in self.reasons.most_common()
        }
        return {
            "source": self.source,
            "manifest": self.manifest,
            "indexed": self.indexed,
            "ok": self.ok,
            "train": self.ok - self.held_out,
            "held_out": self.held_out,
            "captions": self.captions,
            "converted": self.converted,
            "rejected": rejected,
            "duplicates": vars(self.duplicates),
            "ignored": dict(self.notes.ignored.most_common()),
            "shards": self.notes.shards,
            "short_sides": {str(edge): self.sides[edge] for edge in sorted(self.sides)},
            "shapes": dict(self.shapes),
            "square_crops": {"mean_lost": round(self.lost / max(1, self.ok), 4), "much_lost": self.much_lost},
        }

    def format_lines(self) -> list[str]:
        """Return the report for the terminal: counts, rejected samples with examples, and faults of the source."""
        lines = [
            f"{self.source}: {self.ok:,} images with {self.captions:,} captions",
            f"  {self.ok - self.held_out:,} to train on, {self.held_out:,} held out{self.describe_splits()}",
        ]
        mean = self.lost / max(1, self.ok)
        if crops := format_lost_line(mean, self.much_lost, self.ok, "crops to squares"):
            lines.append(f"  {crops}")
        if self.converted:
            lines.append(f"  {self.converted:,} are converted to sRGB of 8 bits")
        # Rejected samples, with examples
        lines.append(f"rejected: {self.rejected_count:,} of {self.indexed:,}")
        for name, count in self.reasons.most_common():
            lines.append(f"  {name}: {count:,} x {Reason[name].value}")
            for example in self.examples[name]:
                lines.append(f"    {sanitize_text(example['key'])}  {sanitize_text(example['detail'])}".rstrip())
        # Faults of the source as a whole
        if self.duplicates.groups:
            copies, groups, both = self.duplicates.copies, self.duplicates.groups, self.duplicates.in_both_splits
            examples = "; ".join(" = ".join(map(sanitize_text, keys)) for keys in self.duplicates.examples)
            lines.append(f"duplicates: {copies:,} copies of {groups:,} images: {examples}")
            if both:
                lines.append(f"  {both:,} of these images are both held out and trained on")
        if self.notes.ignored:
            lines.append(f"ignored files: {self.format_ignored()}")
        if shards := self.notes.shards:
            lines.append(f"shards with problems: {len(shards):,}")
            lines += [f"  {sanitize_text(shard)}" for shard in shards[:MAX_LISTED]]
            if len(shards) > MAX_LISTED:
                lines.append("  ...")
        return [*lines, f"manifest: {self.manifest}"]

    def describe_splits(self) -> str:
        """Return what made the splits, if it was the source: then a fraction to hold out has no effect."""
        whole = self.split_by_source == self.indexed
        return f", by the source's splits{'' if whole else ' where it has them'}" if self.split_by_source else ""

    def format_ignored(self) -> str:
        most = self.notes.ignored.most_common(MAX_LISTED)
        return ", ".join(f"{count:,} {sanitize_text(kind)}" for kind, count in most)

    def format_complaint(self) -> str | None:
        """Return one line if no sample was accepted, else None."""
        if self.ok:
            return None
        if not self.indexed:
            # Perhaps a shard was damaged, or the folder holds files of other kinds
            shard = f"; {sanitize_text(self.notes.shards[0])}" if self.notes.shards else ""
            ignored = f"; ignored files: {self.format_ignored()}" if self.notes.ignored else ""
            names = ", ".join(map(sanitize_text, list(self.notes.containers)[: self.EXAMPLES]))
            return f"no images in {self.source!r}" + (f", read from {names}" if names else "") + shard + ignored
        name, count = self.reasons.most_common(1)[0]
        first = self.examples[name][0]
        return (
            f"none of {self.indexed:,} samples of {self.source!r} can be used; {count:,} are {name}: "
            f"{Reason[name].value}, such as {sanitize_text(first['key'])} {sanitize_text(first['detail'])}".rstrip()
        )


def sanitize_text(text: str) -> str:
    """Return text of unknown origin without control characters and at most 160 characters long."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= 160 else text[:157] + "..."


def plot_sizes(report: Report) -> Image.Image:
    """Draw two bar charts: the short sides and the shapes of the images."""
    sheet = Image.new("RGB", (1080, 420), "white")
    used = [edge for edge in SIDE_BINS if report.sides[edge]]
    edges = [edge for edge in SIDE_BINS if used and used[0] <= edge <= used[-1]]  # empty bins between them too
    sides = {str(edge) if edge < SIDE_BINS[-1] else f"{edge}+": report.sides[edge] for edge in edges}
    shapes = {name: report.shapes[name] for name in SHAPE_LIMITS}
    plot_bars(sheet, (40, 20, 700, 400), f"Short side of {report.ok:,} images, in pixels from", sides)
    plot_bars(sheet, (760, 20, 1040, 400), "Shape, width : height", shapes)
    return sheet


def plot_bars(sheet: Image.Image, box: tuple[int, int, int, int], title: str, bars: dict[str, int]) -> None:
    """Draw a bar chart into a box (left, top, right, bottom) of an image. bars: heights by label."""
    left, top, right, bottom = box
    pen = ImageDraw.Draw(sheet)
    pen.text((left, top), title, fill="#222222", font=ImageFont.load_default(size=18))
    font = ImageFont.load_default(size=13)
    # Axis and bars, with the count above and the label below each
    floor, ceiling = bottom - 30, top + 60
    pen.line((left, floor, right, floor), fill="#999999", width=1)
    step = min(90, (right - left) / max(1, len(bars)))
    for number, (label, count) in enumerate(bars.items()):
        middle = left + (number + 0.5) * step
        height = round((floor - ceiling) * count / max(1, *bars.values()))
        if count:
            # At least two pixels, so that a single image among millions can be seen
            peak = floor - max(2, height)
            pen.rectangle((middle - step * 0.38, peak, middle + step * 0.38, floor - 1), fill="#3b76af")
            pen.text((middle, peak - 4), format_count(count), fill="#444444", font=font, anchor="ms")
        pen.text((middle, floor + 8), label, fill="#444444", font=font, anchor="ma")


def format_count(count: int) -> str:
    """Return a count in at most five characters: 950, 3,655, 12.3k, 4.5M."""
    if count >= 10**6:
        return f"{count / 10**6:.1f}M"
    return f"{count / 10**3:.1f}k" if count >= 10**4 else f"{count:,}"
