"""docs/speed-growth.md and its plot, from the figures of `benchmarks/growth.py` alone: every sentence is a rule's."""

from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.plot import Line, Panel, plot

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PLOT = DOCS / "speed-growth.md", DOCS / "images" / "growth.png"
FEW_ROWS = 32  # for which reading the weights is much of a product
FAR = 0.15  # between two slopes, from where on there must be a reason
LEAST, MOST = -0.2, 1.2  # shares of a point's time; one beyond was not measured as the time was, and is no reason
LINES = {  # name: (of a point, colour)
    "seconds": ("time", (200, 60, 40)),
    "operations": ("operations", (240, 170, 150)),
    "expected": ("with limits", (120, 120, 120)),
    "memory": ("memory", (40, 90, 190)),
    "tensors": ("weights and tensors", (150, 185, 235)),
}
ARITHMETIC = {  # why operations grow as they do, on any machine
    "prior: batch": "The empty caption is prepared once, however many captions there are.",
    "prior: steps": "The caption is prepared once, however many steps there are.",
    "prior: caption tokens": "A caption costs in `prepare` alone; a step looks at it, and runs two tokens.",
    "prior: width": "Products grow with the square of the width, attention with the width.",
    "prior: depth": "The last layer runs the query alone, so that two layers cost less than twice one of many.",
    "decoder: batch": "All of a step is done for each picture.",
    "decoder: steps": "The tokens' keys and values are made once.",
    "decoder: caption tokens": "Of the caption's tokens keys and values are made once; each pixel looks at them.",
    "decoder: latent size": "There are as many pixels as the side's square, and in attention each looks at all.",
    "decoder: width": "Products and convolutions grow with the square of the width, attention with the width.",
    "prior training: batch": "Nothing is shared within a batch.",
    "prior training: caption tokens": "Four tokens stand behind a caption; of the last layer the query alone runs.",
    "decoder training: batch": "Nothing is shared within a batch.",
    "decoder training: caption tokens": "Of the caption's tokens keys and values are made; each pixel looks at them.",
}
HEAD = """# How cost grows

    python -m benchmarks.growth              # five minutes: measures, and writes this page, its plot and growth.json
    python -m benchmarks.growth --page       # writes the page from benchmarks/results/growth.json again

{device}, threads: {threads}, torch {torch}, fp32, {date}. A product of large matrices reaches {rate} GFLOP/s there,
measured in the same run.

- *prior*: {prior}, with guidance. *decoder*: the shape of the shipped emoji U-Net, width that of its first level, with
  guidance; without captions unless their tokens are varied. *training*: a step of the loop on `configs/emoji`. All
  weights are random.
- *time*: the median of three rounds; the points of a curve take turns in each. A slope is that of a line through the
  logarithms of all points: 1 is proportional, 2 quadratic.
- *operations*: of products, convolutions and attention, counted: the slope that arithmetic predicts for the time.
- *with limits*: the slope of a time that is put together of measured parts: products alone of as many rows (on average
  over the passes) with as many weights, as often as the model runs; and what a call of an operator costs, measured on a
  model of almost no width, times the calls. For training also the part of a step that is the same for any batch,
  measured alone: clipping, AdamW, moving average.
- *memory*: what the process takes at the peak beyond what it took before, and the weights (with the optimizer's state
  and the average, in training). *predicted*: the weights, and the tensors that are alive at the same time at most, by
  counting what each operator makes and when it is let go.

![Time, operations, memory and tensors against each size, all divided by those of the first point](images/growth.png)

Both axes are logarithmic, and everything is divided by its first point.
"""


def write_page(result: dict[str, Any]) -> None:
    PAGE.write_text(page(result))
    picture(result).quantize(64).save(PLOT, optimize=True)


def picture(result: dict[str, Any]) -> Image.Image:
    panels = []
    for curve in result["curves"]:
        points, lines = curve["points"], []
        for name, (legend, color) in LINES.items():
            if points[0][name]:
                relative = [(point["at"], point[name] / points[0][name]) for point in points]
                lines.append(Line(legend, color, relative))
        panels.append(Panel(curve["model"], curve["varied"], "growth", lines))
    return plot(panels, log_x=True, log_y=True, columns=5, shared=False)


