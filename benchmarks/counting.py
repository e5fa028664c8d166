"""What a piece of work consists of, whatever machine runs it: operations, calls of operators, tensors alive at once."""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.side_by_side import Work, counter

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
    with counter() as products, Alive() as alive:
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


class Alive(TorchDispatchMode):
    """Counts calls of operators, and the bytes of what they made as long as somebody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.now = self.peak = 0
        self.known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_leaves((args, kwargs)):
            self.meet(one, new=False)  # weights and inputs, of which an operator may return a view
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for one in tree_leaves(result):
            self.meet(one, new=True)
        self.peak = max(self.peak, self.now)
        return result

    def meet(self, one: Any, new: bool) -> None:
        if not isinstance(one, Tensor):
            return
        packed = one.is_mkldnn  # oneDNN's own order of a convolution's weights has no storage to look at
        held = one if packed else one.untyped_storage()
        if id(held) in self.known:
            return
        size = (one.numel() * one.element_size() if packed else held.nbytes()) if new else 0
        self.now += size
        end = weakref.finalize(held, self.forget, id(held), size)
        end.atexit = False
        self.known[id(held)] = end

    def forget(self, key: int, size: int) -> None:
        self.now -= size
        del self.known[key]
