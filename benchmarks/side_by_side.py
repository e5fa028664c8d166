"""Ours and a peer's side by side, in one process, in turns: what every benchmark of speed measures with.

A benchmark is a module of this package with `main(quick: bool) -> list[Row]`; `quick` is for the tests: toy sizes, all
comparisons of outputs, no figure worth reading. Under `__main__` it calls `run("its name", main)`, which prints a table
and writes `results/NAME.json`. `python -m benchmarks` (`make bench`) runs all of them, each in a process of its own.

    outputs agree first        worst = difference(ours(), theirs())
    then they are timed        times = alternate({"ours": ours, "diffusers": theirs}, rounds=7)
    and become a row           row("prior, batch 8", times, at_least=16, difference=worst, flops=flops(ours))
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import CANNOT_RUN
from t2i.errors import InputError
from t2i.networks.linear import HAS_ONEDNN, multiply_by_onednn
from t2i.runtime.devices import can_compute_bf16
from t2i.runtime.memory import release_freed_memory

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "dalle2-pytorch", "numpy")
TOLERANCE = 1e-4  # of outputs with the same weights, in fp32

Work = Callable[[], Any]


@dataclass
class Times:
    """Seconds of each, round by round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def of(self, ours: str, peer: str) -> "Times":
        """Of two of those that took turns."""
        return Times({name: self.seconds[name] for name in (ours, peer)})


@dataclass
class Ratio:
    """How many times as long the peer takes: median, smallest and largest of the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


@dataclass
class Row:
    """One comparison. Seconds and bytes are by name: ours first, then the peer.

    One of memory alone has no seconds; its ratio is how many times as little ours takes.
    """

    what: str
    against: str
    ratio: Ratio
    at_least: float | None  # what is wanted of the ratio; None if nothing is promised
    seconds: dict[str, float]
    difference: float | None = None  # largest between the outputs; None where weights are not the same
    rate: dict[str, float] = field(default_factory=dict)  # share of the machine's matrix rate
    memory: dict[str, int] = field(default_factory=dict)  # bytes at the peak, above what was there before
    note: str = ""


def alternate(works: Mapping[str, Work], rounds: int = 5, warm: int = 1) -> Times:
    """Time each of them `rounds` times, in turns and in changing order, after `warm` rounds that do not count."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warm, rounds):
        for name in names if i % 2 == 0 else reversed(names):
            synchronize()
            begun = time.perf_counter()
            works[name]()
            synchronize()
            if i >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return Times(seconds)


def ratio(times: Times, peer: str, ours: str = "ours") -> Ratio:
    """The peer's seconds over ours, of the same round."""
    found = [theirs / mine for theirs, mine in zip(times.seconds[peer], times.seconds[ours])]
    return Ratio(statistics.median(found), min(found), max(found))


def row(
    what: str,
    times: Times,
    at_least: float | None = None,
    difference: float | None = None,
    flops: Mapping[str, float] | None = None,
    memory: Mapping[str, int] | None = None,
    note: str = "",
    rate: float | None = None,
) -> Row:
    """A row of two that were timed, ours and then the peer. flops: of one call each; rate: of the machine, FLOP/s."""
    ours, peer = times.seconds
    seconds = {name: times.median(name) for name in times.seconds}
    limit = (rate or matrix_rate()) if flops else 1.0
    shares = {name: count / seconds[name] / limit for name, count in (flops or {}).items()}
    found = ratio(times, peer, ours)
    return Row(what, peer, found, at_least, seconds, difference, shares, dict(memory or {}), note)