def page(result: dict[str, Any]) -> str:
    machine, curves = result["machine"], result["curves"]
    usual = next((curve for curve in curves if curve["model"] == "prior" and curve["varied"] == "batch"), curves[0])
    about = {
        "device": machine["device"],
        "threads": machine["threads"],
        "torch": machine["versions"]["torch"],
        "date": machine["date"],
        "rate": machine["matrix_gflops"]["fp32"],
        "prior": f"{usual['sizes'].get('depth')} layers of width {usual['sizes'].get('width')}",
    }
    parts = [HEAD.format(**about), slopes_table(curves)]
    for curve in curves:
        parts.append(f"## {name_of(curve).capitalize()}\n\n{fixed_sizes(curve)}.\n")
        parts.append(points_table(curve, machine["matrix_gflops"]["fp32"] * 1e9))
        parts.append(
            f"{ARITHMETIC[name_of(curve)]} {attention(curve)}{why_time(curve)} {why_memory(curve)}{profile(curve)}\n"
        )
    return "\n".join(parts)


def name_of(curve: dict[str, Any]) -> str:
    return f"{curve['model']}: {curve['varied']}"


def fixed_sizes(curve: dict[str, Any]) -> str:
    return ", ".join(f"{name} {size}" for name, size in curve["sizes"].items() if size).capitalize()


