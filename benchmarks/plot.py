"""Lines in panels side by side, drawn by Pillow alone."""

import math
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


def plot(panels: list[Panel], log_x: bool = False) -> Image.Image:
    """Panels with the same axes and one legend under them."""
    points = [point for panel in panels for line in panel.lines for point in line.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    marks_x = decades(min(xs), max(xs)) if log_x else ticks(min(xs), max(xs))
    marks_y = ticks(min(ys), max(ys))
    image = Image.new("RGB", (WIDTH * len(panels), HEIGHT + LEGEND), "white")
    pen = ImageDraw.Draw(image)
    for i, panel in enumerate(panels):
        across = Axis(marks_x, i * WIDTH + LEFT, (i + 1) * WIDTH - RIGHT, log_x)
        draw_panel(pen, panel, across, Axis(marks_y, HEIGHT - BOTTOM, TOP))
    at = float(LEFT)
    for line in panels[0].lines:
        pen.line((at, HEIGHT + 8, at + 18, HEIGHT + 8), fill=line.color, width=3)
        pen.text((at + 22, HEIGHT + 8), line.name, fill=INK, font=FONT, anchor="lm")
        at += 40 + FONT.getlength(line.name)
    return image


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


def draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, across: Axis, up: Axis) -> None:
    middle = (across.start + across.end) / 2
    for mark in across.marks:
        x = across.place(mark)
        pen.line((x, up.start, x, up.end), fill=GRID)
        pen.text((x, up.start + 4), f"{mark:g}", fill=INK, font=FONT, anchor="ma")
    for mark in up.marks:
        y = up.place(mark)
        pen.line((across.start, y, across.end, y), fill=GRID)
        pen.text((across.start - 4, y), f"{mark:g}", fill=INK, font=FONT, anchor="rm")
    pen.text((middle, 8), f"{panel.title}: {panel.y}", fill=INK, font=FONT, anchor="ma")
    pen.text((middle, HEIGHT - 22), panel.x, fill=INK, font=FONT, anchor="ma")
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


def decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... that enclose a range of positive numbers."""
    marks = [factor * 10.0**power for power in range(-4, 5) for factor in (1, 2, 5)]
    first = max((mark for mark in marks if mark <= low), default=marks[0])
    last = min((mark for mark in marks if mark >= high), default=marks[-1])
    return [mark for mark in marks if first <= mark <= last]
