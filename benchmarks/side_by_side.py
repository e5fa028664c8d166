"""Measure this project and a peer side by side: in one process, in turns, with outputs compared first.

    worst = check_equal(ours(), theirs())                                outputs agree, or there is nothing to time
    seconds = time_in_turns({"ours": ours, "diffusers": theirs}, 7)      of every round
    build_row("prior, batch 8", seconds, at_least=16, difference=worst, operations=count_both(...))

`benchmarks.report` prints and stores the rows.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from t2i.networks.linear import HAS_ONEDNN, multiply_by_onednn
from t2i.runtime.memory import release_freed_memory

TOLERANCE = 1e-4  # of outputs with the same weights, in fp32

Work = Callable[[], Any]
Seconds = dict[str, list[float]]  # by name, of each round


@dataclass
class Ratio:
    """The peer's time divided by ours: the median, the smallest and the largest of the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


@dataclass
class Row:
    """One comparison. Seconds, rates and bytes are by name: ours first, then the peer.

    A row of memory alone has no seconds; its ratio is the peer's bytes divided by ours.
    """

    what: str
    against: str
    ratio: Ratio
    at_least: float | None  # the ratio that is wanted; None if nothing is promised
    seconds: dict[str, float]
    difference: float | None = None  # largest difference of the outputs; None where weights are not the same
    rate: dict[str, float] = field(default_factory=dict)  # as a fraction of the machine's rate in matrix products
    memory: dict[str, int] = field(default_factory=dict)  # bytes at the peak, above what was there before
    note: str = ""


def time_in_turns(works: Mapping[str, Work], rounds: int = 5, warm: int = 1) -> Seconds:
    """Time each work `rounds` times, in turns and in alternating order, after `warm` rounds that do not count."""
    names = list(works)
    seconds: Seconds = {name: [] for name in names}
    for i in range(-warm, rounds):
        for name in names if i % 2 == 0 else reversed(names):
            synchronize()
            start = time.perf_counter()
            works[name]()
            synchronize()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compute_ratio(seconds: Seconds, ours: str, peer: str) -> Ratio:
    """Return the peer's seconds divided by ours, each of the same round."""
    ratios = [theirs / mine for theirs, mine in zip(seconds[peer], seconds[ours])]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def build_row(
    what: str,
    seconds: Seconds,
    at_least: float | None = None,
    operations: Mapping[str, float] | None = None,
    **more: Any,
) -> Row:
    """Return a row from the times of two works, ours and then the peer's.

    operations: floating-point operations of one call, by name. more: the remaining fields of `Row`.
    """
    ours, peer = seconds
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rates = {name: count / medians[name] / measure_matrix_rate() for name, count in (operations or {}).items()}
    return Row(what, peer, compute_ratio(seconds, ours, peer), at_least, medians, rate=rates, **more)


def check_equal(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> float:
    """Return the largest difference of two outputs. Raises AssertionError beyond the tolerance."""
    worst = (ours.float() - theirs.float()).abs().max().item()
    assert ours.shape == theirs.shape and worst <= tolerance, f"outputs differ by {worst:g}, allowed is {tolerance:g}"
    return worst


def check_all_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> float:
    """Return the largest difference of tensors of the same names, relative to the largest value of the peer's tensor.

    For gradients, which may all be far below any absolute tolerance. Raises AssertionError beyond the tolerance.
    """
    assert ours.keys() == theirs.keys(), f"only one side has {sorted(ours.keys() ^ theirs.keys())}"
    differences = {}
    for name, other in theirs.items():
        assert ours[name].shape == other.shape, f"{name}: {tuple(ours[name].shape)} and {tuple(other.shape)}"
        largest = other.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # two tensors of zeros are equal
        differences[name] = ((ours[name] - other).abs().max() / largest).item()
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] <= tolerance, f"{worst} differs by {differences[worst]:g} of the largest value"
    return differences[worst]


def generators(count: int) -> list[Generator]:
    """Return a stream of noise for each image of a batch."""
    return [Generator().manual_seed(number) for number in range(count)]


def device() -> torch.device:
    """Return the device that is measured: CUDA's where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def measure_matrix_rate(dtype: torch.dtype = torch.float32) -> float:
    """Return FLOP/s of a large matrix product, the best of several: the limit of the machine.

    In fp32 on a processor it is that of oneDNN if that is faster: torch's own product may be far from the limit.
    """
    multiplies = [torch.matmul]
    if HAS_ONEDNN and device().type == "cpu" and dtype == torch.float32:
        multiplies.append(multiply_by_onednn)
    return max(measure_product_rate(multiply, dtype) for multiply in multiplies)


@cache
def measure_product_rate(multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> float:
    size = 8192 if device().type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(time_in_turns({"product": lambda: multiply(a, b)}, rounds=8, warm=2)["product"])


def count_operations(work: Work) -> int:
    """Return the floating-point operations of the matrix products and convolutions in `work`."""
    # torch's counter does not know the operators of oneDNN that this project calls by name.
    mapping: dict[Any, Callable] = {}
    if HAS_ONEDNN:
        mapping[torch.ops.mkldnn._linear_pointwise] = count_linear
    if hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        mapping[torch.ops.mkldnn._convolution_pointwise] = count_convolution
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


def count_convolution(x: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Count for x (B, C, H, W) and weight (O, C / groups, h, w)."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def count_linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """Count for x (..., K) and weight (N, K)."""
    return 2 * math.prod(x) * weight[0]


def measure_peak_memory(work: Work) -> int | None:
    """Return the bytes at the peak of `work`, above what was there before; None where the system gives no peak."""
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read_bytes(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name + ":"))
        return 1024 * int(line.split()[1])

    release_freed_memory()  # or what was freed before would count as there
    try:
        reset.write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = read_bytes("VmRSS")
    work()
    return max(0, read_bytes("VmHWM") - before)


def measure_peaks(works: Mapping[str, Work]) -> dict[str, int]:
    """Return the peak memory of each work in bytes, without those whose peak the system does not give."""
    peaks = {name: measure_peak_memory(work) for name, work in works.items()}
    return {name: peak for name, peak in peaks.items() if peak is not None}
