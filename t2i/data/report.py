"""What a check found, for people (text), programs (JSON) and at a glance (a picture of the sizes)."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, ImageDraw, ImageFont

from t2i.data.reasons import Reason
from t2i.data.sources.samples import SourceNotes

SIDE_BINS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # lower edges of the bins
SHAPE_LIMITS = {"tall": 0.6, "3:4": 0.9, "square": 1.1, "4:3": 1.6, "wide": float("inf")}  # width / height below


@dataclass
class Duplicates:
    groups: int = 0  # pictures that are there more than once
    copies: int = 0  # beyond the first
    in_both_splits: int = 0  # groups
    examples: list[list[str]] = field(default_factory=list)  # two keys each


@dataclass
class Report:
    EXAMPLES: ClassVar[int] = 3

    source: str
    manifest: str
    indexed: int = 0
    ok: int = 0
    held_out: int = 0
    captions: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    sides: Counter[int] = field(default_factory=Counter)  # pictures by short side, in bins
    shapes: Counter[str] = field(default_factory=Counter)
    duplicates: Duplicates = field(default_factory=Duplicates)
    notes: SourceNotes = field(default_factory=SourceNotes)

    @property
    def rejected_count(self) -> int:
        return sum(self.reasons.values())

    def count_row(
        self, status: str, key: str, detail: str, captions: int, split: str, width: int | None, height: int | None
    ) -> None:
        """Count a row of the manifest."""
        if status != "ok":
            self.reasons[status] += 1
            examples = self.examples.setdefault(status, [])
            if len(examples) < self.EXAMPLES:
                examples.append({"key": key, "detail": detail})
            return
        assert width and height
        self.ok += 1
        self.held_out += split == "held_out"
        self.captions += captions
        self.sides[max(edge for edge in (1, *SIDE_BINS) if edge <= min(width, height))] += 1
        self.shapes[next(name for name, limit in SHAPE_LIMITS.items() if width / height < limit)] += 1

    def write_files(self, folder: Path) -> None:
        (folder / "report.json").write_text(json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")
        plot_sizes(self).save(folder / "sizes.png")

    def as_json(self) -> dict[str, Any]:
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
            "rejected": rejected,
            "duplicates": vars(self.duplicates),
            "ignored": dict(self.notes.ignored.most_common()),
            "shards": self.notes.shards,
            "short_sides": {str(edge): self.sides[edge] for edge in sorted(self.sides)},
            "shapes": dict(self.shapes),
        }

    def format_lines(self) -> list[str]:
        """For the terminal."""
        lines = [
            f"{self.source}: {self.ok:,} pictures with {self.captions:,} captions",
            f"  {self.ok - self.held_out:,} to train on, {self.held_out:,} held out",
            f"rejected: {self.rejected_count:,} of {self.indexed:,}",
        ]
        for name, count in self.reasons.most_common():
            lines.append(f"  {name}: {count:,} x {Reason[name].value}")
            for example in self.examples[name]:
                lines.append(f"    {sanitize_text(example['key'])}" + f"  {sanitize_text(example['detail'])}".rstrip())
        if (same := self.duplicates).groups:
            some = "; ".join(" = ".join(map(sanitize_text, keys)) for keys in same.examples)
            lines.append(f"duplicates: {same.copies:,} copies of {same.groups:,} pictures: {some}")
            if same.in_both_splits:
                lines.append(f"  {same.in_both_splits:,} of these pictures are held out and also trained on")
        if self.notes.ignored:
            lines.append(f"ignored files: {self.format_ignored()}")
        if shards := self.notes.shards:
            lines.append(f"shards with problems: {len(shards):,}")
            lines += [f"  {sanitize_text(shard)}" for shard in shards[:10]] + ["  ..."] * (len(shards) > 10)
        return [*lines, f"manifest: {self.manifest}"]

    def format_ignored(self) -> str:
        return ", ".join(f"{count:,} {sanitize_text(kind)}" for kind, count in self.notes.ignored.most_common(10))

    def format_complaint(self) -> str | None:
        """One line if nothing can be used."""
        if self.ok:
            return None
        if not self.indexed:
            shard = f"; {sanitize_text(self.notes.shards[0])}" if self.notes.shards else ""
            there = f"; ignored files: {self.format_ignored()}" if self.notes.ignored else ""
            read = ", ".join(map(sanitize_text, list(self.notes.containers)[: self.EXAMPLES]))
            return f"no pictures in {self.source!r}" + (f", read from {read}" if read else "") + shard + there
        name, count = self.reasons.most_common(1)[0]
        first = self.examples[name][0]
        return (
            f"none of {self.indexed:,} samples of {self.source!r} can be used; {count:,} are {name}: "
            f"{Reason[name].value}, such as {sanitize_text(first['key'])} {sanitize_text(first['detail'])}".rstrip()
        )


def sanitize_text(text: str) -> str:
    """Text of strangers for a terminal: without control characters, and short."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= 160 else text[:157] + "..."


def plot_sizes(report: Report) -> Image.Image:
    """Two bar charts: the short sides and the shapes of the pictures."""
    sheet = Image.new("RGB", (1080, 420), "white")
    there = [edge for edge in (1, *SIDE_BINS) if report.sides[edge]]
    edges = [edge for edge in (1, *SIDE_BINS) if there and there[0] <= edge <= there[-1]]
    sides = {str(edge) if edge < SIDE_BINS[-1] else f"{edge}+": report.sides[edge] for edge in edges}
    shapes = {name: report.shapes[name] for name in SHAPE_LIMITS}
    plot_bars(sheet, (40, 20, 700, 400), f"Short side of {report.ok:,} pictures, in pixels from", sides)
    plot_bars(sheet, (760, 20, 1040, 400), "Shape, width : height", shapes)
    return sheet


def plot_bars(sheet: Image.Image, box: tuple[int, int, int, int], title: str, bars: dict[str, int]) -> None:
    left, top, right, bottom = box
    pen = ImageDraw.Draw(sheet)
    pen.text((left, top), title, fill="#222222", font=ImageFont.load_default(size=18))
    font = ImageFont.load_default(size=13)
    floor, ceiling = bottom - 30, top + 60
    pen.line((left, floor, right, floor), fill="#999999", width=1)
    step = min(90, (right - left) / max(1, len(bars)))
    for number, (label, count) in enumerate(bars.items()):
        middle = left + (number + 0.5) * step
        height = round((floor - ceiling) * count / max(1, *bars.values()))
        if count:
            peak = floor - max(2, height)
            pen.rectangle((middle - step * 0.38, peak, middle + step * 0.38, floor - 1), fill="#3b76af")
            pen.text((middle, peak - 4), format_count(count), fill="#444444", font=font, anchor="ms")
        pen.text((middle, floor + 8), label, fill="#444444", font=font, anchor="ma")


def format_count(count: int) -> str:
    """A number of at most five characters: 950, 3,655, 12.3k, 4.5M."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if count >= size * (1 if unit == "M" else 10):
            return f"{count / size:.1f}{unit}"
    return f"{count:,}"
