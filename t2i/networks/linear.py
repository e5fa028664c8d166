"""Linear layers in fp32 on processors by oneDNN instead of MKL, which torch calls.

MKL keeps its widest instructions for one maker's processors: on AMD's with AVX-512 oneDNN is two to three times as
fast, forward and backward, with results equal to rounding (`docs/speed.md`). It reads weights where they are.
`torch.backends.mkldnn.set_flags(False)` goes back to MKL. Tools that look for `torch.nn.Linear` by its exact class, as
torch's dynamic quantisation does, need `layer.__class__ = torch.nn.Linear` before.
"""

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

Model = TypeVar("Model", bound=nn.Module)
MIN_MULTIPLICATIONS = 2**20  # multiplications, below which what a call costs is most of it


class Linear(nn.Linear):
    """`torch.nn.Linear`, by the faster of two libraries."""

    def forward(self, x: Tensor) -> Tensor:
        given = (x, self.weight, self.bias)
        if not is_onednn_faster(x, self.weight):
            return F.linear(*given)
        if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given):
            return LinearFunction.apply(*given)
        return multiply_by_onednn(*given)


class LinearFunction(torch.autograd.Function):
    """`multiply_by_onednn` with gradients: both are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return multiply_by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        # A gradient that is differentiated again is made of what torch differentiates.
        times = torch.matmul if torch.is_grad_enabled() else lambda a, b: multiply_by_onednn(a, b.t())
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            times(grad, weight) if of_x else None,
            times(rows.t(), x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., K), (N, K), (N,) -> (..., N), without gradients, by oneDNN."""
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        weight = weight.contiguous()  # or it takes a thousand times as long
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def is_onednn_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies by these weights, and is worth a longer call."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler would guard what is asked
        and not torch.jit.is_tracing()
        and HAS_ONEDNN
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 1
        and x.shape[-1] == weight.shape[1]  # torch says best what is wrong
        and x.layout == weight.layout == torch.strided
        and math.prod(x.shape[:-1]) * weight.numel() >= MIN_MULTIPLICATIONS
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and {type(x), type(weight)} <= {Tensor, nn.Parameter}  # what is quantised or sharded knows F.linear
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def use_onednn_linear(model: Model) -> Model:
    """A foreign model whose linear layers are made `Linear`, in place; weights and names stay."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
    return model


def is_onednn_available() -> bool:
    """Whether torch was built with oneDNN, for a processor that its kernels are written for."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


HAS_ONEDNN = is_onednn_available()
