"""The exponential moving average (EMA) of the trained weights, which is exported and drawn with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class EMA:
    """Averages of a model's trained weights, in their dtype (fp32), sharded like them; buffers are not averaged.

    An update is average <- decay * average + (1 - decay) * weights. Make it after `accelerator.prepare`, which replaces
    parameters under FSDP.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        # FSDP swaps in gathered parameters during a step; these are the shards, as in the optimizer.
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.values = {name: weight.detach().clone() for name, weight in self.parameters.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        torch._foreach_lerp_(collect_local_tensors(self.values), collect_local_tensors(self.parameters), 1 - decay)

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Give the model the averages as its weights, in eval mode, within this context.

        Afterwards its own weights and its buffers are restored bit for bit, even if they were changed meanwhile.
        """
        training, buffers = self.model.training, [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.swap_weights()
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train(training)
            self.swap_weights()
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    @torch.no_grad()
    def swap_weights(self) -> None:
        # Free the weights that FSDP has gathered, so that the next forward pass gathers the new ones.
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        for average, weight in zip(collect_local_tensors(self.values), collect_local_tensors(self.parameters)):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)


def collect_local_tensors(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return this process's part of each tensor: all of it, unless the model is sharded."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from its shards; all processes must call this at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
