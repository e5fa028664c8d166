"""Lines in panels, drawn by Pillow alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, LEGEND = 330, 260, 56, 12, 28, 46, 24
INK, GRID = (40, 40, 40), (225, 225, 225)
FONT = ImageFont.load_default(size=12)


@dataclass
class Line:
    name: str
    color: tuple[int, int, int]
    points: list[tuple[float, float]]


@dataclass
class Panel:
    title: str
    x: str
    y: str
    lines: list[Line]


def plot(
    panels: list[Panel], log_x: bool = False, log_y: bool = False, columns: int | None = None, shared: bool = True
) -> Image.Image:
    """Panels in rows, and one legend under them. shared: all have the same axes."""
    columns = columns or len(panels)
    bottom = math.ceil(len(panels) / columns) * HEIGHT
    image = Image.new("RGB", (WIDTH * columns, bottom + LEGEND), "white")
    pen = ImageDraw.Draw(image)
    for i, panel in enumerate(panels):
        points = [point for one in (panels if shared else [panel]) for line in one.lines for point in line.points]
        marks_x, marks_y = (marks_of(values, log) for values, log in zip(zip(*points), (log_x, log_y)))
        left, top = i % columns * WIDTH, i // columns * HEIGHT
        across = Axis(marks_x, left + LEFT, left + WIDTH - RIGHT, log_x)
        draw_panel(pen, panel, across, Axis(marks_y, top + HEIGHT - BOTTOM, top + TOP, log_y), top)
    at = float(LEFT)
    for line in panels[0].lines:
        pen.line((at, bottom + 8, at + 18, bottom + 8), fill=line.color, width=3)
        pen.text((at + 22, bottom + 8), line.name, fill=INK, font=FONT, anchor="lm")
        at += 40 + FONT.getlength(line.name)
    return image


def marks_of(values: Sequence[float], log: bool) -> list[float]:
    return decades(min(values), max(values)) if log else ticks(min(values), max(values))


@dataclass
class Axis:
    marks: list[float]
    start: int  # pixel of the first mark
    end: int
    log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value."""
        ends = [math.log(one) if self.log else one for one in (self.marks[0], self.marks[-1], value)]
        return self.start + (ends[2] - ends[0]) / (ends[1] - ends[0]) * (self.end - self.start)


def draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, across: Axis, up: Axis, top: int = 0) -> None:
    middle = (across.start + across.end) / 2
    for mark in across.marks:
        x = across.place(mark)
        pen.line((x, up.start, x, up.end), fill=GRID)
        pen.text((x, up.start + 4), f"{mark:g}", fill=INK, font=FONT, anchor="ma")
    for mark in up.marks:
        y = up.place(mark)
        pen.line((across.start, y, across.end, y), fill=GRID)
        pen.text((across.start - 4, y), f"{mark:g}", fill=INK, font=FONT, anchor="rm")
    pen.text((middle, top + 8), f"{panel.title}: {panel.y}", fill=INK, font=FONT, anchor="ma")
    pen.text((middle, top + HEIGHT - 22), panel.x, fill=INK, font=FONT, anchor="ma")
    for line in panel.lines:
        points = [(across.place(x), up.place(y)) for x, y in line.points]
        pen.line(points, fill=line.color, width=2)
        for x, y in points:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=line.color)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose a range."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / about))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


def decades(low: float, high: float, most: int = 8) -> list[float]:
    """1, 2, 5, 10, ... that enclose a range of positive numbers, but for a twentieth; of many, the powers of ten."""
    for factors in ((1, 2, 5), (1,)):
        every = [factor * 10.0**power for power in range(-4, 7) for factor in factors]
        first = max((mark for mark in every if mark <= 1.05 * low), default=every[0])
        last = min((mark for mark in every if mark >= high / 1.05 and mark > first), default=every[-1])
        found = [mark for mark in every if first <= mark <= last]
        if len(found) <= most:
            break
    return found