def difference(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest between two outputs. Raises AssertionError beyond the tolerance: then there is nothing to time."""
    worst = (ours.float() - theirs.float()).abs().max().item()
    assert ours.shape == theirs.shape and worst <= tolerance, f"outputs differ by {worst:g}, allowed is {tolerance:g}"
    return worst


def relative_difference(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> float:
    """The largest between tensors of the same names, each relative to the largest value of the peer's tensor.

    For gradients: they may all be far below any absolute tolerance. Raises AssertionError beyond the tolerance.
    """
    assert ours.keys() == theirs.keys(), f"one of the two alone has {sorted(ours.keys() ^ theirs.keys())}"
    found = {}
    for name, other in theirs.items():
        assert ours[name].shape == other.shape, f"{name}: {tuple(ours[name].shape)} and {tuple(other.shape)}"
        least = torch.finfo(torch.float32).tiny  # two tensors of zeros are equal
        found[name] = ((ours[name] - other).abs().max() / other.abs().max().clamp(min=least)).item()
    worst = max(found, key=lambda name: found[name])
    allowed = f"allowed is {tolerance:g} of the largest value"
    assert found[worst] <= tolerance, f"{worst} differs by {found[worst]:g}, {allowed}"
    return found[worst]


def generators(count: int) -> list[Generator]:
    """A stream of noise for each of a batch."""
    return [Generator().manual_seed(number) for number in range(count)]


def device() -> torch.device:
    """The one that is measured: CUDA's where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def matrix_rate(dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """FLOP/s of a large matrix product, the best of several: the machine's own limit. Measured once in a process.

    Of the faster of two libraries: in fp32 on a processor, torch's own product may be far from the limit.
    """
    return max(
        product_rate(multiply, dtype, size) for multiply in (torch.matmul, multiply_by_onednn) if known(multiply, dtype)
    )


@cache
def product_rate(
    multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32, size: int | None = None
) -> float:
    size = size or (8192 if device().type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(alternate({"product": lambda: multiply(a, b)}, rounds=8, warm=2).seconds["product"])


def known(multiply: Any, dtype: torch.dtype) -> bool:
    return multiply is torch.matmul or (HAS_ONEDNN and device().type == "cpu" and dtype == torch.float32)


def counter() -> FlopCounterMode:
    """torch's own counter of the operations in products, told of those that oneDNN is asked for by name."""
    named = {torch.ops.mkldnn._convolution_pointwise: packed_convolution} if has_packed() else {}
    if HAS_ONEDNN:
        named[torch.ops.mkldnn._linear_pointwise] = linear
    return FlopCounterMode(display=False, custom_mapping=named)


def has_packed() -> bool:
    return hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def packed_convolution(x: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Operations of a convolution: x (B, C, H, W), weight (O, C / groups, h, w), and what comes out."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of a linear layer: x (..., K), weight (N, K)."""
    return 2 * math.prod(x) * weight[0]


def flops(work: Work) -> int:
    """Floating-point operations of the products in it."""
    with counter() as counted:
        work()
    return counted.get_total_flops()


def peak_memory(work: Work) -> int | None:
    """Bytes at the peak of `work`, above what was there before; None where the system does not tell."""
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def read(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name + ":"))
        return 1024 * int(line.split()[1])

    release_freed_memory()  # or what was freed before would count as there
    try:
        reset.write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = read("VmRSS")
    work()
    return max(0, read("VmHWM") - before)


def peaks(works: Mapping[str, Work]) -> dict[str, int]:
    """Peak memory of each, in bytes, where the system tells."""
    return {name: peak for name, work in works.items() if (peak := peak_memory(work)) is not None}


def machine() -> dict[str, Any]:
    """What was measured on, and with which versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gflops = {"fp32": matrix_rate()}
    if can_compute_bf16(device().type):  # where it does not, ten large products take minutes
        gflops["bf16"] = matrix_rate(torch.bfloat16)
    if device().type == "cpu":
        gflops["fp32 of torch's own product"] = product_rate(torch.matmul)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "matrix_gflops": {name: round(rate / 1e9) for name, rate in gflops.items()},
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[Row]) -> str:
    """Markdown, with the rows' notes below."""
    head = ("what", "against", "ours, s", "theirs, s", "times as fast", "wanted", "outputs differ by", "matrix rate")
    head = (*head, "peak memory, MiB, ours / theirs")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for one in rows:
        missed = one.at_least is not None and one.ratio.median < one.at_least
        seconds = [f"{each:.3g}" for each in one.seconds.values()] or ["", ""]
        cells = [one.what, one.against, seconds[0], seconds[-1], f"{one.ratio}{': missed' * missed}"]
        cells.append("" if one.at_least is None else f"{one.at_least:.3g}")
        cells.append("" if one.difference is None else f"{one.difference:.0e}")
        cells.append(" / ".join(f"{share:.0%}" for share in one.rate.values()))
        cells.append(" / ".join(f"{peak / 2**20:.0f}" for peak in one.memory.values()))
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {one.what}, against {one.against}: {one.note}" for one in rows if one.note]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def write(name: str, rows: list[Row], more: dict[str, Any] | None = None) -> None:
    """Print a table, and write `results/NAME.json`: the machine, the rows, and what else there is."""
    about = machine()
    result = {"command": f"python -m benchmarks.{name}", "machine": about, "rows": [asdict(one) for one in rows]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result | (more or {}), indent=1) + "\n")
    print(f"{name}: {about['device']}, {about['threads']} threads, {about['date']}\n\n{table(rows)}\n", flush=True)


def run(name: str, main: Callable[[bool], list[Row]]) -> None:
    """A benchmark as a program: `--quick` prints its rows at toy size and writes nothing.

    What cannot run here is one line, with a status that `python -m benchmarks` does not count as a failure.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="toy sizes: whether it runs and outputs agree")
    quick = parser.parse_args().quick
    try:
        rows = main(quick)
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(CANNOT_RUN)
    if quick:
        print(table(rows))
    else:
        write(name, rows)
