"""The U-Net of DALLE2-pytorch. The files fix the names of its arguments and of its tensors."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.checks import check_integer
from t2i.errors import InputError
from t2i.networks.dalle2.blocks import (
    CrossEmbedding,
    LinearAttention,
    PixelSequence,
    PixelShuffleUpsample,
    Residual,
    ResnetBlock,
)
from t2i.networks.dalle2.layers import Attention, embed_timesteps
from t2i.networks.linear import Linear
from t2i.runtime.hooks import run_like_forward


@dataclass(frozen=True)
class UnetConfig:
    """Arguments of a U-Net. "Any" is a value for all levels or a list of one a level; checked on creation."""

    dim: int  # channels at the outer ends
    image_embed_dim: int | None = None  # of z_i
    text_embed_dim: int | None = None  # of a caption's token states
    cond_dim: int | None = None  # of the tokens that pixels attend to; `dim` if None
    num_image_tokens: int = 4  # made from z_i
    num_time_tokens: int = 2  # made from the timestep
    dim_mults: Any = (1, 2, 4, 8)  # one a level: its channels, in multiples of `dim`
    channels: int = 3  # of the images
    channels_out: int | None = None  # of the prediction; `channels` if None
    self_attn: Any = False  # full attention among pixels
    attn_dim_head: int = 32
    attn_heads: int = 16
    lowres_cond: bool = False  # the U-Net reads an enlarged small image
    lowres_noise_cond: bool = False  # and the timestep that it was noised to
    sparse_attn: bool = False  # linear attention among pixels in levels without full attention
    cosine_sim_cross_attn: bool = False  # queries and keys of unit length
    cosine_sim_self_attn: bool = False
    cond_on_text_encodings: bool = False  # the middle of the U-Net reads the caption's token states,
    max_text_len: int = 256  # padded to this length with learned tokens
    cond_on_image_embeds: bool = False  # the U-Net reads z_i as tokens
    add_image_embeds_to_time: bool = True  # and as a vector, added to the timestep's
    init_dim: int | None = None  # channels before the first level; `dim` if None
    init_conv_kernel_size: int = 7  # of the first layer, without init_cross_embed
    resnet_groups: Any = 8
    num_resnet_blocks: Any = 2
    init_cross_embed: bool = True  # the first layer is convolutions of several sizes side by side
    init_cross_embed_kernel_sizes: Any = (3, 7, 15)
    cross_embed_downsample: bool = False  # and so is each downsampling
    cross_embed_downsample_kernel_sizes: Any = (2, 4)
    memory_efficient: bool = False  # levels begin with their downsampling
    scale_skip_connection: bool = False
    pixel_shuffle_upsample: bool = True  # else nearest neighbours and a convolution
    final_conv_kernel_size: int = 1
    old_attention: bool = False  # as before release 1.4.0
    old_downsample: bool = False  # as before release 1.10.0

    def __post_init__(self) -> None:
        if self.cond_on_text_encodings and self.text_embed_dim is None:
            raise InputError("a U-Net with cond_on_text_encodings needs text_embed_dim, got none")
        if self.cond_on_image_embeds and self.image_embed_dim is None:
            raise InputError("a U-Net with cond_on_image_embeds needs image_embed_dim, got none")
        check_integer("dim", self.dim, 4, 65_536)
        check_integer("max_text_len", self.max_text_len, 1, 1024)
        if self.cond_on_image_embeds and self.image_embed_dim == self.token_dim:
            sizes = f"image_embed_dim and cond_dim are both {self.token_dim}"
            raise InputError(f"{sizes}: such a U-Net fails in DALLE2-pytorch too")

    @property
    def token_dim(self) -> int:
        return self.cond_dim or self.dim

    @property
    def time_dim(self) -> int:
        """Dimensions of the timestep's embedding."""
        return 4 * self.dim

    def list_per_level(self, name: str) -> list[Any]:
        """Return an argument's value for each level. Raises InputError for a list of another length."""
        value, count = getattr(self, name), len(self.dim_mults)
        values = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(values) != count:
            raise InputError(f"{name} must have a value for each of {count} levels, or one for all, got {value!r:.80}")
        return values


