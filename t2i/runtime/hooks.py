"""Hooks of accelerate and diffusers, which put a module's weights in place for the time of a call.

Offloading and layerwise casting replace `forward`: they bring or convert the weights before it, and take them away
after it. Weights that are used without that call are missing, on the wrong device or of the wrong dtype. So a method
that works as `forward` does is decorated with `run_like_forward`, and weights that are read without a call of their
module are read within `borrow_weights`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module

Method = TypeVar("Method", bound=Callable[..., Any])
IN_PLACE = "weights_are_in_place"  # attribute of a module while its hooks have run for a call that is not over


def run_like_forward(method: Method) -> Method:
    """Run the module's hooks around a method, as around `forward`: they also move its arguments and result.

    A `forward` that calls such methods of its own module is decorated too, so that they find the weights in place.
    """
    is_forward = method.__name__ == "forward"

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the method between the hooks' first and last parts, unless an outer call has run these already."""
        state = self.__dict__
        if "forward" not in state or IN_PLACE in state:  # hooks hide the class's `forward`; without any, this is all
            return method(self, *args, **kwargs)
        # A method of the model that calls another must not move its weights twice
        hooks = [] if is_forward else list_hooks(self)
        state[IN_PLACE] = True
        try:
            for hook in hooks:
                args, kwargs = hook.pre_forward(self, *args, **kwargs)
            output = method(self, *args, **kwargs)
            for hook in reversed(hooks):
                output = hook.post_forward(self, output)
            return output
        finally:
            del state[IN_PLACE]

    return run  # type: ignore[return-value]


@contextmanager
def borrow_weights(*modules: Module) -> Iterator[None]:
    """Put the weights of modules in place inside the block, without those of their submodules."""
    borrowed = [(module, hook) for module in modules for hook in list_hooks(module)]
    for module, hook in borrowed:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in reversed(borrowed):
            hook.post_forward(module, None)


def keep_used_weights() -> saved_tensors_hooks:
    """Return a context in which the graph of a gradient keeps the weights that it used.

    Group offloading exchanges the memory of a weight behind the graph's back, before the gradient is computed.
    """
    return saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)


def list_hooks(module: Module) -> list[Any]:
    """Return a module's hooks, the outermost first."""
    state = module.__dict__
    if "forward" not in state:
        return []
    registry, hook = state.get("_diffusers_hook"), state.get("_hf_hook")
    hooks = [] if registry is None else list(reversed(registry.hooks.values()))
    return hooks if hook is None else [*hooks, hook]


def find_compute_device(model: Any) -> torch.device:
    """Return the device that a model computes on, also while its weights are elsewhere."""
    device: torch.device = model.device  # under group offloading, that of the hooks
    if device.type != "meta":
        return device
    for module in model.modules():
        for hook in list_hooks(module):
            for part in getattr(hook, "hooks", [hook]):
                if getattr(part, "execution_device", None) is not None:
                    return torch.device(part.execution_device)
    return device


def get_compute_dtype(layer: Any) -> torch.dtype:
    """Return the dtype that a layer computes in, also while its weights are stored in another."""
    registry = layer.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook("layerwise_casting")
    return layer.weight.dtype if hook is None else hook.compute_dtype
