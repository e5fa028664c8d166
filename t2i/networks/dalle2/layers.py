"""What DALLE2-pytorch's prior and U-Net share. Names and shapes of the tensors are the files' own."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from t2i.networks.linear import Linear

KeyValue = tuple[Tensor, Tensor]  # each (B, 1, L, head_width): one head of them for all heads of the queries

COSINE_SCALE = 16.0
OLD_BIAS_SCALE = 128.0  # releases before 1.4.3 multiplied what they had divided queries by, and the bias with it
MAX_ROTARY_WIDTH = 32  # dimensions of a head that rotary positions turn, at most


class Norm(nn.Module):
    """Layer norm with a gain and no bias, over dimension `dim`; computed in fp32.

    shape: of the gain. stable: divides by the largest value first, which changes the result where that is negative.
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
    """Multi-query attention with a learned key and value that stand before all others.

    Args:
        cosine: queries and keys have unit length; their product counts 16 times.
        old: as before release 1.4.3, where queries were divided by the root of their width once, and not by the width.
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> the same: every token sees every other."""
        return self.forward_with_key_value(x)[0]

    @apply_forward_hook  # it is called instead of `forward`, where offloading brings the weights
    def forward_with_key_value(
        self, x: Tensor, bias: Tensor | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Also the keys and values of x, which stand behind those of `past`.

        bias: added to the products, (heads, L, 1 + past + L); -inf where a query must not look.
        """
        x = self.norm(x)
        query = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.to_kv(x)[:, None].chunk(2, dim=-1)
        if self.rotary:
            first = 0 if past is None else past[0].shape[2]
            query, key = apply_rotary_positions(query, first), apply_rotary_positions(key, first)
        null_key, null_value = self.null_kv.to(x.dtype)[:, None, None, None].expand(-1, len(x), -1, -1, -1)
        if self.cosine:
            query, key, null_key = (F.normalize(one, dim=-1) for one in (query, key, null_key))
        before = () if past is None else (past,)
        keys, values = (torch.cat(pair, dim=2) for pair in zip((null_key, null_value), *before, (key, value)))
        spread = (-1, self.heads, -1, -1)
        mask = None if bias is None else bias.to(x.dtype)
        out = F.scaled_dot_product_attention(
            query, keys.expand(spread), values.expand(spread), attn_mask=mask, scale=self.scale
        )
        return self.to_out(out.transpose(1, 2).flatten(2)), (key, value)


def apply_rotary_positions(x: Tensor, first: int) -> Tensor:
    """(B, heads, L, C) at the positions from `first` on; neighbouring dimensions are turned together."""
    width = min(MAX_ROTARY_WIDTH, x.shape[-1])
    frequencies = 10_000 ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angles = torch.arange(first, first + x.shape[-2], device=x.device)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., :width].float().unflatten(-1, (-1, 2)).unbind(-1)
    both = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([both.to(x.dtype), x[..., width:]], dim=-1)


def embed_timesteps(t: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width), fp32: sines, then cosines; the slowest has a wavelength of exactly 2 pi 10,000."""
    half = width // 2
    frequencies = 10_000 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def build_null_embeds(model: Any, count: int) -> Tensor:
    """(count, D), zeros: the embedding that says nothing. On the CPU while the model's weights are on no device."""
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    return torch.zeros(count, model.config.embed_dim, device=device, dtype=model.dtype)
