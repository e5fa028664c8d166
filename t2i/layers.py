"""Building blocks that the denoisers share."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]  # each (B, heads, L, width / heads)
FEW = 4  # queries, for which copying keys and values takes longer than looking at them


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

    def forward(
        self, x: Tensor, mask: Tensor | None = None, past: Sequence[KeyValue] = (), last: bool = False
    ) -> tuple[Tensor, KeyValue]:
        """x: (B, L, width); mask: bool, broadcast to (B, heads, L, past + L). Also returns the keys and values of x.

        past: one behind the other. last: only the last of x asks, (B, 1, width) comes out.
        """
        query, key, value = split_heads(self.to_qkv(x), 3 * self.heads).chunk(3, dim=1)
        if last:
            query, mask = query[:, :, -1:], None if mask is None else mask[..., -1:, :]
        out = attend(query, [*past, (key, value)], mask)
        return self.to_out(out.transpose(1, 2).flatten(2)), (key, value)


def attend(query: Tensor, pairs: Sequence[KeyValue], mask: Tensor | None) -> Tensor:
    """Attention to all the keys and values, as if they stood one behind the other in one tensor."""
    few = query.shape[2] <= FEW and query.device.type == "cpu" and query.dtype == torch.float32
    if len(pairs) == 1 or not few:
        keys, values = pairs[0] if len(pairs) == 1 else (torch.cat(parts, dim=2) for parts in zip(*pairs))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    query = query * query.shape[-1] ** -0.5
    scores = torch.cat([query @ keys.transpose(-1, -2) for keys, _ in pairs], dim=-1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1).split([keys.shape[2] for keys, _ in pairs], dim=-1)
    out = weights[0] @ pairs[0][1]
    for weight, (_, values) in zip(weights[1:], pairs[1:]):
        out = out + weight @ values
    return out


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
