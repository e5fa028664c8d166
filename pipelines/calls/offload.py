"""Offloading of a pipeline's components: to a disk, and by pipelines that share them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from torch.nn import Module

# The devices of pipelines, by id, for the time of a call
DEVICES: ContextVar[dict[int, torch.device] | None] = ContextVar("DEVICES", default=None)


@contextmanager
def remember_devices() -> Iterator[None]:
    """Look for the hooks that tell a pipeline's device once inside the block, which does not change them.

    diffusers searches all modules of all components each time, which takes as long as a step of a small model.
    """
    token = DEVICES.set({})
    try:
        yield
    finally:
        DEVICES.reset(token)


def has_hooks(model: Module) -> bool:
    """Return True if a module or one inside it has hooks of accelerate or diffusers."""
    modules = [model]
    # `Module.modules` takes five times as long
    while modules:
        module = modules.pop()
        if "_diffusers_hook" in module.__dict__ or "_hf_hook" in module.__dict__:
            return True
        modules += [part for part in module._modules.values() if part is not None]
    return False


class DiskOffloading(DiffusionPipeline):
    """A pipeline whose components are offloaded to folders of their own, and by all pipelines that share them."""

    @property
    def _execution_device(self) -> torch.device:
        """Device that the components compute on."""
        known = DEVICES.get()
        if known is None:
            return self.find_execution_device()
        if id(self) not in known:
            known[id(self)] = self.find_execution_device()
        return known[id(self)]

    def find_execution_device(self) -> torch.device:
        """Return the device that the components compute on: that of hooks, or where the weights are, not on a CPU."""
        models = [part for part in self.components.values() if isinstance(part, Module)]
        if not models or any(map(has_hooks, models)):
            return super()._execution_device
        devices = [next(chain(model.parameters(), model.buffers())).device for model in models]
        return next((device for device in devices if device.type not in ("cpu", "meta")), devices[0])

    def enable_group_offload(
        self,
        onload_device: Any,
        *args: Any,
        offload_to_disk_path: str | None = None,
        exclude_modules: Any = None,
        **kwargs: Any,
    ) -> None:
        """Offload groups of layers, as diffusers does; on a disk each component has a new folder of its own.

        diffusers names the files by the layers alone, and loads those that are there: another component's.
        """
        if offload_to_disk_path is None:
            return super().enable_group_offload(onload_device, *args, exclude_modules=exclude_modules, **kwargs)
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        models = {name: part for name, part in self.components.items() if isinstance(part, Module)}
        Path(offload_to_disk_path).mkdir(parents=True, exist_ok=True)
        for name, model in models.items():
            if name in excluded:
                model.to(onload_device)
                continue
            folder = mkdtemp(prefix=f"{name}-", dir=offload_to_disk_path)
            finalize(model, rmtree, folder, ignore_errors=True)  # other pipelines may share the model
            model.enable_group_offload(onload_device, *args, offload_to_disk_path=folder, **kwargs)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Offload each layer, as diffusers does; the CPU may be the device, of which diffusers makes "cpu:0".

        accelerate, which places the weights, knows no such device.
        """
        if device is None or torch.device(device).type != "cpu":
            return super().enable_sequential_cpu_offload(gpu_id, device)
        self._maybe_raise_error_if_group_offload_active(raise_error=True)
        self.remove_all_hooks()
        self._offload_device = torch.device("cpu")
        self.to("cpu")
        for model in self.components.values():
            if isinstance(model, Module):
                cpu_offload(model, self._offload_device, offload_buffers=len(model._parameters) > 0)

    def adopt_settings(self, pipeline: DiffusionPipeline) -> None:
        """Show progress as another pipeline does, and offload models as it does, whose components these are."""
        self.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        if getattr(pipeline, "_all_hooks", None):  # else this one would leave on the device what it used
            self.enable_model_cpu_offload(device=pipeline._offload_device)