def slopes_table(curves: list[dict[str, Any]]) -> str:
    lines = ["| what | against | time | operations | with limits | memory | predicted |", "|---" * 7 + "|"]
    for curve in curves:
        found = (f"{curve['slopes'][name]:.2f}" for name in ("seconds", "operations", "expected", "memory", "tensors"))
        lines.append(f"| {curve['model']} | {curve['varied']} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def points_table(curve: dict[str, Any], rate: float) -> str:
    head = (
        curve["varied"],
        "ms",
        "spread",
        "GFLOP",
        "GFLOP/s",
        "matrix rate",
        "with limits, ms",
        "MB",
        "predicted, MB",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for point in curve["points"]:
        reached = point["operations"] / point["seconds"]
        cells = [
            str(point["at"]),
            rounded(1e3 * point["seconds"], 4),
            f"{rounded(1e3 * point['low'], 4)}-{rounded(1e3 * point['high'], 4)}",
        ]
        cells += [rounded(point["operations"] / 1e9, 3), f"{reached / 1e9:.3g}", f"{reached / rate:.0%}"]
        cells += [rounded(1e3 * point["expected"], 4), megabytes(point["memory"]), megabytes(point["tensors"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def megabytes(size: float | None) -> str:
    return "" if size is None else rounded(size / 1e6, 3)


def rounded(value: float, digits: int) -> str:
    return f"{float(f'{value:.{digits}g}'):g}"


def why_time(curve: dict[str, Any]) -> str:
    """What was measured that makes the slope of time another than that of operations."""
    slopes, first, last = curve["slopes"], curve["points"][0], curve["points"][-1]
    text = f"Time grows with a slope of {slopes['seconds']:.2f}, operations with {slopes['operations']:.2f}"
    close = abs(slopes["expected"] - slopes["seconds"]) <= FAR
    if abs(slopes["seconds"] - slopes["operations"]) <= FAR and close:
        return f"{text}."
    known = f"{'With limits it is' if close else 'With limits it would be'} {slopes['expected']:.2f}."
    if not is_explained(curve):
        parts = "; ".join(in_parts(curve, point) for point in (first, last))
        return f"{text}: not explained by calls and products: {parts}. {known}"
    causes = [products_alone(first, last), share_of("calls of operators", curve, calls), share_of_fixed(curve)]
    causes.append(share_of("what limits leave out (copies, attention, what is done element by element)", curve, rest))
    found = "; ".join(filter(None, causes))
    return f"{text}{': ' * bool(found)}{found}. {known}"


def is_explained(curve: dict[str, Any]) -> bool:
    """Whether the measured parts of the time can be parts of it, at both ends."""
    ends = (curve["points"][0], curve["points"][-1])
    return all(LEAST <= part / point["seconds"] <= MOST for point in ends for part in parts_of(curve, point))


def parts_of(curve: dict[str, Any], point: dict[str, Any]) -> tuple[float, ...]:
    """Seconds: of products alone, of calls, of what is fixed, and what is left of the time."""
    return point["alone"], calls(curve, point), fixed(curve, point), rest(curve, point)


def in_parts(curve: dict[str, Any], point: dict[str, Any]) -> str:
    time, alone, called = (rounded(1e3 * one, 3) for one in (point["seconds"], *parts_of(curve, point)[:2]))
    return f"{time} ms at {point['at']}, where products alone take {alone} ms and calls of operators {called} ms"


def attention(curve: dict[str, Any]) -> str:
    """Its share of the operations, where it grows."""
    first, last = curve["points"][0], curve["points"][-1]
    shares = [point["attention"] / point["operations"] for point in (first, last)]
    if shares[1] < shares[0] + 0.05:
        return ""
    return f"Attention is {shares[0]:.0%} of the operations at {first['at']} and {shares[1]:.0%} at {last['at']}. "


def profile(curve: dict[str, Any]) -> str:
    """What operators take at both ends; the rest is Python and small things."""
    text = ""
    for at, name in ((0, "first_shares"), (-1, "shares")):
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in curve.get(name, {}).items() if share >= 0.02)
        text += f" At {curve['points'][at]['at']} torch's profiler finds: {shares}." if shares else ""
    return text


def products_alone(first: dict[str, Any], last: dict[str, Any]) -> str:
    slow, fast = (1e-9 * products_of(point) / point["alone"] for point in (first, last))
    if max(slow, fast) < 1.25 * min(slow, fast):
        return ""
    text = f"products of {first['rows']:.0f} rows with as many weights reach {slow:.0f} GFLOP/s alone"
    if first["rows"] < FEW_ROWS:
        read = 4 * products_of(first) / (2 * first["rows"]) / first["alone"]  # their bytes, as often as they are read
        text += f", reading weights at {read / 1e9:.1f} GB/s"
    return f"{text}, and those of {last['rows']:.0f} rows {fast:.0f}"


def share_of(what: str, curve: dict[str, Any], part: Any) -> str:
    """Of the time, at both ends; nothing where it is as large at both: that changes no slope."""
    first, last = curve["points"][0], curve["points"][-1]
    shares = [part(curve, point) / point["seconds"] for point in (first, last)]
    if abs(shares[0] - shares[1]) < 0.05:
        return ""
    start, end = (f"{share:.0%}" for share in shares)
    return f"{what}: {start} of the time at {first['at']}, {end} at {last['at']}"


def share_of_fixed(curve: dict[str, Any]) -> str:
    return share_of("clipping, AdamW and average", curve, fixed)


def products_of(point: dict[str, Any]) -> float:
    return point["operations"] - point["attention"]


def calls(curve: dict[str, Any], point: dict[str, Any]) -> float:
    return curve["call"] * point["calls"]


def fixed(curve: dict[str, Any], point: dict[str, Any]) -> float:
    return point["expected"] - point["alone"] - calls(curve, point)


def rest(curve: dict[str, Any], point: dict[str, Any]) -> float:
    return point["seconds"] - point["expected"]


def why_memory(curve: dict[str, Any]) -> str:
    slopes, first, last = curve["slopes"], curve["points"][0], curve["points"][-1]
    if first["memory"] is None:
        return ""
    start, end = (f"{megabytes(point['weights'])} of {megabytes(point['memory'])} MB" for point in (first, last))
    text = f"Weights are {start} at {first['at']} and {end} at {last['at']}"
    if abs(slopes["memory"] - slopes["tensors"]) <= FAR:
        return f"{text}."
    more = [megabytes(point["memory"] - point["tensors"]) for point in (first, last)]
    return f"{text}. What no tensor shows (what oneDNN and the allocator hold) is {more[0]} MB and {more[1]} MB."
