"""Building blocks that the denoisers share."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]  # each (B, heads, L, width / heads)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width): cosines and sines of geometrically spaced frequencies."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """(B,) timesteps -> (B, out)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.width = width
        self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        embedding = timestep_embedding(t, self.width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


class Attention(nn.Module):
    """Self-attention that may also look at keys and values computed before."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide width {width}, got {heads}")
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """x: (B, L, width); mask: bool, broadcast to (B, heads, L, past + L). Also returns the keys and values of x."""
        query, key, value = split_heads(self.to_qkv(x), 3 * self.heads).chunk(3, dim=1)
        keys, values = (key, value) if past is None else (torch.cat(pair, dim=2) for pair in zip(past, (key, value)))
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2)), (key, value)


def checkpointed(model: Any, block: nn.Module, *inputs: Any) -> Any:
    """`block(*inputs)`; where the model checkpoints gradients, the backward pass computes what is inside once more.

    The switch is diffusers' `model.enable_gradient_checkpointing()`.
    """
    if model.gradient_checkpointing and torch.is_grad_enabled():
        return model._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, width) -> (B, heads, L, width / heads)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
