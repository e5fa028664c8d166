"""Methods that run like `forward`: once between the hooks, whoever calls whom; a model without hooks is as before."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from torch import Tensor, nn

from t2i.runtime.hooks import borrow_weights, keep_used_weights, list_hooks, run_like_forward


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    @run_like_forward
    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x)

    @run_like_forward
    def outer(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.weight

    @run_like_forward
    def inner(self, x: Tensor) -> Tensor:
        if x.isnan():
            raise ValueError("not a number")
        return x * self.weight


class Noted:
    """Adds one to the argument and ten to the result, and writes down its turns."""

    def __init__(self, name: str, turns: list[str]):
        super().__init__()
        self.name, self.turns = name, turns

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.turns.append(f"before {self.name}")
        return tuple(arg + 1 for arg in args), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.turns.append(f"after {self.name}")
        return output if output is None else output + 10


class Accelerates(Noted, ModelHook):
    pass


class Diffusers(Noted, DiffusersHook):
    pass


@pytest.mark.parametrize("method", ["__call__", "outer", "inner"])
@pytest.mark.parametrize("library", ["accelerate", "diffusers"])
def test_hooks_run_once_around_a_call_as_around_forward(library: str, method: str) -> None:
    model, turns = Model(), []
    if library == "accelerate":
        add_hook_to_module(model, SequentialHook(Accelerates("a", turns)))
    else:
        HookRegistry.check_if_exists_or_initialize(model).register_hook(Diffusers("a", turns), "a")
    for _ in range(2):
        turns.clear()
        assert getattr(model, method)(torch.tensor(1.0)) == 12
        assert turns == ["before a", "after a"]
    with pytest.raises(ValueError, match="not a number"):
        getattr(model, method)(torch.tensor(torch.nan))
    assert getattr(model, method)(torch.tensor(1.0)) == 12  # nothing is left of the error


def test_hooks_of_diffusers_run_in_its_own_order() -> None:
    model, turns = Model(), []
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for name in ("first", "last"):
        registry.register_hook(Diffusers(name, turns), name)
    model(torch.tensor(1.0))
    expected = list(turns)
    turns.clear()
    model.inner(torch.tensor(1.0))
    assert turns == expected == ["before last", "before first", "after first", "after last"]
    turns.clear()
    with borrow_weights(model):
        assert turns == expected[:2]
    assert turns == expected


def test_a_model_without_hooks_is_as_before() -> None:
    model, turns = Model(), []
    before = set(vars(model))
    add_hook_to_module(model, Accelerates("a", turns))
    remove_hook_from_module(model)
    vars(model).pop("forward")  # accelerate puts the method of the class there
    assert model(torch.tensor(1.0)) == model.inner(torch.tensor(1.0)) == 1 and not turns
    assert set(vars(model)) == before and not list_hooks(model)


def test_a_gradient_keeps_the_weights_that_it_used() -> None:
    x, weight = torch.tensor(3.0, requires_grad=True), nn.Parameter(torch.tensor(2.0), requires_grad=False)
    with keep_used_weights():
        product = x * weight
    weight.data = torch.tensor(torch.nan)
    product.backward()
    assert x.grad == 2
