"""What makes training faster on processors (`docs/speed.md` has the figures)."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.runtime import fast_paths

MAX_SHORT_QUERIES = 256  # queries; beyond, attention in bf16 is the faster one
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, until it ends; whether its allocator can be told so.

    Every step of a training run takes and frees the same. glibc gives tensors back to the system at once and asks for
    them again, and the system fills each page with zeros: a tenth to a fifth of a step.
    """
    if not sys.platform.startswith("linux") or not fast_paths.enabled:  # Windows has no library without a name
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@contextlib.contextmanager
def attend_few_queries_in_fp32() -> Iterator[None]:
    """Attention of few queries on a processor in fp32 where it would be in bf16, whichever model asks for it.

    torch's kernel for bf16 is made for long sequences: of few queries it takes up to seven times as long.
    Results come in bf16 as before, rounded once instead of often.
    """
    attention = F.scaled_dot_product_attention

    def chosen(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not is_short_query(query):
            return attention(query, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            out = attention(
                query.float(), *map(cast_to_fp32, args), **{name: cast_to_fp32(one) for name, one in kwargs.items()}
            )
        return out.to(query.dtype)

    # Where torch's own layers look for it too, which a mode of torch's does not reach.
    F.scaled_dot_product_attention = chosen
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


def is_short_query(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[-2] <= MAX_SHORT_QUERIES


def cast_to_fp32(one: Any) -> Any:
    """To fp32, if it is a tensor of numbers."""
    return one.float() if isinstance(one, Tensor) and one.is_floating_point() else one


def choose_short_attention(
    device: torch.device, precision: str, repeated: bool
) -> contextlib.AbstractContextManager[Any]:
    """`attend_few_queries_in_fp32` where it pays: for steps in bf16 on a processor.

    repeated: by a compiler, or by the backward pass with gradient checkpointing; neither knows of it.
    """
    pays = device.type == "cpu" and precision == "bf16" and not repeated and fast_paths.enabled
    return attend_few_queries_in_fp32() if pays else contextlib.nullcontext()
