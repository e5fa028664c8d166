"""How time and memory grow with the batch, the steps, the caption, the latents and the model, beside what is counted.

    python -m benchmarks.growth [--quick] [--only TEXT]

Writes results/growth.json, docs/speed-growth.md and docs/images/growth.png. --only measures the curves whose name
("prior: batch") contains TEXT and prints their slopes alone: what is written is of one run. The points of a curve are
timed in turns, so that a machine that becomes slower meanwhile does not make a slope.

Beside each point stands what should take as long, measured in the same rounds: products alone of as many rows with as
many weights, and as many calls of operators as a model of almost no width makes.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from diffusers import DDIMScheduler
from t2i.training.common.loop import update_weights
from torch import Generator, Tensor, nn

from benchmarks.counting import count, shares
from benchmarks.growth_page import write_page
from benchmarks.prior_speed import captions, make_prior, ours
from benchmarks.side_by_side import RESULTS, Work, alternate, device, generators, machine, peak_memory
from benchmarks.training_step import Steps, made_up_steps
from t2i.commands import SHIPPED_MODEL
from t2i.networks.linear import Linear
from t2i.networks.unet_decoder import UNetDecoder
from t2i.sampling.sample import sample_decoder

FIGURES, ROUNDS = RESULTS / "growth.json", 3
Sizes = Mapping[str, int]

USUAL: dict[str, Sizes] = {  # what does not vary
    "prior": {"batch": 4, "steps": 10, "caption tokens": 20, "width": 512, "depth": 6},
    "decoder": {"batch": 2, "steps": 5, "caption tokens": 0, "latent size": 8, "width": 128},
    "prior training": {"batch": 64, "caption tokens": 20},
    "decoder training": {"batch": 32, "caption tokens": 20},
}
VARIED: dict[str, dict[str, Sequence[int]]] = {
    "prior": {
        "batch": (1, 2, 4, 8, 16, 32, 64),
        "steps": (5, 10, 20, 35, 50),
        "caption tokens": (5, 10, 20, 40, 77),
        "width": (128, 256, 384, 512, 768),
        "depth": (2, 4, 8, 12),
    },
    "decoder": {
        "batch": (1, 2, 4, 8, 16, 32, 64),
        "steps": (5, 10, 20, 35, 50),
        "caption tokens": (5, 20, 40, 77),
        "latent size": (8, 12, 16, 24, 32, 48),
        "width": (64, 128, 192, 256),
    },
    "prior training": {"batch": (8, 32, 128), "caption tokens": (5, 20, 77)},
    "decoder training": {"batch": (8, 32, 128), "caption tokens": (5, 20, 77)},
}
QUICK: dict[str, Sizes] = {
    "prior": {"batch": 1, "steps": 1, "caption tokens": 2, "width": 16, "depth": 1},
    "decoder": {"batch": 1, "steps": 1, "caption tokens": 0, "latent size": 8, "width": 32},
    "prior training": {"batch": 2, "caption tokens": 2},
    "decoder training": {"batch": 2, "caption tokens": 2},
}
NO_WIDTH = {"prior": 16, "decoder": 32}  # nothing but calls of operators


@dataclass
class Task:
    run: Work
    model: nn.Module
    passes: int  # over the model's weights
    copies: int = 1  # of the weights that are kept: a training has the optimizer's and the average too
    fixed: Work | None = None  # the part that is the same for any batch


@dataclass
class Point:
    """Of one size. Seconds are medians; bytes are at the peak, with the weights."""

    at: int
    seconds: float
    low: float
    high: float
    expected: float  # seconds: lone products, calls of operators, and what is fixed
    operations: int
    attention: int
    calls: int
    rows: float  # that meet each weight in a pass
    alone: float  # seconds, of the lone products
    weights: int
    memory: int | None
    tensors: int


@dataclass
class Curve:
    model: str
    varied: str
    sizes: dict[str, int]
    call: float  # seconds of an operator's call
    points: list[Point]
    threads: int  # of torch, after all points
    slopes: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)  # of the last point's time, by kinds of operators
    first_shares: dict[str, float] = field(default_factory=dict)  # of the first point's


def slope(points: Sequence[tuple[float, float]]) -> float:
    """k of the power law y = c x^k, by least squares of the logarithms."""
    logs = [[math.log(value) for value in values] for values in zip(*points)]
    return statistics.linear_regression(*logs).slope


@lru_cache(maxsize=8)
def decoder(width: int, size: int, reads: bool) -> UNetDecoder:
    """The shipped emoji decoder's shape, with random weights; the second level is half as wide again."""
    settings = {
        name: value for name, value in UNetDecoder.load_config(SHIPPED_MODEL / "decoder").items() if name[0] != "_"
    }
    wide = settings["unet"]["block_out_channels"]
    settings["unet"] = settings["unet"] | {"block_out_channels": [width * one // wide[0] for one in wide]}
    settings |= {"latent_size": size, "text_width": settings["embed_dim"] if reads else None}
    torch.manual_seed(0)
    return UNetDecoder(**settings).eval().requires_grad_(False).to(device())


prior = lru_cache(maxsize=8)(make_prior)


def prior_task(sizes: Sizes) -> Task:
    width, steps, longest = sizes["width"], sizes["steps"], sizes["caption tokens"]
    model, text = prior(width, sizes["depth"], width), captions(sizes["batch"], width, (min(5, longest), longest))
    noise = torch.randn(sizes["batch"], width, generator=Generator().manual_seed(0)).to(device())
    return Task(lambda: ours(model, text, noise, steps), model, steps)


def decoder_task(sizes: Sizes) -> Task:
    batch, steps, longest = sizes["batch"], sizes["steps"], sizes["caption tokens"]
    model = decoder(sizes["width"], sizes["latent size"], longest > 0)
    scheduler = DDIMScheduler.from_pretrained(SHIPPED_MODEL / "decoder_scheduler")
    z_i = torch.randn(batch, model.config.embed_dim, generator=Generator().manual_seed(0)).to(device())
    text = captions(batch, model.config.embed_dim, (min(5, longest), longest)) if longest else None

    def run() -> Tensor:
        return sample_decoder(model, scheduler, z_i, text, steps, model.default_guidance_scale, generators(batch))

    return Task(run, model, steps)


def training_task(name: str, sizes: Sizes) -> Task:
    """A step of the loop on the emoji configuration, captions of one length."""
    settings = [f"train.batch_size={sizes['batch']}", "train.mixed_precision=no", "train.steps=100000"]
    settings += ["reads_captions=true"] if name == "decoder" else []
    step: Steps = made_up_steps(f"configs/emoji/{name}.yaml", settings, lambda _: sizes["caption tokens"])
    step()  # the optimizer's state is there from now on
    weights = [one for one in step.state.model.parameters() if one.requires_grad]

    def fixed() -> None:
        for one in weights:
            one.grad = torch.zeros_like(one)
        step.accelerator.clip_grad_norm_(weights, 1.0)
        update_weights(step.accelerator, step.state, 1e-5, True)

    return Task(step, step.state.model, passes=3, copies=4, fixed=fixed)


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "prior": prior_task,
    "decoder": decoder_task,
    "prior training": lambda sizes: training_task("prior", sizes),
    "decoder training": lambda sizes: training_task("decoder", sizes),
}


def products(rows: float, weights: int, width: int) -> Work:
    """Products alone: `rows` rows with matrices that hold about `weights` weights."""
    x = torch.randn(max(1, round(rows)), width, device=device())
    many = max(1, round(weights / (4 * width**2)))
    layers = [Linear(width, 4 * width, bias=False, device=device()) for _ in range(many)]

    @torch.no_grad()
    def work() -> None:
        for layer in layers:
            layer(x)

    return work


def calls_alone(name: str) -> Work:
    """Calls of operators alone: the model with almost nothing to compute."""
    model = name.split()[0]
    task = TASKS[model]({**USUAL[model], "batch": 1, "steps": 5, "width": NO_WIDTH[model]})
    return torch.no_grad()(task.run)


def measure(name: str, varied: str, sizes: Sizes, values: Sequence[int], rounds: int = ROUNDS) -> Curve:
    toy, found = calls_alone(name), []
    works, toy_calls = {"calls": toy}, count(toy).calls
    for value in values:
        task = TASKS[name]({**sizes, varied: value})
        weights = sum(one.numel() for one in task.model.parameters())
        counts = count(task.run)
        rows = (counts.operations - counts.attention) / (2 * weights * task.passes)
        width = {**sizes, varied: value}.get("width", 192)
        works |= {f"run {value}": task.run, f"alone {value}": products(rows, weights, width)}
        works[f"alone {value}"]()
        if task.fixed is not None:
            works[f"fixed {value}"] = task.fixed
        memory = peak_memory(task.run)
        kept = 4 * weights * task.copies
        peak = None if memory is None else kept + memory
        found.append((value, task, counts, rows, kept, peak, kept + counts.tensors))
    times = alternate(works, rounds, warm=0)
    call, points = times.median("calls") / toy_calls, []
    for value, task, counts, rows, kept, memory, tensors in found:
        each = times.seconds[f"run {value}"]
        alone = task.passes * times.median(f"alone {value}")
        fixed = times.median(f"fixed {value}") if task.fixed else 0.0
        expected = alone + call * counts.calls + fixed
        points.append(
            Point(
                value, statistics.median(each), min(each), max(each), expected,
                counts.operations, counts.attention, counts.calls, rows, alone, kept, memory, tensors,
            )
        )  # fmt: skip
    fixed_sizes = {one: size for one, size in sizes.items() if one != varied}
    curve = Curve(name, varied, fixed_sizes, call, points, torch.get_num_threads())
    curve.first_shares, curve.shares = (shares(one.run) for one in (found[0][1], found[-1][1]))
    for what in ("seconds", "expected", "operations", "memory", "tensors"):
        pairs = [(point.at, getattr(point, what)) for point in points]
        curve.slopes[what] = slope([pair for pair in pairs if pair[1]]) if any(pair[1] for pair in pairs) else 0.0
    return curve


def grow(quick: bool = False, only: str = "") -> Iterator[Curve]:
    """Each curve as it is measured, or those whose name contains `only`; quick: of two points, at toy size."""
    for name, axes in VARIED.items():
        for varied, values in axes.items():
            if only not in f"{name}: {varied}":
                continue
            sizes, rounds = (QUICK[name], 1) if quick else (USUAL[name], ROUNDS)
            least = max(sizes[varied], 1)
            with torch.set_grad_enabled("training" in name):
                yield measure(name, varied, sizes, (least, 2 * least) if quick else values, rounds)


def use_all_cores() -> None:
    """As the training loop does, before anything is measured: a launcher's OMP_NUM_THREADS may say less."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def write(curves: Sequence[Curve], about: Mapping[str, Any]) -> None:
    """All curves of a run, and the machine as it was found in that run."""
    result = {"command": "python -m benchmarks.growth", "machine": about, "curves": [asdict(one) for one in curves]}
    RESULTS.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth")
    parser.add_argument("--quick", action="store_true", help="toy sizes: whether it runs; writes nothing")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="curves whose name contains it, such as 'prior: batch'; writes nothing",
    )
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the figures")
    given = parser.parse_args()
    if given.page:
        write_page(json.loads(FIGURES.read_text()))
        return
    use_all_cores()
    print(f"threads: {torch.get_num_threads()}", flush=True)
    kept = not (given.quick or given.only)
    about, curves = machine() if kept else {}, []
    for curve in grow(given.quick, given.only):
        slopes = ", ".join(f"{name} {value:.2f}" for name, value in curve.slopes.items())
        print(f"{curve.model}: {curve.varied}: slopes of {slopes}", flush=True)
        curves.append(curve)
    if kept:
        write(curves, about)
        write_page(json.loads(FIGURES.read_text()))


if __name__ == "__main__":
    main()
