"""The U-Net of DALLE2-pytorch. Arguments are its own, by its names; so are those of the tensors."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from t2i.checks import check_integer
from t2i.errors import InputError
from t2i.networks.dalle2.blocks import BlockFactory, CrossEmbedding, expand_per_level
from t2i.networks.dalle2.layers import embed_timesteps
from t2i.networks.linear import Linear


class Unet(nn.Module):
    """Pictures, (B, channels, H, W), to what is predicted of them, (B, channels_out, H, W).

    Args:
        dim, dim_mults, init_dim: channels at the outer ends, and what each level multiplies `dim` by.
        channels, channels_out: of the pictures and of the prediction.
        image_embed_dim: dimensions of z_i; with cond_on_image_embeds it becomes `num_image_tokens` tokens, and with
            add_image_embeds_to_time also a vector that is added to the time's.
        text_embed_dim: dimensions of a caption's token states, read if cond_on_text_encodings, in the middle alone;
            they are padded to max_text_len with learned tokens.
        cond_dim: dimensions of the tokens; `dim` if left out. num_time_tokens: tokens made from the time.
        self_attn: of each level or of all, with attn_heads heads of attn_dim_head; sparse_attn: linear attention in
            the others. cosine_sim_self_attn, cosine_sim_cross_attn: queries and keys of unit length.
        lowres_cond: it sees an enlarged small picture; lowres_noise_cond: and is told how much that was noised.
        num_resnet_blocks, resnet_groups: of each level or of all.
        init_cross_embed, cross_embed_downsample: convolutions of several sizes side by side; else one, the first of
            init_conv_kernel_size.
        memory_efficient: levels begin with their downsampling.
        pixel_shuffle_upsample: else nearest neighbours and a convolution.
        old_attention: as before release 1.4.0; old_downsample: as before 1.10.0.
    """

    def __init__(
        self,
        dim: int,
        image_embed_dim: int | None = None,
        text_embed_dim: int | None = None,
        cond_dim: int | None = None,
        num_image_tokens: int = 4,
        num_time_tokens: int = 2,
        dim_mults: Any = (1, 2, 4, 8),
        channels: int = 3,
        channels_out: int | None = None,
        self_attn: Any = False,
        attn_dim_head: int = 32,
        attn_heads: int = 16,
        lowres_cond: bool = False,
        lowres_noise_cond: bool = False,
        sparse_attn: bool = False,
        cosine_sim_cross_attn: bool = False,
        cosine_sim_self_attn: bool = False,
        cond_on_text_encodings: bool = False,
        max_text_len: int = 256,
        cond_on_image_embeds: bool = False,
        add_image_embeds_to_time: bool = True,
        init_dim: int | None = None,
        init_conv_kernel_size: int = 7,
        resnet_groups: Any = 8,
        num_resnet_blocks: Any = 2,
        init_cross_embed: bool = True,
        init_cross_embed_kernel_sizes: Any = (3, 7, 15),
        cross_embed_downsample: bool = False,
        cross_embed_downsample_kernel_sizes: Any = (2, 4),
        memory_efficient: bool = False,
        scale_skip_connection: bool = False,
        pixel_shuffle_upsample: bool = True,
        final_conv_kernel_size: int = 1,
        old_attention: bool = False,
        old_downsample: bool = False,
    ):
        super().__init__()
        states = resolve_condition_width(
            "text_embed_dim", text_embed_dim, "cond_on_text_encodings", cond_on_text_encodings
        )
        embeds = resolve_condition_width(
            "image_embed_dim", image_embed_dim, "cond_on_image_embeds", cond_on_image_embeds
        )
        check_unet_sizes(dim, max_text_len, cond_dim or dim, embeds)
        self.dim, self.skip_scale = dim, 2**-0.5 if scale_skip_connection else 1.0
        cond, time, count = cond_dim or dim, 4 * dim, len(dim_mults)
        self.build_condition_layers(dim, cond, embeds, add_image_embeds_to_time, num_image_tokens, num_time_tokens)
        self.build_caption_layers(cond, states, max_text_len)
        self.to_lowres_noise_cond = build_noise_level_layers(dim, time) if lowres_noise_cond else None
        widths = [init_dim or dim, *(dim * factor for factor in dim_mults)]
        read = channels * (2 if lowres_cond else 1)
        several = init_cross_embed_kernel_sizes if init_cross_embed else None
        self.init_conv = build_first_layer(read, widths[0], several, init_conv_kernel_size)
        attention = (attn_heads, attn_dim_head), cosine_sim_self_attn, old_attention, sparse_attn
        halving = tuple(cross_embed_downsample_kernel_sizes) if cross_embed_downsample else ()
        parts = BlockFactory(
            cond, time, cosine_sim_cross_attn, *attention, halving, old_downsample, pixel_shuffle_upsample
        )
        attends, blocks, groups = (
            expand_per_level(value, count) for value in (self_attn, num_resnet_blocks, resnet_groups)
        )
        self.build_unet_levels(widths, parts, attends, blocks, groups, memory_efficient)
        seen = dim + (channels if lowres_cond else 0)
        self.to_out = build_same_size_conv(seen, channels_out or channels, final_conv_kernel_size)
        self.multiple = 2 ** (count - (0 if memory_efficient else 1))

    def build_condition_layers(
        self, dim: int, cond: int, embed_dim: int | None, added: bool, images: int, times: int
    ) -> None:
        """The layers that make tokens and vectors of the time and of z_i."""
        time = 4 * dim
        self.to_time_hiddens = nn.Sequential(nn.Identity(), Linear(dim, time), nn.GELU())
        self.to_time_tokens = nn.Sequential(Linear(time, cond * times), nn.Unflatten(-1, (times, cond)))
        self.to_time_cond = nn.Sequential(Linear(time, time))
        self.image_to_tokens: nn.Module | None = None
        self.to_image_hiddens: nn.Module | None = None
        if embed_dim is not None:
            self.image_to_tokens = nn.Sequential(Linear(embed_dim, cond * images), nn.Unflatten(-1, (images, cond)))
            if added:
                self.to_image_hiddens = nn.Sequential(Linear(embed_dim, time), nn.GELU())
        self.norm_cond, self.norm_mid_cond = nn.LayerNorm(cond), nn.LayerNorm(cond)
        self.null_image_embed = nn.Parameter(torch.randn(1, images, cond))
        self.null_image_hiddens = nn.Parameter(torch.randn(1, time))

    def build_caption_layers(self, cond: int, states: int | None, length: int) -> None:
        """The layer that makes tokens of a caption's states, and the tokens that pad them."""
        self.text_to_cond = None if states is None else Linear(states, cond)
        self.null_text_embed = nn.Parameter(torch.randn(1, length, cond))

    def build_unet_levels(
        self, widths: list[int], parts: "BlockFactory", attends: list, blocks: list, groups: list, early: bool
    ) -> None:
        """The way down, the middle, and the way up. early: a level begins with its downsampling."""
        pairs, last = list(zip(widths[:-1], widths[1:])), len(widths) - 2
        outer = self.dim
        self.init_resnet_block = parts.build_resnet_block(widths[0], widths[0], groups[0]) if early else None
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, (inner, out) in enumerate(pairs):
            width, reads = (out if early else inner), i > 0
            self.downs.append(
                nn.ModuleList(
                    [
                        parts.build_downsample_layer(inner, out) if early else nn.Identity(),
                        parts.build_resnet_block(width, width, groups[i]),
                        nn.ModuleList(
                            parts.build_resnet_block(width, width, groups[i], reads) for _ in range(blocks[i])
                        ),
                        parts.build_self_attention(width, attends[i]),
                        nn.Conv2d(width, out, 1) if early or i == last else parts.build_downsample_layer(width, out),
                    ]
                )
            )
        self.mid_block1 = parts.build_resnet_block(widths[-1], widths[-1], groups[-1], True)
        self.mid_attn = parts.build_self_attention(widths[-1], True)
        self.mid_block2 = parts.build_resnet_block(widths[-1], widths[-1], groups[-1], True)
        for i, (inner, out) in reversed(list(enumerate(pairs))):
            skipped, reads = (out if early else inner), i > 0
            self.ups.append(
                nn.ModuleList(
                    [
                        parts.build_resnet_block(out + skipped, out, groups[i], reads),
                        nn.ModuleList(
                            parts.build_resnet_block(out + skipped, out, groups[i], reads) for _ in range(blocks[i])
                        ),
                        parts.build_self_attention(out, attends[i]),
                        parts.build_upsample_layer(out, inner) if early or i > 0 else nn.Identity(),
                    ]
                )
            )
        # The first level's first width is that of the picture's features, to which the last block returns.
        self.final_resnet_block = parts.build_resnet_block(2 * outer, outer, groups[0])

    @apply_forward_hook
    def embed_image_condition(self, z_i: Tensor, dropped: Tensor) -> tuple[Tensor | None, Tensor]:
        """z_i, (B, D), and where there is none, (B,) -> what is added to the time, and tokens, (B, L, cond_dim)."""
        assert self.image_to_tokens is not None, "a U-Net that reads no z_i is not asked"
        tokens = self.image_to_tokens(z_i)
        tokens = torch.where(dropped[:, None, None], self.null_image_embed.to(tokens.dtype), tokens)
        if self.to_image_hiddens is None:
            return None, tokens
        hiddens = self.to_image_hiddens(z_i)
        return torch.where(dropped[:, None], self.null_image_hiddens.to(hiddens.dtype), hiddens), tokens

    @apply_forward_hook
    def embed_text_condition(self, states: Tensor, mask: Tensor) -> Tensor:
        """A caption's states, (B, L, W), and which count -> (B, max_text_len, cond_dim), padded with learned tokens."""
        assert self.text_to_cond is not None, "a U-Net that reads no captions is not asked"
        length = self.null_text_embed.shape[1]
        tokens, mask = self.text_to_cond(states[:, :length]), mask[:, :length]
        extra = length - mask.shape[1]
        tokens, mask = F.pad(tokens, (0, 0, 0, extra)), F.pad(mask, (0, extra))
        return torch.where(mask[..., None], tokens, self.null_text_embed.to(tokens.dtype))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        hiddens: Tensor | None = None,
        image: Tensor | None = None,
        text: Tensor | None = None,
        low: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """hiddens, image, text: of `embed_image_condition` and `embed_text_condition`. low: (B, channels, H, W),
        enlarged; level:
        (B,), the timestep that it was noised to."""
        if any(side % self.multiple for side in x.shape[-2:]):
            raise InputError(f"sides must be multiples of {self.multiple} for this U-Net, got {tuple(x.shape[-2:])}")
        noisy = x if low is None else torch.cat([x, low], dim=1)
        x = start = self.init_conv(noisy)
        time = self.to_time_hiddens(embed_timesteps(t, self.dim).to(x.dtype))
        tokens, vector = self.to_time_tokens(time), self.to_time_cond(time)
        if level is not None and self.to_lowres_noise_cond is not None:
            vector = vector + self.to_lowres_noise_cond(embed_timesteps(level, self.dim).to(x.dtype))
        if hiddens is not None:
            vector = vector + hiddens
        if image is not None:
            tokens = torch.cat([tokens, image], dim=1)
        middle = self.norm_mid_cond(tokens if text is None else torch.cat([tokens, text], dim=1))
        x = self.run_unet_levels(x, vector, self.norm_cond(tokens), middle)
        x = self.final_resnet_block(torch.cat([x, start], dim=1), vector)
        return self.to_out(x if low is None else torch.cat([x, low], dim=1))

    def run_unet_levels(self, x: Tensor, vector: Tensor, tokens: Tensor, middle: Tensor) -> Tensor:
        """Down and up again."""
        if self.init_resnet_block is not None:
            x = self.init_resnet_block(x, vector)
        skips: list[Tensor] = []
        for before, first, blocks, attention, after in self.downs:  # type: ignore[misc]
            x = first(before(x), vector, tokens)
            for block in blocks:
                x = block(x, vector, tokens)
                skips.append(x)
            x = attention(x)
            skips.append(x)
            x = after(x)
        x = self.mid_block1(x, vector, middle)
        x = self.mid_block2(self.mid_attn(x), vector, middle)
        for first, blocks, attention, after in self.ups:  # type: ignore[misc]
            for block in (first, *blocks):
                x = block(torch.cat([x, skips.pop() * self.skip_scale], dim=1), vector, tokens)
            x = after(attention(x))
        return x


