"""Building blocks that the denoisers share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.networks.linear import Linear

KeyValue = tuple[Tensor, Tensor]  # each (B, heads, L, width / heads)
FEW_QUERIES = 4  # queries, for which copying keys and values takes longer than looking at them
SIZES_PER_DOUBLING = 32  # of matrices of rows, between a number and its double


def embed_timesteps(t: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width): cosines and sines of geometrically spaced frequencies."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """(B,) timesteps -> (B, out)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.width = width
        self.linear_1, self.linear_2 = Linear(width, out), Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        embedding = embed_timesteps(t, self.width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


@dataclass
class PackedSequences:
    """Sequences of different lengths as the rows of one matrix, (T, width), one after the other.

    Linear layers run on it as it is, so that padding costs nothing; attention pads it to (B, L), real tokens first:
    then no token that is causally masked sees padding, and no other mask is needed.

    T is rounded up by rows that nobody reads: a library makes and keeps code for each size that it meets.
    """

    lengths: Tensor  # (B,)
    length: int  # L
    last_rows: Tensor  # (B,): the row of each sequence's last token
    padded_positions: (
        Tensor | None
    )  # (T,): where a row stands in the padded batch, flattened; None if T = B L: it is padded

    @classmethod
    def from_token_mask(cls, known: Tensor) -> tuple["PackedSequences", Tensor]:
        """known: (B, L), bool, what is no padding. Also returns which tokens of the flattened batch the rows are."""
        count, length = known.shape
        lengths, start = known.sum(dim=1), torch.arange(count, device=known.device)[:, None] * length
        if known.device.type != "cpu" or torch.compiler.is_compiling():  # the host must not wait for T; static shapes
            order = known.int().argsort(dim=1, descending=True, stable=True)
            return cls(lengths, length, start[:, 0] + lengths - 1, None), (order + start).flatten()
        order, ends = known.flatten().nonzero()[:, 0], lengths.cumsum(dim=0) - 1
        longest = int(lengths.max())
        if len(order) == count * longest:
            return cls(lengths, longest, ends, None), order
        places = (known.cumsum(dim=1) - 1 + start // length * longest)[known]
        free = (torch.arange(longest) >= lengths[:, None]).flatten().nonzero()[: count_padding_rows(len(order)), 0]
        return cls(lengths, longest, ends, torch.cat([places, free])), torch.cat([order, torch.zeros_like(free)])

    def pad_to_batch(self, x: Tensor) -> Tensor:
        """(T, width) -> (B, L, width)"""
        count = len(self.lengths)
        if self.padded_positions is not None:
            x = x.new_zeros(count * self.length, x.shape[1]).index_copy_(0, self.padded_positions, x)
        return x.view(count, self.length, -1)

    def unpad_to_rows(self, x: Tensor) -> Tensor:
        """The reverse."""
        x = x.flatten(0, 1)
        return x if self.padded_positions is None else x.index_select(0, self.padded_positions)


def count_padding_rows(rows: int) -> int:
    """How many more make one of a few sizes: at most one in `SIZES_PER_DOUBLING`."""
    step = max(1, 2 ** (rows.bit_length() - 1) // SIZES_PER_DOUBLING)
    return -rows % step


class Attention(nn.Module):
    """Self-attention that may also look at keys and values computed before."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide width {width}, got {heads}")
        self.heads = heads
        self.to_qkv = Linear(width, 3 * width)
        self.to_out = Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, past: Sequence[KeyValue] = (), last: bool = False
    ) -> tuple[Tensor, KeyValue]:
        """x: (B, L, width); mask: bool, broadcast to (B, heads, L, past + L). Also returns the keys and values of x.

        past: one behind the other. last: only the last of x asks, (B, 1, width) comes out.
        """
        query, key, value = split_attention_heads(self.to_qkv(x), 3 * self.heads).chunk(3, dim=1)
        if last:
            query, mask = query[:, :, -1:], None if mask is None else mask[..., -1:, :]
        out = attend_key_values(query, [*past, (key, value)], mask)
        return self.to_out(out.transpose(1, 2).flatten(2)), (key, value)

    def attend_all_tokens(self, x: Tensor, rows: PackedSequences) -> Tensor:
        """(T, width) -> (T, width): every token looks at those of its sequence before it and at itself."""
        query, key, value = split_projections(rows.pad_to_batch(self.to_qkv(x)), 3, self.heads)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.to_out(rows.unpad_to_rows(out.transpose(1, 2).flatten(2)))

    def attend_last_tokens(self, x: Tensor, rows: PackedSequences) -> Tensor:
        """(T, width) -> (B, width): the same for the last token of each sequence alone, which sees all of it."""
        width = x.shape[1]
        qkv = self.to_qkv(x)
        query = split_attention_heads(qkv[rows.last_rows, None, :width], self.heads)
        key, value = split_projections(rows.pad_to_batch(qkv[:, width:]), 2, self.heads)
        mask = torch.arange(rows.length, device=x.device) < rows.lengths[:, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.to_out(out.flatten(1))


def attend_key_values(query: Tensor, pairs: Sequence[KeyValue], mask: Tensor | None) -> Tensor:
    """Attention to all the keys and values, as if they stood one behind the other in one tensor."""
    few = query.shape[2] <= FEW_QUERIES and query.device.type == "cpu" and query.dtype == torch.float32
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


def run_checkpointed_block(model: Any, block: nn.Module, *inputs: Any) -> Any:
    """`block(*inputs)`; where the model checkpoints gradients, the backward pass computes what is inside once more.

    The switch is diffusers' `model.enable_gradient_checkpointing()`.
    """
    if model.gradient_checkpointing and torch.is_grad_enabled():
        return model._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def split_attention_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, width) -> (B, heads, L, width / heads)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def split_projections(x: Tensor, kinds: int, heads: int) -> list[Tensor]:
    """(B, L, kinds * width) -> of each kind (B, heads, L, width / heads); the way back takes one copy, not two."""
    return [part.transpose(1, 2) for part in x.unflatten(-1, (kinds, heads, -1)).unbind(2)]


def build_feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))
