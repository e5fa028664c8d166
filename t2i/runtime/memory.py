"""How much memory work needs, counted before it is done, and how much there is."""

import copy
import ctypes
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEMORY_MARGIN = (
    2.0  # times what was counted, where the choice is ours: what is freed is not all given back (docs/speed.md)
)
# The last is oneDNN's. What it says of a primitive's descriptor is of shapes and dtypes that it does not compute.
OUT_OF_MEMORY_PATTERN = re.compile(
    r"out of memory|can't allocate memory|not enough memory|bad_alloc|_STATUS_ALLOC_FAILED"
    r"|could not (?:create|execute) a primitive(?! descriptor)",
    re.IGNORECASE,
)


class AvailableMemory(NamedTuple):
    """Bytes of a device, or of a machine as far as this process may use it."""

    free: int
    total: int
    on_device: bool = False

    def __str__(self) -> str:
        return f"{format_bytes(self.free)} of {format_bytes(self.total)} are free{' on the device' * self.on_device}"

    def divide_by_processes(self, processes: int) -> "AvailableMemory":
        """The share of one of so many processes of a machine; a device is a process's own."""
        return self if self.on_device else self._replace(free=self.free // processes)


def release_freed_memory() -> None:
    """Let the C library return to the system what was freed here, which it keeps for later; where it is glibc."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure_available_memory(device: torch.device | str = "cpu") -> AvailableMemory:
    """What there is now: of a GPU, with what torch keeps for itself there; else of the machine, of the container, or
    of this process alone, whichever has least.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return AvailableMemory(
            free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), whole, True
        )
    memory = psutil.virtual_memory()
    free, whole = memory.available, memory.total
    for limit, used in chain(iterate_container_limits(), iterate_process_limits()):
        free, whole = min(free, max(0, limit - used)), min(whole, limit)
    return AvailableMemory(free, whole)


def iterate_container_limits(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[Any]:
    """The limit and what is used of it, of each control group that this process is in; pages of files are given back.

    Both versions of Linux's; in a container the path may be that of the machine, and the limit is at the root.
    """
    names = {
        "": ("memory.max", "memory.current", ""),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    }
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        kind, path = line.split(":", 2)[1:]
        if kind not in names:
            continue
        limit_file, used_file, total = names[kind]
        top = root / kind
        for folder in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            try:
                limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not there, or "max"
                continue
            yield limit, used - sum(int(stat.get(f"{total}{pages}_file", 0)) for pages in ("active", "inactive"))


def iterate_process_limits() -> Iterator[tuple[int, int]]:
    """The limit of this process's addresses (`ulimit -v`), where there is one, and how many it has."""
    with suppress(ImportError):  # Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit, psutil.Process().memory_info().vms


def count_peak_bytes(model: nn.Module, work: Callable[[Any], object]) -> int | None:
    """Bytes of the tensors that `work(model)` holds at once, beside the weights, counted without memory or arithmetic.

    It runs on a copy of the model on the meta device, where attention is taken to be fused, as it is. None where that
    does not run: a model that asks for values, or whose weights move between devices. The system may hold more: what
    was freed and not given back, what kernels need besides.
    """
    try:
        without = copy_to_meta(model)
        with torch.no_grad(), torch.device("meta"), FusedAttention(), MemoryTracker() as alive:
            work(without)
    except Exception:  # whatever a foreign model does there
        return None
    return alive.peak


def copy_to_meta(model: nn.Module) -> nn.Module:
    """A copy whose tensors have no memory, and whose steps are not compiled."""
    if any(hasattr(one, "_hf_hook") for one in model.modules()):
        raise ValueError("its weights move between devices")
    memo: dict[int, Any] = {}
    for one in chain(model.parameters(), model.buffers()):
        without = torch.empty_like(one, device="meta", requires_grad=False)
        memo[id(one)] = nn.Parameter(without, requires_grad=False) if isinstance(one, nn.Parameter) else without
    compiled = vars(model).get("step")
    if compiled is not None:
        memo[id(compiled)] = None
    made = copy.deepcopy(model, memo)
    vars(made).pop("step", None)
    return made


class MemoryTracker(TorchDispatchMode):
    """Counts calls of operators, and the bytes of what they made and is still held: `now`, and `peak` at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.now = self.peak = 0
        self.finalizers: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_leaves((args, kwargs)):
            self.track_storage(one, new=False)  # weights and inputs, of which an operator may return a view
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for one in tree_leaves(result):
            self.track_storage(one, new=True)
        self.peak = max(self.peak, self.now)
        return result

    def track_storage(self, one: Any, new: bool) -> None:
        if not isinstance(one, Tensor):
            return
        packed = one.is_mkldnn  # oneDNN's own order of a convolution's weights has no storage to look at
        held = one if packed else one.untyped_storage()
        if id(held) in self.finalizers:
            return
        size = (one.numel() * one.element_size() if packed else held.nbytes()) if new else 0
        self.now += size
        end = weakref.finalize(held, self.forget_storage, id(held), size)
        end.atexit = False
        self.finalizers[id(held)] = end

    def forget_storage(self, key: int, size: int) -> None:
        self.now -= size
        del self.finalizers[key]


class FusedAttention(TorchFunctionMode):
    """Attention without the table of all pairs."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **(kwargs or {}))


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device, of torch's allocator for processors, of the kernels' (all a RuntimeError), or of Python."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY_PATTERN.search(str(error)) is not None
    )


def format_needed_memory(message: str) -> str:
    """What an allocator says that it was asked for, on top of what it held."""
    found = re.search(r"allocate ([\d.]+ ?(?:bytes|[KMGT]i?B))", message)
    amount = found.group(1) if found else "an unknown amount"
    if amount.endswith("bytes"):
        amount = format_bytes(int(float(amount.split()[0])))
    return f"it needs {amount} more at once"


def format_bytes(count: float) -> str:
    """So many bytes, as said to people."""
    return f"{count / 2**30:.2f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:.2f} MiB"