def resolve_condition_width(name: str, value: int | None, reader: str, reads: bool) -> int | None:
    """The dimensions of what is read; None if it is not."""
    if reads and value is None:
        raise InputError(f"a U-Net with {reader} needs {name}, got none")
    return value if reads else None


def check_unet_sizes(dim: int, max_text_len: int, cond: int, embed_dim: int | None) -> None:
    check_integer("dim", dim, 4, 65_536)
    check_integer("max_text_len", max_text_len, 1, 1024)
    if embed_dim == cond:
        raise InputError(f"image_embed_dim and cond_dim are both {cond}: such a U-Net fails in DALLE2-pytorch too")


def build_noise_level_layers(dim: int, time: int) -> nn.Module:
    """They make a vector of how much the small picture was noised."""
    return nn.Sequential(nn.Identity(), Linear(dim, time), nn.GELU(), Linear(time, time))


def build_same_size_conv(width: int, out: int, kernel: int) -> nn.Module:
    return nn.Conv2d(width, out, kernel, padding=kernel // 2)


def build_first_layer(width: int, out: int, several: Any, kernel: int) -> nn.Module:
    """Convolutions of several sizes side by side; without such, of one."""
    return (
        build_same_size_conv(width, out, kernel) if several is None else CrossEmbedding(width, out, several, stride=1)
    )
