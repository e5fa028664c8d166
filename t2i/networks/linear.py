"""Linear layers in fp32 on processors by oneDNN instead of MKL, which torch calls.

MKL keeps its widest instructions for one maker's processors: on AMD's with AVX-512 oneDNN is two to three times as
fast, with results equal to rounding (`docs/explanation/speed.md`). `T2I_FAST_PATHS=0` and
`torch.backends.mkldnn.set_flags(False)` go back to MKL. Tools that look for `torch.nn.Linear` by its exact class, as
torch's dynamic quantisation does, need `layer.__class__ = torch.nn.Linear` before.

Three private names of torch are used; if one is missing, `HAS_ONEDNN` is False and torch multiplies:
`torch.ops.mkldnn._linear_pointwise`, the product, which torch's compiler puts in the place of the same layers;
`torch._C._are_functorch_transforms_active`; and `forward_ad._current_level`, -1 if no forward derivative is computed.
"""

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from t2i.runtime import fast_paths

Model = TypeVar("Model", bound=nn.Module)
MIN_MULTIPLICATIONS = 2**20  # of a product, below which the call itself costs more than oneDNN saves


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by the faster of two libraries."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of x, (..., in), with the weights: (..., out)."""
        if not is_onednn_faster(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        tensors = (x, self.weight, self.bias)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return LinearFunction.apply(*tensors)
        return multiply_by_onednn(*tensors)


class LinearFunction(torch.autograd.Function):
    """`multiply_by_onednn` with gradients, which are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return multiply_by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])  # (rows, out)
        # With create_graph=True this gradient is differentiated again, so torch must record its products.
        multiply = torch.matmul if torch.is_grad_enabled() else lambda a, b: multiply_by_onednn(a, b.t())
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            multiply(grad, weight) if needs_x else None,  # (..., in)
            multiply(grad_rows.t(), x.reshape(-1, x.shape[-1])) if needs_weight else None,  # (out, in)
            grad_rows.sum(dim=0) if needs_bias else None,  # (out,)
        )


def multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias, (..., out), for (..., in), (out, in) and (out,), without gradients."""
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        weight = weight.contiguous()  # with other strides oneDNN takes a thousand times as long
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def is_onednn_faster(x: Tensor, weight: Tensor) -> bool:
    """Return True if oneDNN can multiply by these weights, and the product is large enough to repay a longer call."""
    return (
        not torch.compiler.is_compiling()  # first, for a compiler would guard all that is read below
        and not torch.jit.is_tracing()
        and HAS_ONEDNN
        and fast_paths.enabled
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 1
        and x.shape[-1] == weight.shape[1]  # otherwise torch raises an error that names the shapes
        and x.layout == weight.layout == torch.strided
        and math.prod(x.shape[:-1]) * weight.numel() >= MIN_MULTIPLICATIONS
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and {type(x), type(weight)} <= {Tensor, nn.Parameter}  # quantised and sharded tensors override F.linear
        and not torch._C._are_functorch_transforms_active()  # torch.func has no rule for the operator
        and forward_ad._current_level < 0
    )


def use_onednn_linear(model: Model) -> Model:
    """Turn the linear layers of another library's model into `Linear`, in place; weights and names stay."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
    return model


def is_onednn_available() -> bool:
    """Return True if torch has the private names above, and oneDNN has kernels for this processor."""
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch._C, "_are_functorch_transforms_active")
        and hasattr(forward_ad, "_current_level")
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


# Read once: the answer does not change, and every product needs it.
HAS_ONEDNN = is_onednn_available()
