"""Blocks of DALLE2-pytorch's U-Net. The files fix the names and shapes of the tensors, and so of the modules."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import InputError
from t2i.networks.dalle2.layers import COSINE_SCALE, Norm
from t2i.networks.linear import Linear

CROSS_HEADS, CROSS_WIDTH = 8, 64  # of every attention to tokens, whatever the arguments of the U-Net are


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class PixelSequence(nn.Module):
    """A module of sequences, (B, H W, C), applied to images, (B, C, H, W)."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(-1, x.shape[-2:])


class PixelShuffleUpsample(nn.Module):
    """A layer that doubles the sides: four times the channels become squares of pixels."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(width, 4 * out, 1), nn.SiLU(), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossEmbedding(nn.Module):
    """Convolutions of several sizes side by side: the smallest makes half of the channels, the next a quarter, ..."""

    def __init__(self, width: int, out: int, kernels: Any, stride: int):
        super().__init__()
        kernels = sorted(kernels)
        channels = [out // 2**i for i in range(1, len(kernels))]
        channels.append(out - sum(channels))
        if any(kernel % 2 != stride % 2 for kernel in kernels) or min(channels) < 1:
            raise InputError(
                f"kernels must be {'odd' if stride % 2 else 'even'} and few for {out} channels, got {kernels}"
            )
        self.convs = nn.ModuleList(
            nn.Conv2d(width, count, kernel, stride, (kernel - stride) // 2) for count, kernel in zip(channels, kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], dim=1)


class ConvBlock(nn.Module):
    def __init__(self, width: int, out: int, groups: int):
        super().__init__()
        self.project = nn.Conv2d(width, out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, out)

    def forward(self, x: Tensor, scale: Tensor | float = 0.0, shift: Tensor | float = 0.0) -> Tensor:
        return F.silu(self.norm(self.project(x)) * (scale + 1) + shift)


class ResnetBlock(nn.Module):
    def __init__(self, width: int, out: int, time: int, cond: int | None, groups: int, cosine: bool):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.SiLU(), Linear(time, 2 * out))
        self.cross_attn = None if cond is None else CrossAttention(out, cond, cosine)
        self.block1, self.block2 = ConvBlock(width, out, groups), ConvBlock(out, out, groups)
        self.res_conv = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, vector: Tensor, tokens: Tensor | None = None) -> Tensor:
        scale, shift = self.time_mlp(vector)[..., None, None].chunk(2, dim=1)
        hidden = self.block1(x, scale, shift)
        if self.cross_attn is not None:
            # The reference attends here, between the two convolutions, and not after the block.
            assert tokens is not None, "a block that reads tokens needs them"
            pixels = hidden.flatten(2).transpose(1, 2)
            pixels = self.cross_attn(pixels, tokens) + pixels
            hidden = pixels.transpose(1, 2).unflatten(-1, hidden.shape[-2:])
        return self.block2(hidden) + self.res_conv(x)


class CrossAttention(nn.Module):
    """Attention from pixels to tokens, and to a learned key and value that all heads share."""

    def __init__(self, width: int, cond: int, cosine: bool):
        super().__init__()
        self.cosine, self.scale = cosine, COSINE_SCALE if cosine else CROSS_WIDTH**-0.5
        inner = CROSS_HEADS * CROSS_WIDTH
        self.norm = Norm(width)
        self.null_kv = nn.Parameter(torch.randn(2, CROSS_WIDTH))
        self.to_q = Linear(width, inner, bias=False)
        self.to_kv = Linear(cond, 2 * inner, bias=False)
        self.to_out = nn.Sequential(Linear(inner, width, bias=False), Norm(width))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        query = self.to_q(self.norm(x)).unflatten(-1, (CROSS_HEADS, -1)).transpose(1, 2)
        pair = self.to_kv(tokens).unflatten(-1, (2, CROSS_HEADS, CROSS_WIDTH)).permute(2, 0, 3, 1, 4)
        null = self.null_kv.to(x.dtype)[:, None, None, None].expand(-1, len(x), CROSS_HEADS, -1, -1)
        key, value = torch.cat([null, pair], dim=3)
        if self.cosine:
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        out = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.to_out(out.transpose(1, 2).flatten(2))


class LinearAttention(nn.Module):
    """Attention that costs linear time in the number of pixels. old: arithmetic of before release 1.4.0."""

    def __init__(self, width: int, heads: int, head_width: int, old: bool):
        super().__init__()
        self.heads, self.scale, self.old = heads, head_width**-0.5, old
        inner = heads * head_width
        self.norm = Norm(1, width, 1, 1, dim=1)
        self.to_qkv = nn.Conv2d(width, 3 * inner, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), Norm(1, width, 1, 1, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        sides = x.shape[-2:]
        query, key, value = self.to_qkv(self.norm(x)).unflatten(1, (3, self.heads, -1)).flatten(-2).unbind(1)
        # Each is (B, heads, C, pixels): queries are normalised over channels, keys over pixels.
        query, key = query.softmax(dim=-2) * self.scale, key.softmax(dim=-1)
        if not self.old:
            # The reference divides keys and values each by the root of the number of pixels.
            value = F.normalize(value, dim=-2) / key.shape[-1]
        out = (value @ key.mT) @ query
        return self.to_out(F.gelu(out.flatten(1, 2).unflatten(-1, sides)))
