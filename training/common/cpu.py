"""Faster training on a CPU; docs/explanation/speed.md has the figures."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.runtime import fast_paths

MAX_SHORT_QUERIES = 256  # with more queries, attention in bf16 is faster
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, until it ends. Returns False if its allocator cannot.

    Every step of a training run takes and frees the same memory. glibc returns it to the system at once and requests it
    again, and the system fills each page with zeros: a tenth to a fifth of a step.
    """
    # Elsewhere there is no glibc, and CDLL(None) fails on Windows.
    if not (sys.platform.startswith("linux") and fast_paths.enabled):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@contextlib.contextmanager
def attend_few_queries_in_fp32() -> Iterator[None]:
    """Compute attention of few queries on a CPU in fp32 instead of bf16, in every model within this context.

    torch's bf16 kernel is made for long sequences and takes up to seven times as long for few queries. The result is
    bf16 as before, rounded once instead of often.
    """
    attention = F.scaled_dot_product_attention

    def attend_in_fp32(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "cpu" or query.dtype != torch.bfloat16 or query.shape[-2] > MAX_SHORT_QUERIES:
            return attention(query, *args, **kwargs)
        args = tuple(cast_to_fp32(value) for value in args)
        kwargs = {name: cast_to_fp32(value) for name, value in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            result = attention(query.float(), *args, **kwargs)
        return result.to(query.dtype)

    # torch's own layers look the function up here at every call; a TorchFunctionMode would not reach them.
    F.scaled_dot_product_attention = attend_in_fp32
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


def cast_to_fp32(value: Any) -> Any:
    """Cast a floating-point tensor to fp32; return anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def choose_short_attention(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return `attend_few_queries_in_fp32()` where it is faster: for steps in bf16 on a CPU."""
    faster = device.type == "cpu" and precision == "bf16" and fast_paths.enabled
    return attend_few_queries_in_fp32() if faster else contextlib.nullcontext()
