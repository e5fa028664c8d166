"""Ways to save memory where the CPU is the device, and what shows that weights wait elsewhere and work is cut.

Weights that wait are on the meta device or on the disk, and what they leave in memory is NaN, so that a weight that is
read while it waits cannot give the right result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

from tests.helpers.models import list_float_tensors

CPU = torch.device("cpu")
WAITING = "weights_that_wait"  # attribute of a model that is offloaded as a whole


@pytest.fixture
def waiting_weights_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group offloading leaves memory as it was, and offloading to memory does nothing where the device is the CPU."""
    to_disk = ModuleGroup._offload_to_disk
    saved: dict[int, Tensor] = {}

    def list_tensors(group: ModuleGroup) -> Iterator[Tensor]:
        for module in group.modules:
            yield from (*module.parameters(), *module.buffers())
        yield from (*group.parameters, *group.buffers)

    def offload_to_disk(group: ModuleGroup) -> None:
        to_disk(group)
        clear(list_tensors(group))

    def offload_to_memory(group: ModuleGroup) -> None:
        if id(group) not in saved:  # else it waits already
            saved[id(group)] = {id(tensor): tensor.data for tensor in list_tensors(group)}  # type: ignore[assignment]
            clear(list_tensors(group))

    def onload_from_memory(group: ModuleGroup) -> None:
        kept: Any = saved.pop(id(group), {})
        for tensor in list_tensors(group):
            tensor.data = kept.get(id(tensor), tensor.data)

    def offload_model(hook: CpuOffload, model: nn.Module) -> nn.Module:
        if WAITING not in model.__dict__:
            tensors = [*model.parameters(), *model.buffers()]
            model.__dict__[WAITING] = [(tensor, tensor.data) for tensor in tensors]
            clear(tensors)
        return model

    def onload_model(hook: CpuOffload, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if hook.prev_module_hook is not None:
            hook.prev_module_hook.offload()
        for tensor, data in model.__dict__.pop(WAITING, []):
            tensor.data = data
        return args, kwargs

    monkeypatch.setattr(ModuleGroup, "_offload_to_disk", offload_to_disk)
    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", offload_to_memory)
    monkeypatch.setattr(ModuleGroup, "_onload_from_memory", onload_from_memory)
    monkeypatch.setattr(CpuOffload, "init_hook", offload_model)
    monkeypatch.setattr(CpuOffload, "pre_forward", onload_model)


def clear(tensors: Iterator[Tensor] | list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = torch.full_like(tensor.data.float(), torch.nan).to(tensor.dtype)


def measure_waiting_parts(pipeline: Any) -> dict[str, float]:
    """Return, for each component with weights, which part of their values waits elsewhere."""
    parts = {}
    for name, model in pipeline.components.items():
        tensors = list_float_tensors(model).values() if isinstance(model, nn.Module) else []
        if sizes := [(tensor.numel(), tensor.is_meta or bool(tensor.isnan().all())) for tensor in tensors]:
            parts[name] = sum(size for size, waits in sizes if waits) / sum(size for size, _ in sizes)
    return parts


@contextmanager
def record_inputs(network: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Give the shapes of what a network is called with."""
    seen: list[tuple[int, ...]] = []
    handle = network.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    yield seen
    handle.remove()


# Ways


def offload_in_sequence(pipeline: Any, folder: Path) -> None:
    pipeline.enable_sequential_cpu_offload(device="cpu")


def offload_models(pipeline: Any, folder: Path) -> None:
    pipeline.enable_model_cpu_offload(device="cpu")


def offload_blocks(pipeline: Any, folder: Path) -> None:
    pipeline.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)


def offload_leaves(pipeline: Any, folder: Path) -> None:
    pipeline.enable_group_offload(CPU, offload_type="leaf_level")


def offload_blocks_to_disk(pipeline: Any, folder: Path) -> None:
    settings = {"offload_type": "block_level", "num_blocks_per_group": 2}
    pipeline.enable_group_offload(CPU, offload_to_disk_path=str(folder), **settings)


def offload_leaves_to_disk(pipeline: Any, folder: Path) -> None:
    pipeline.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


WAYS: list[Callable[[Any, Path], None]] = [
    *(offload_in_sequence, offload_models, offload_blocks, offload_leaves),
    *(offload_blocks_to_disk, offload_leaves_to_disk),
]
