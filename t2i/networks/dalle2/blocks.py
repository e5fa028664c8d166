"""What the levels of DALLE2-pytorch's U-Net are made of. Names and shapes of the tensors are the files' own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import InputError
from t2i.networks.dalle2.layers import COSINE_SCALE, Attention, Norm
from t2i.networks.linear import Linear

CROSS_HEADS, CROSS_WIDTH = 8, 64  # of the attention to the condition: no argument sets them


class BlockFactory:
    """What the levels of a U-Net are made of."""

    def __init__(
        self,
        cond: int,
        time: int,
        cosine_cross: bool,
        heads: tuple[int, int],
        cosine_self: bool,
        old_attention: bool,
        sparse: bool,
        down_kernels: tuple[int, ...],
        old_downsample: bool,
        shuffles: bool,
    ):
        self.cond, self.time, self.cosine_cross, self.heads = cond, time, cosine_cross, heads
        self.cosine_self, self.old, self.sparse = cosine_self, old_attention, sparse
        self.down_kernels, self.old_downsample, self.shuffles = down_kernels, old_downsample, shuffles

    def build_resnet_block(self, width: int, out: int, groups: int, reads: bool = False) -> nn.Module:
        return ResnetBlock(width, out, self.time, self.cond if reads else None, groups, self.cosine_cross)

    def build_self_attention(self, width: int, full: bool) -> nn.Module:
        if full:
            return PixelSequence(Residual(Attention(width, *self.heads, self.cosine_self, self.old)))
        return Residual(LinearAttention(width, *self.heads, self.old)) if self.sparse else nn.Identity()

    def build_downsample_layer(self, width: int, out: int) -> nn.Module:
        if self.down_kernels:
            return CrossEmbedding(width, out, self.down_kernels, stride=2)
        if self.old_downsample:
            return nn.Conv2d(width, out, 4, 2, 1)
        return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, out, 1))

    def build_upsample_layer(self, width: int, out: int) -> nn.Module:
        if self.shuffles:
            return PixelShuffleUpsample(width, out)
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, out, 3, padding=1))


def expand_per_level(value: Any, count: int) -> list:
    """A value of each level: given so, or one for all."""
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise InputError(f"a U-Net of {count} levels has {len(values)} values for them: {values!r:.80}")
    return values


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class PixelSequence(nn.Module):
    """`fn` of the pixels as a sequence."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(-1, x.shape[-2:])


class PixelShuffleUpsample(nn.Module):
    """Twice the sides, from channels."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(width, 4 * out, 1), nn.SiLU(), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossEmbedding(nn.Module):
    """Convolutions of several sizes side by side: half of the channels are the smallest's, and so on."""

    def __init__(self, width: int, out: int, kernels: Any, stride: int):
        super().__init__()
        kernels = sorted(kernels)
        outs = [out // 2**i for i in range(1, len(kernels))]
        outs.append(out - sum(outs))
        if any(kernel % 2 != stride % 2 for kernel in kernels) or min(outs) < 1:
            raise InputError(f"kernels {kernels} fit neither stride {stride} nor {out} channels")
        self.convs = nn.ModuleList(
            nn.Conv2d(width, one, kernel, stride, (kernel - stride) // 2) for one, kernel in zip(outs, kernels)
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
            assert tokens is not None, "blocks that read the condition are given it"
            pixels = hidden.flatten(2).transpose(1, 2)
            pixels = self.cross_attn(pixels, tokens) + pixels
            hidden = pixels.transpose(1, 2).unflatten(-1, hidden.shape[-2:])
        return self.block2(hidden) + self.res_conv(x)


class CrossAttention(nn.Module):
    """Of pixels to tokens, and to a learned key and value that all heads share."""

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
    """Attention whose cost grows with the number of pixels alone. old: as before release 1.4.0."""

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
        query, key = query.softmax(dim=-2) * self.scale, key.softmax(dim=-1)  # (B, heads, C, pixels)
        if not self.old:
            value = F.normalize(value, dim=-2) / key.shape[-1]  # half of it is the key's share, in the reference
        out = (value @ key.mT) @ query
        return self.to_out(F.gelu(out.flatten(1, 2).unflatten(-1, sides)))
