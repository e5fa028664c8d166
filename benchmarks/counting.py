"""What a piece of work consists of, whatever machine runs it: operations, calls of operators, tensors alive at once."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.side_by_side import Work, counter
from t2i.runtime.memory import MemoryTracker

ATTENTION = ("_scaled_dot_product", "bmm")  # products of two things that both depend on the input
KINDS = {  # of operators, by what their names contain; the first that fits
    "attention": ("scaled_dot_product", "softmax", "bmm"),
    "convolutions": ("convolution",),
    "products": ("mm", "linear"),
    "norms": ("norm",),
    "activations": ("gelu", "silu"),
    "copies": ("copy", "clone", "::cat", "index", "reorder", "fill"),
    "optimizer": ("foreach", "fused", "lerp"),
}


@dataclass
class Counts:
    operations: int  # floating-point, of products
    attention: int  # of them, those of attention
    calls: int  # of operators
    tensors: int  # bytes at most alive at once, without what was there before


def count(work: Work) -> Counts:
    with counter() as products, MemoryTracker() as alive:
        work()
    each = {str(name): found for name, found in products.get_flop_counts()["Global"].items()}
    attention = sum(found for name, found in each.items() if any(part in name for part in ATTENTION))
    return Counts(sum(each.values()), attention, alive.calls, alive.peak)


def shares(work: Work) -> dict[str, float]:
    """Of the time that operators take, by kind, as torch's profiler finds it; the largest first."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        work()
    seconds: Counter[str] = Counter()
    for event in found.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "others")
        seconds[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {kind: value / seconds.total() for kind, value in seconds.most_common()}
