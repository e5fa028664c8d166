"""A moving average of the weights that training changes (EMA), which is what is saved and drawn with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class EMA:
    """average <- decay * average + (1 - decay) * weights, in the weights' dtype (fp32), sharded as they are.

    Buffers are not averaged: the model's own belong to it. Holds the model's trained parameters; make it after
    `accelerator.prepare`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        # FSDP puts others in their place while it gathers; these, the shards, are what the optimizer holds too.
        self.parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.values = {name: one.detach().clone() for name, one in self.parameters.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        torch._foreach_lerp_(collect_local_tensors(self.values), collect_local_tensors(self.parameters), 1 - decay)

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """The model with the averages as its weights, not in training mode.

        Its own weights come back bit for bit, and so do its buffers, which may be changed meanwhile.
        """
        training, buffers = self.model.training, [(one, one.clone()) for one in self.model.buffers()]
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
        self.reshard()
        for mine, theirs in zip(collect_local_tensors(self.values), collect_local_tensors(self.parameters)):
            held = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(held)

    def reshard(self) -> None:
        """Give up what FSDP has gathered: a forward pass after this one must not see the weights from before."""
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def collect_local_tensors(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The part of each tensor that this process holds: all of it, unless the model is sharded."""
    return [one.to_local() if isinstance(one, DTensor) else one for one in tensors.values()]


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """A whole tensor from its shards, which every process has to ask for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