class Unet(nn.Module):
    """A U-Net from images, (B, channels, H, W), to a prediction, (B, channels_out, H, W).

    arguments: the fields of `UnetConfig`. H and W must be multiples of `multiple`.
    """

    def __init__(self, **arguments: Any):
        super().__init__()
        self.config = config = UnetConfig(**arguments)
        self.skip_scale = 2**-0.5 if config.scale_skip_connection else 1.0
        self.multiple = 2 ** (len(config.dim_mults) - (0 if config.memory_efficient else 1))
        self.build_condition_layers()
        # Channels before the first level, and after each
        widths = [config.init_dim or config.dim, *(config.dim * factor for factor in config.dim_mults)]
        read = config.channels * (2 if config.lowres_cond else 1)
        if config.init_cross_embed:
            self.init_conv: nn.Module = CrossEmbedding(read, widths[0], config.init_cross_embed_kernel_sizes, stride=1)
        else:
            self.init_conv = build_same_size_conv(read, widths[0], config.init_conv_kernel_size)
        self.build_unet_levels(widths)
        # The output reads the small image once more.
        last = config.dim + (config.channels if config.lowres_cond else 0)
        out = config.channels_out or config.channels
        self.to_out = build_same_size_conv(last, out, config.final_conv_kernel_size)

    def build_condition_layers(self) -> None:
        """Build the layers that make vectors and tokens of the condition, and the learned values for no condition."""
        config, dim, token, time = self.config, self.config.dim, self.config.token_dim, self.config.time_dim
        # The timestep
        self.to_time_hiddens = nn.Sequential(nn.Identity(), Linear(dim, time), nn.GELU())
        self.to_time_tokens = build_token_layer(time, config.num_time_tokens, token)
        self.to_time_cond = nn.Sequential(Linear(time, time))
        # z_i
        self.image_to_tokens: nn.Module | None = None
        self.to_image_hiddens: nn.Module | None = None
        if config.cond_on_image_embeds:
            assert config.image_embed_dim is not None, "UnetConfig checks it"
            self.image_to_tokens = build_token_layer(config.image_embed_dim, config.num_image_tokens, token)
            if config.add_image_embeds_to_time:
                self.to_image_hiddens = nn.Sequential(Linear(config.image_embed_dim, time), nn.GELU())
        self.norm_cond, self.norm_mid_cond = nn.LayerNorm(token), nn.LayerNorm(token)
        self.null_image_embed = nn.Parameter(torch.randn(1, config.num_image_tokens, token))
        self.null_image_hiddens = nn.Parameter(torch.randn(1, time))
        # The caption
        self.text_to_cond: nn.Module | None = None
        if config.cond_on_text_encodings:
            assert config.text_embed_dim is not None, "UnetConfig checks it"
            self.text_to_cond = Linear(config.text_embed_dim, token)
        self.null_text_embed = nn.Parameter(torch.randn(1, config.max_text_len, token))
        # The timestep that the small image was noised to
        self.to_lowres_noise_cond: nn.Module | None = None
        if config.lowres_noise_cond:
            self.to_lowres_noise_cond = nn.Sequential(nn.Identity(), Linear(dim, time), nn.GELU(), Linear(time, time))

    def build_unet_levels(self, widths: list[int]) -> None:
        """Build the way down, the middle, and the way up. widths: channels before the first level and after each."""
        config, resnet = self.config, self.build_resnet_block
        early = config.memory_efficient
        names = ("self_attn", "num_resnet_blocks", "resnet_groups")
        attends, blocks, groups = (config.list_per_level(name) for name in names)
        self.init_resnet_block = resnet(widths[0], widths[0], groups[0]) if early else None
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        levels = list(enumerate(zip(widths, widths[1:])))
        # Down: the first level does not attend to tokens.
        for i, (inner, out) in levels:
            width = out if early else inner
            before = self.build_downsample_layer(inner, out) if early else nn.Identity()
            first = resnet(width, width, groups[i])
            others = nn.ModuleList(resnet(width, width, groups[i], reads=i > 0) for _ in range(blocks[i]))
            attention = self.build_self_attention(width, attends[i])
            keeps_size = early or i == len(levels) - 1
            after = nn.Conv2d(width, out, 1) if keeps_size else self.build_downsample_layer(width, out)
            self.downs.append(nn.ModuleList([before, first, others, attention, after]))
        # The middle
        self.mid_block1 = resnet(widths[-1], widths[-1], groups[-1], reads=True)
        self.mid_attn = self.build_self_attention(widths[-1], full=True)
        self.mid_block2 = resnet(widths[-1], widths[-1], groups[-1], reads=True)
        # Up, with a skip connection into every block
        for i, (inner, out) in reversed(levels):
            read = out + (out if early else inner)  # with the skip connection
            first = resnet(read, out, groups[i], reads=i > 0)
            others = nn.ModuleList(resnet(read, out, groups[i], reads=i > 0) for _ in range(blocks[i]))
            attention = self.build_self_attention(out, attends[i])
            after = self.build_upsample_layer(out, inner) if early or i > 0 else nn.Identity()
            self.ups.append(nn.ModuleList([first, others, attention, after]))
        # The first level's first width is that of the image's features, to which the last block returns.
        self.final_resnet_block = resnet(2 * config.dim, config.dim, groups[0])

    def build_resnet_block(self, width: int, out: int, groups: int, reads: bool = False) -> nn.Module:
        """Build a block at a width. reads: the block attends to the tokens of the condition."""
        token_dim = self.config.token_dim if reads else None
        return ResnetBlock(width, out, self.config.time_dim, token_dim, groups, self.config.cosine_sim_cross_attn)

    def build_self_attention(self, width: int, full: bool) -> nn.Module:
        heads, head_width, old = self.config.attn_heads, self.config.attn_dim_head, self.config.old_attention
        if full:
            return PixelSequence(Residual(Attention(width, heads, head_width, self.config.cosine_sim_self_attn, old)))
        return Residual(LinearAttention(width, heads, head_width, old)) if self.config.sparse_attn else nn.Identity()

    def build_downsample_layer(self, width: int, out: int) -> nn.Module:
        if self.config.cross_embed_downsample:
            return CrossEmbedding(width, out, self.config.cross_embed_downsample_kernel_sizes, stride=2)
        if self.config.old_downsample:
            return nn.Conv2d(width, out, 4, 2, 1)
        return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, out, 1))

    def build_upsample_layer(self, width: int, out: int) -> nn.Module:
        if self.config.pixel_shuffle_upsample:
            return PixelShuffleUpsample(width, out)
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, out, 3, padding=1))

    @run_like_forward
    def embed_image_condition(self, z_i: Tensor, dropped: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return a vector to add to the time's, (B, 4 dim), and tokens, (B, num_image_tokens, cond_dim).

        z_i: (B, D). dropped: (B,), bool: there is no z_i, and the learned values stand for it.
        """
        assert self.image_to_tokens is not None, "it needs cond_on_image_embeds"
        tokens = self.image_to_tokens(z_i)
        tokens = torch.where(dropped[:, None, None], self.null_image_embed.to(tokens.dtype), tokens)
        if self.to_image_hiddens is None:
            return None, tokens
        hiddens = self.to_image_hiddens(z_i)
        return torch.where(dropped[:, None], self.null_image_hiddens.to(hiddens.dtype), hiddens), tokens

    @run_like_forward
    def embed_text_condition(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return tokens, (B, max_text_len, cond_dim), of a caption's states, (B, L, W), and their mask, (B, L), bool.

        Learned tokens stand where the mask is False.
        """
        assert self.text_to_cond is not None, "it needs cond_on_text_encodings"
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
        """Predict from noisy images x at timesteps t, (B,).

        hiddens, image, text: from `embed_image_condition` and `embed_text_condition`. low: (B, channels, H, W), the
        small image, enlarged. level: (B,), the timestep that it was noised to.
        """
        if any(side % self.multiple for side in x.shape[-2:]):
            raise InputError(f"sides must be multiples of {self.multiple} for this U-Net, got {tuple(x.shape[-2:])}")
        noisy = x if low is None else torch.cat([x, low], dim=1)
        x = start = self.init_conv(noisy)
        # The condition: a vector that scales and shifts features, and tokens to attend to
        time = self.to_time_hiddens(embed_timesteps(t, self.config.dim).to(x.dtype))
        tokens, vector = self.to_time_tokens(time), self.to_time_cond(time)
        if level is not None and self.to_lowres_noise_cond is not None:
            vector = vector + self.to_lowres_noise_cond(embed_timesteps(level, self.config.dim).to(x.dtype))
        if hiddens is not None:
            vector = vector + hiddens
        if image is not None:
            tokens = torch.cat([tokens, image], dim=1)
        # Only the middle of the U-Net attends to the caption.
        middle = self.norm_mid_cond(tokens if text is None else torch.cat([tokens, text], dim=1))
        x = self.run_unet_levels(x, vector, self.norm_cond(tokens), middle)
        x = self.final_resnet_block(torch.cat([x, start], dim=1), vector)
        return self.to_out(x if low is None else torch.cat([x, low], dim=1))

    def run_unet_levels(self, x: Tensor, vector: Tensor, tokens: Tensor, middle: Tensor) -> Tensor:
        """Run the way down, the middle, and the way up. tokens, middle: conditions for the levels and the middle."""
        if self.init_resnet_block is not None:
            x = self.init_resnet_block(x, vector)
        skips: list[Tensor] = []
        for before, first, blocks, attention, after in self.downs:  # type: ignore[misc]
            x = first(before(x), vector, tokens)
            for block in blocks:
                x = block(x, vector, tokens)
                skips.append(x)
            # The attention's output is a skip connection too: the way up has one more block than `blocks`.
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


def build_token_layer(width: int, count: int, token_width: int) -> nn.Module:
    """Return a layer from a vector, (B, width), to tokens, (B, count, token_width)."""
    return nn.Sequential(Linear(width, token_width * count), nn.Unflatten(-1, (count, token_width)))


def build_same_size_conv(width: int, out: int, kernel: int) -> nn.Module:
    return nn.Conv2d(width, out, kernel, padding=kernel // 2)
