"""Layers that DALLE2-pytorch's prior and U-Net share. The files fix the names and shapes of the tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.networks.linear import Linear
from t2i.runtime.hooks import run_like_forward

KeyValue = tuple[Tensor, Tensor]  # each (B, 1, L, head_width): one head for all heads of the queries

COSINE_SCALE = 16.0
OLD_BIAS_SCALE = 128.0  # releases before 1.4.3 divide queries by it, and multiply their products and the bias by it
MAX_ROTARY_WIDTH = 32  # dimensions of a head that rotary positions turn, at most


class Norm(nn.Module):
    """Layer norm over dimension `dim` with a gain, `shape`, and no bias; computed in fp32.

    stable: divide by the largest value first, as the reference does. It changes the result if that value is negative.
    """

    def __init__(self, *shape: int, dim: int = -1, stable: bool = False):
        super().__init__()
        self.g = nn.Parameter(torch.ones(shape))
        self.dim, self.stable = dim, stable

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        if self.stable:
            full = full / full.amax(dim=self.dim, keepdim=True)
        variance, mean = torch.var_mean(full, dim=self.dim, correction=0, keepdim=True)
        return ((full - mean) * (variance + 1e-5).rsqrt()).to(x.dtype) * self.g


class Attention(nn.Module):
    """Multi-query attention with a learned key and value before all others.

    Args:
        cosine: queries and keys have unit length, and their products are multiplied by 16.
        old: arithmetic of before release 1.4.3, which divides products by sqrt(head_width) instead of head_width.
        rotary: queries and keys are turned by their positions (Su et al. 2021).
    """

    def __init__(
        self, width: int, heads: int, head_width: int, cosine: bool = True, old: bool = False, rotary: bool = False
    ):
        super().__init__()
        self.heads, self.cosine, self.rotary = heads, cosine, rotary
        self.scale = COSINE_SCALE if cosine else head_width ** (-0.5 if old else -1.0)
        self.norm = Norm(width)
        self.null_kv = nn.Parameter(torch.randn(2, head_width))
        self.to_q = Linear(width, heads * head_width, bias=False)
        self.to_kv = Linear(width, 2 * head_width, bias=False)
        self.to_out = nn.Sequential(Linear(heads * head_width, width, bias=False), Norm(width))

    @run_like_forward
    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every token: (B, L, width) -> (B, L, width)."""
        return self.forward_with_key_value(x)[0]

    @run_like_forward
    def forward_with_key_value(
        self, x: Tensor, bias: Tensor | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attend to the keys and values of `past` and of x, and return the output and the keys and values of x.

        bias: added to the products, (heads, L, 1 + past + L); -inf where a query must not look.
        """
        x = self.norm(x)
        query = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.to_kv(x)[:, None].chunk(2, dim=-1)
        if self.rotary:
            first = 0 if past is None else past[0].shape[2]
            query, key = apply_rotary_positions(query, first), apply_rotary_positions(key, first)
        # The learned key has no position, so it is not turned.
        null_key, null_value = self.null_kv.to(x.dtype)[:, None, None, None].expand(-1, len(x), -1, -1, -1)
        if self.cosine:
            query, key, null_key = (F.normalize(vectors, dim=-1) for vectors in (query, key, null_key))
        # One head of keys and values serves all heads of the queries.
        pairs = [(null_key, null_value), *([] if past is None else [past]), (key, value)]
        keys, values = (torch.cat(tensors, dim=2).expand(-1, self.heads, -1, -1) for tensors in zip(*pairs))
        mask = None if bias is None else bias.to(x.dtype)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scale)
        return self.to_out(out.transpose(1, 2).flatten(2)), (key, value)


def apply_rotary_positions(x: Tensor, first: int) -> Tensor:
    """Turn vectors, (B, heads, L, C), by their positions from `first` on; pairs of neighbouring dimensions turn."""
    width = min(MAX_ROTARY_WIDTH, x.shape[-1])
    frequencies = 10_000 ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angles = torch.arange(first, first + x.shape[-2], device=x.device)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., :width].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., width:]], dim=-1)


def embed_timesteps(t: Tensor, width: int) -> Tensor:
    """Return the embedding of timesteps, (B,) -> (B, width), fp32: sines, then cosines."""
    half = width // 2
    # Divided by half - 1, where Vaswani et al. divide by half: the slowest wave has length 2 pi 10,000 exactly.
    frequencies = 10_000 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
