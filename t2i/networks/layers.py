"""Building blocks that the denoisers share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.networks.linear import Linear
from t2i.runtime.hooks import get_compute_dtype

KeyValue = tuple[Tensor, Tensor]  # each (B, heads, L, width / heads)
MAX_FEW_QUERIES = 4  # queries, for which copying keys and values takes longer than attending to them
SIZES_PER_DOUBLING = 32  # sizes of packed matrices between a number of rows and its double


def embed_timesteps(t: Tensor, width: int) -> Tensor:
    """Return cosines and sines, (B, width), fp32, of timesteps (B,) at frequencies spaced from 1 to nearly 1/10,000."""
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
        embedding = embed_timesteps(t, self.width).to(get_compute_dtype(self.linear_1))
        return self.linear_2(F.silu(self.linear_1(embedding)))


@dataclass
class PackedSequences:
    """The layout of B sequences of different lengths as rows of one matrix, (T, width), one after the other.

    Linear layers run on the rows as they are, so padding costs nothing. Attention pads them to (B, L), real tokens
    first: then no causally masked token sees padding, and no other mask is needed.
    """

    mask: Tensor  # (B, L), bool: where the padded batch has real tokens
    last_rows: Tensor  # (B,): the row of each sequence's last token
    padded_positions: Tensor | None  # (T,): the position of each row in the flattened padded batch; None if equal

    @classmethod
    def from_token_mask(cls, token_mask: Tensor) -> tuple["PackedSequences", Tensor]:
        """Return the layout, and the positions in the flattened batch that become its rows, (T,).

        token_mask: (B, L), bool, False for padding, which may be anywhere.
        """
        count, length = token_mask.shape
        lengths = token_mask.sum(dim=1)
        if token_mask.device.type != "cpu" or torch.compiler.is_compiling():
            # T depends on values: a host would wait for them, and a compiler needs static shapes. So padding stays,
            # moved behind the real tokens.
            order = token_mask.int().argsort(dim=1, descending=True, stable=True)
            starts = torch.arange(count, device=token_mask.device) * length
            packed_mask = torch.arange(length, device=token_mask.device) < lengths[:, None]
            return cls(packed_mask, starts + lengths - 1, None), (order + starts[:, None]).flatten()

        tokens = token_mask.flatten().nonzero()[:, 0]  # (T,)
        packed_mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, longest)
        last_rows = lengths.cumsum(dim=0) - 1
        if len(tokens) == packed_mask.numel():
            return cls(packed_mask, last_rows, None), tokens
        # Both masks have their real tokens in the same order, sequence by sequence, so these positions match the rows.
        positions = packed_mask.flatten().nonzero()[:, 0]
        # oneDNN compiles and keeps code for each size of a matrix, so T is rounded up to one of a few sizes by rows
        # that stand where the padded batch has padding. Their values do not matter; token 0 is as good as any.
        extra = (~packed_mask).flatten().nonzero()[: count_padding_rows(len(tokens)), 0]
        tokens = torch.cat([tokens, torch.zeros_like(extra)])
        return cls(packed_mask, last_rows, torch.cat([positions, extra])), tokens

    def pad_to_batch(self, x: Tensor) -> Tensor:
        """Pad packed rows, (T, width), to (B, L, width)."""
        if self.padded_positions is not None:
            x = x.new_zeros(self.mask.numel(), x.shape[1]).index_copy_(0, self.padded_positions, x)
        return x.view(*self.mask.shape, -1)

    def unpad_to_rows(self, x: Tensor) -> Tensor:
        """Pack (B, L, width) into rows without padding, (T, width)."""
        x = x.flatten(0, 1)
        return x if self.padded_positions is None else x.index_select(0, self.padded_positions)


def count_padding_rows(rows: int) -> int:
    """Return the number of rows that round `rows` up to a multiple of 1/32 of the largest power of two below it."""
    step = max(1, 2 ** (rows.bit_length() - 1) // SIZES_PER_DOUBLING)
    return -rows % step


class Attention(nn.Module):
    """Self-attention that may also attend to keys and values computed before."""

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
        """Return the output, (B, L, width), and the keys and values of x, (B, L, width).

        mask: bool, broadcast to (B, heads, L, past + L), True where a token is attended to. past: keys and values
        before those of x, in order. last: compute the output of the last token alone, (B, 1, width).
        """
        query, key, value = split_attention_heads(self.to_qkv(x), 3 * self.heads).chunk(3, dim=1)
        if last:
            query, mask = query[:, :, -1:], None if mask is None else mask[..., -1:, :]
        out = attend_key_values(query, [*past, (key, value)], mask)
        return self.to_out(out.transpose(1, 2).flatten(2)), (key, value)

    def attend_all_tokens(self, x: Tensor, packed: PackedSequences) -> Tensor:
        """Let every token attend to itself and to those of its sequence before it: (T, width), like the input."""
        # torch allows no mask beside `is_causal`, and packed sequences need none.
        query, key, value = split_projections(packed.pad_to_batch(self.to_qkv(x)), 3, self.heads)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.to_out(packed.unpad_to_rows(out.transpose(1, 2).flatten(2)))

    def attend_last_tokens(self, x: Tensor, packed: PackedSequences) -> Tensor:
        """Let the last token of each sequence attend to all of its sequence: (B, width), of tokens (T, width)."""
        width = x.shape[1]
        qkv = self.to_qkv(x)  # (T, 3 * width)
        query = split_attention_heads(qkv[packed.last_rows, None, :width], self.heads)
        key, value = split_projections(packed.pad_to_batch(qkv[:, width:]), 2, self.heads)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=packed.mask[:, None, None])
        return self.to_out(out.flatten(1))  # (B, heads, 1, width / heads) -> (B, width)


def attend_key_values(query: Tensor, pairs: Sequence[KeyValue], mask: Tensor | None) -> Tensor:
    """Attend to all the keys and values as if each stood in one tensor; mask: bool, as of `Attention`."""
    few = query.shape[2] <= MAX_FEW_QUERIES and query.device.type == "cpu" and query.dtype == torch.float32
    if len(pairs) == 1 or not few:
        keys, values = pairs[0] if len(pairs) == 1 else (torch.cat(parts, dim=2) for parts in zip(*pairs))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    # softmax(q k^T / sqrt(d)) v, pair by pair: the scores of few queries are smaller than copies of keys and values.
    query = query * query.shape[-1] ** -0.5
    scores = torch.cat([query @ keys.transpose(-1, -2) for keys, _ in pairs], dim=-1)  # (B, heads, queries, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1).split([keys.shape[2] for keys, _ in pairs], dim=-1)
    out = weights[0] @ pairs[0][1]
    for weight, (_, values) in zip(weights[1:], pairs[1:]):
        out = out + weight @ values
    return out


def run_checkpointed_block(model: Any, block: nn.Module, *inputs: Any) -> Any:
    """Return `block(*inputs)`; after diffusers' `model.enable_gradient_checkpointing()`, the backward pass computes the
    block once more."""
    if model.gradient_checkpointing and torch.is_grad_enabled():
        return model._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def split_attention_heads(x: Tensor, heads: int) -> Tensor:
    """Split (B, L, width) into heads, (B, heads, L, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def split_projections(x: Tensor, kinds: int, heads: int) -> list[Tensor]:
    """Split (B, L, kinds * width) into (B, heads, L, width / heads) for each kind; backward with one copy, not two."""
    return [part.transpose(1, 2) for part in x.unflatten(-1, (kinds, heads, -1)).unbind(2)]


def split_into_patches(image: Tensor, patch_size: int) -> Tensor:
    """Move patches of (B, C, H, W) into channels: (B, C p^2, H / p, W / p), channels last."""
    return F.pixel_unshuffle(image, patch_size).contiguous(memory_format=torch.channels_last)


def build_feed_forward(width: int) -> nn.Sequential:
    """Return the two layers behind attention, four times as wide between them."""
    return nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))
