"""Memory that a piece of work needs, counted before it runs, and memory that is available."""

import copy
import ctypes
import logging
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

from t2i.runtime.hooks import list_hooks

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGE_BLOCK = 8 * 2**20
# An automatic batch size leaves room for this many times the count: allocators keep part of what is freed.
MEMORY_MARGIN = 2.0
# The last line is oneDNN's. Its error about a primitive's descriptor means shapes or dtypes that it does not support.
OUT_OF_MEMORY_PATTERN = re.compile(
    r"out of memory|can't allocate memory|not enough memory|bad_alloc|_STATUS_ALLOC_FAILED"
    r"|could not (?:create|execute) a primitive(?! descriptor)",
    re.IGNORECASE,
)


class AvailableMemory(NamedTuple):
    """Bytes of a device, or of the part of a machine that this process may use."""

    free: int
    total: int
    on_device: bool = False

    def __str__(self) -> str:
        place = " on the device" if self.on_device else ""
        return f"{format_bytes(self.free)} of {format_bytes(self.total)} are free{place}"

    def divide_by_processes(self, processes: int) -> "AvailableMemory":
        """Return the part of one process of this machine; a device belongs to one process alone."""
        return self if self.on_device else self._replace(free=self.free // processes)


def release_freed_memory() -> None:
    """Return freed memory to the system; only glibc keeps it and can be told to."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_large_memory() -> None:
    """Let freed blocks of 8 MiB or more go back to the system at once; for programs that run long.

    glibc learns from the first that is freed to keep blocks of up to 32 MiB, in each thread. Others have no such call.
    """
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        # Set together, or smaller blocks would go back too, which takes longer than what is computed in them
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGE_BLOCK)


def measure_available_memory(device: torch.device | str = "cpu") -> AvailableMemory:
    """Return the memory that is available now.

    On a GPU torch's unused cache counts as free. On a CPU the limit of machine, container or process counts that leaves
    the least.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return AvailableMemory(free + unused, total, on_device=True)
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    # A container may report the memory of the whole machine, so its own limits count too
    for limit, used in chain(iterate_container_limits(), iterate_process_limits()):
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return AvailableMemory(free, total)


def iterate_container_limits(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[int, int]]:
    """Yield the limit and the used bytes of each control group (version 1 or 2) that this process is in."""
    names = {
        "": ("memory.max", "memory.current", ""),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    }
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        kind, path = line.split(":", 2)[1:]
        if kind not in names:
            continue
        limit_name, used_name, prefix = names[kind]
        # In a container the path may be the machine's; the parents end at the root, where the limit is then.
        group = root / kind / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such file, or "max"
                continue
            # The system drops cached pages of files when memory is short.
            yield limit, used - sum(int(stat.get(f"{prefix}{pages}_file", 0)) for pages in ("active", "inactive"))


def iterate_process_limits() -> Iterator[tuple[int, int]]:
    """Yield the limit of this process's address space (`ulimit -v`) and its size, if there is a limit."""
    with suppress(ImportError):  # Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit, psutil.Process().memory_info().vms


def count_peak_bytes(model: nn.Module, work: Callable[[Any], object]) -> int | None:
    """Return the most bytes of tensors that `work(model)` holds at once, without the weights.

    The work runs on a copy of the model on the meta device: no memory, no arithmetic, attention fused as on a real
    device. The system may need more: memory that is freed but kept, and space inside of kernels. Returns None if the
    work does not run there: the model reads values of tensors, or its weights move between devices.
    """
    try:
        copied = copy_to_meta(model)
        with torch.no_grad(), torch.device("meta"), FusedAttention(), MemoryTracker() as tracker:
            work(copied)
    except Exception:  # a model from elsewhere may raise anything
        return None
    return tracker.peak


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Return a copy whose tensors are on the meta device, and whose methods are those of its class.

    Raises ValueError if the weights move between devices.
    """
    if any(list_hooks(module) for module in model.modules()):
        raise ValueError("its weights move between devices")
    # deepcopy takes what its memo holds for an object instead of a copy: so no weights are copied.
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    # A compiled step, or what a server puts in its place, is an attribute of the instance, which hides the class's own.
    hiding = [name for name in ("prepare", "step") if name in vars(model)]
    memo |= {id(vars(model)[name]): None for name in hiding}
    copied = copy.deepcopy(model, memo)
    for name in hiding:
        del vars(copied)[name]
    return copied


class MemoryTracker(TorchDispatchMode):
    """Counter of the bytes of tensors that operators allocate: those alive `now`, and the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.finalizers: dict[int, weakref.finalize] = {}  # by id of the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Weights and inputs cost nothing, and neither does a view of them: their storage is known before the call.
        self.track_tensors((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self.track_tensors(result, new=True)
        self.peak = max(self.peak, self.now)
        return result

    def track_tensors(self, tree: Any, new: bool) -> None:
        """Count the tensors whose storage is unknown until now. new: they were allocated by an operator."""
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, Tensor):
                continue
            # Weights in oneDNN's own order have no storage, so the tensor stands for it.
            packed = tensor.is_mkldnn
            storage = tensor if packed else tensor.untyped_storage()
            if id(storage) in self.finalizers:
                continue
            size = 0
            if new:
                size = tensor.numel() * tensor.element_size() if packed else storage.nbytes()
            self.now += size
            finalizer = weakref.finalize(storage, self.forget_storage, id(storage), size)
            finalizer.atexit = False  # at exit there is nothing to count
            self.finalizers[id(storage)] = finalizer

    def forget_storage(self, key: int, size: int) -> None:
        self.now -= size
        del self.finalizers[key]


class FusedAttention(TorchFunctionMode):
    """A mode in which attention allocates its result alone: on the meta device torch would allocate all scores."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **(kwargs or {}))


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if a device, torch's allocator, a kernel (all a RuntimeError) or Python ran out of memory."""
    if isinstance(error, RuntimeError):
        return OUT_OF_MEMORY_PATTERN.search(str(error)) is not None
    return isinstance(error, MemoryError)


def run_in_halves(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Return what a function makes of rows, of each by itself; where memory is short, of half of them at a time.

    rows: the function's arguments, tensors of equally many rows. Raises what the function raises, also if memory does
    not suffice for one row.
    """
    try:
        return function(*rows)
    except (RuntimeError, MemoryError) as error:
        if len(rows[0]) < 2 or not is_out_of_memory(error):
            raise
        logger.warning("%d images do not fit into memory at once: %s", len(rows[0]), error)
    # Here the error, which keeps what the function allocated, is gone
    release_freed_memory()
    return torch.cat([run_in_halves(function, *parts) for parts in zip(*(part.chunk(2) for part in rows))])


def format_needed_memory(message: str) -> str:
    """Return the amount in an allocator's error message, as a clause for a message of ours."""
    match = re.search(r"allocate ([\d.]+ ?(?:bytes|[KMGT]i?B))", message)
    amount = match.group(1) if match else "an unknown amount"
    if amount.endswith("bytes"):
        amount = format_bytes(int(float(amount.split()[0])))
    return f"it needs {amount} more at once"


def format_bytes(count: float) -> str:
    """Return a number of bytes in GiB, or in MiB below 0.1 GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:.2f} MiB"
