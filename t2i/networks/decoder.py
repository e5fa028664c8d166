"""The decoder: from an image embedding to the latents of an image (Ramesh et al. 2022, DALL-E 2, section 2.1).

A transformer over patches of latents. The image embedding z_i conditions it twice, as in the paper: added to the
timestep's embedding, which modulates every block (adaptive layer norm, Peebles and Xie 2023), and as extra tokens in
every attention, with a caption's tokens if it reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from t2i.diffusion.condition import ImageCondition, TokenStates
from t2i.diffusion.denoiser import DecoderMixin, StoredDefaults
from t2i.diffusion.sampling_loop import check_sampling_defaults
from t2i.networks.layers import (
    Attention,
    KeyValue,
    TimeEmbedding,
    build_feed_forward,
    run_checkpointed_block,
    split_attention_heads,
)
from t2i.networks.linear import Linear
from t2i.runtime.hooks import find_compute_device, run_like_forward

ExtraTokens: TypeAlias = KeyValue | Tensor  # the tokens: (B, L, condition_width)


@dataclass
class DecoderContext:
    """All that depends on the condition alone."""

    image: Tensor  # (B, condition_width): z_i, added to the timestep's embedding
    extra: Sequence[ExtraTokens]  # one a block: keys and values of the extra tokens, or the tokens themselves
    mask: Tensor | None  # (B, extra tokens), bool: False for padding; None without padding
    masked_latents: Tensor | None = None  # (B, C + 1, h, w), concatenated to the noisy latents


class ImageTokensMixin(StoredDefaults, DecoderMixin):
    """The condition of `Decoder` and `UNetDecoder`: tokens made from z_i, then those of the caption if it is read."""

    config: Any
    device: Any
    dtype: Any
    to_tokens: nn.Module
    from_text: nn.Module | None

    def embed_condition_tokens(self, condition: ImageCondition) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return z_i of unit variance, (B, D), tokens, (B, L, width), and their mask, (B, L), None without padding.

        Raises ValueError if the decoder reads captions and the condition has none.
        """
        # z_i has unit length: times sqrt(D), its dimensions have unit variance.
        z_i = condition.embedding * self.config.embed_dim**0.5
        count = self.config.image_tokens
        tokens = self.to_tokens(z_i).unflatten(-1, (count, -1))  # (B, count * width) -> (B, count, width)
        if self.from_text is None:
            return z_i, tokens, None
        if condition.text is None:
            raise ValueError("this decoder reads captions: its condition needs a text")
        tokens = torch.cat([tokens, self.from_text(condition.text.states)], dim=1)
        return z_i, tokens, F.pad(condition.text.mask, (count, 0), value=True)

    def null(self, count: int) -> ImageCondition:
        """Return zero embeddings, and captions of no tokens for decoders that read captions."""
        z_i, text = build_null_embeds(self), None
        if self.from_text is not None:
            states = z_i.new_zeros(1, 1, self.config.text_width)
            text = TokenStates(states, states.new_zeros(1, 1, dtype=torch.bool))
        return ImageCondition(z_i, text).repeat(count)


class Decoder(ImageTokensMixin, ModelMixin, ConfigMixin):
    """Denoiser of latents of unit variance, given an ImageCondition.

    Args:
        embed_dim: dimensions D of z_i.
        latent_channels, latent_size: shape (C, S, S) of the latents in training.
        width, depth, heads: sizes of the transformer.
        patch_size: latents per token along a side.
        condition_width: dimensions of the vector that modulates the blocks.
        image_tokens: extra tokens made from z_i.
        text_width: dimensions of a caption's token states; None if it reads no captions.
        clip_fingerprint: digest of the CLIP in training.
        learned_variance: the output has further C channels for the variance of the reverse steps.
        reads_masks: the input has the latents to keep and their mask; see `t2i.diffusion.inpainting`.
        text_encoder_fingerprint: digest of the text encoder of the captions; None if they come from CLIP.
        default_steps, default_guidance_scale: of sampling, where none are given.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderBlock"]  # FSDP shards each as a unit
    lora_targets = ("to_qkv", "to_out", "to_key_value")

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        latent_channels: int,
        latent_size: int,
        width: int,
        depth: int,
        heads: int,
        patch_size: int = 1,
        condition_width: int = 128,
        image_tokens: int = 4,
        text_width: int | None = None,
        clip_fingerprint: str | None = None,
        learned_variance: bool = False,
        reads_masks: bool = False,
        text_encoder_fingerprint: str | None = None,
        default_steps: int = 25,
        default_guidance_scale: float = 1.5,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        check_sampling_defaults(default_steps, default_guidance_scale)
        if latent_size % patch_size or width % 4:
            allowed = f"patch_size must divide latent_size {latent_size}, and width must be a multiple of 4"
            raise ValueError(f"{allowed}; got {patch_size} and {width}")
        # Sizes of a patch, in and out
        side = latent_size // patch_size
        inputs = count_input_channels(latent_channels, reads_masks) * patch_size**2
        outputs = latent_channels * patch_size**2 * (2 if learned_variance else 1)
        # What enters: patches at their positions, the timestep, z_i and the caption
        self.from_latents = Linear(inputs, width)
        # In the dtype that diffusers sets while it loads: by the first tensor it decides whether to convert the others.
        self.positions = nn.Parameter(build_grid_embedding(side, width).to(torch.get_default_dtype()))
        self.from_time = TimeEmbedding(width, condition_width)
        self.from_image = Linear(embed_dim, condition_width)
        self.to_tokens = Linear(embed_dim, image_tokens * condition_width)
        self.from_text = None if text_width is None else Linear(text_width, condition_width)
        # The transformer, and the way back to latents
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, condition_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_layer_weights(Linear(condition_width, 2 * width))
        self.to_latents = zero_layer_weights(Linear(width, outputs))

    @property
    def latent_multiple(self) -> int:
        return self.config.patch_size

    @run_like_forward
    def forward(self, x: Tensor, t: Tensor, condition: ImageCondition) -> Tensor:
        """Return the prediction, (B, C, H, W), or (B, 2C, H, W) with a learned variance. x: noisy latents; t: (B,)."""
        # Here each block computes its keys and values as it runs: under FSDP it has its weights only then.
        return self.step(x, t, self.build_context(condition))

    @run_like_forward
    def prepare(self, condition: ImageCondition) -> DecoderContext:
        context = self.build_context(condition)
        context.extra = [block.compute_key_value(tokens) for block, tokens in zip(self.blocks, context.extra)]
        return context

    def build_context(self, condition: ImageCondition) -> DecoderContext:
        """Return the context with the extra tokens themselves in the place of their keys and values."""
        condition = condition.expand()
        z_i, tokens, mask = self.embed_condition_tokens(condition)
        masked_latents = resolve_masked_latents(self, condition)
        return DecoderContext(self.from_image(z_i), [tokens] * len(self.blocks), mask, masked_latents)

    @run_like_forward
    def step(self, x: Tensor, t: Tensor, context: DecoderContext) -> Tensor:
        """Return the prediction, (B, C, H, W), or (B, 2C, H, W) with a learned variance. t: (B,)."""
        # Patches become tokens: (B, C, H, W) -> (B, C p^2, H / p, W / p) -> (B, h w, C p^2) -> (B, h w, width)
        patch = self.config.patch_size
        height, width = x.shape[-2] // patch, x.shape[-1] // patch
        if context.masked_latents is not None:
            x = concat_masks(x, context.masked_latents)
        tokens = F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)
        tokens = self.from_latents(tokens) + self.resize_position_grid(height, width)

        # The transformer; the mask is for the extra tokens, then all of the patches
        condition = F.silu(self.from_time(t) + context.image)
        mask = None
        if context.mask is not None:
            mask = F.pad(context.mask, (0, tokens.shape[1]), value=True)[:, None, None, :]
        for block, extra in zip(self.blocks, context.extra):
            tokens = run_checkpointed_block(self, block, tokens, condition, extra, mask)

        # Back to latents: (B, h w, C p^2) -> (B, C p^2, h, w) -> (B, C, H, W)
        scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)
        tokens = self.to_latents(self.norm(tokens) * (1 + scale) + shift)
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(-1, (height, width)), patch)

    def resize_position_grid(self, height: int, width: int) -> Tensor:
        """Return the learned positions, (height * width, C), resized for latents of another size or shape."""
        side = self.config.latent_size // self.config.patch_size
        if (height, width) == (side, side):
            return self.positions
        # (side^2, C) -> (1, C, side, side) for the resizing, and back
        grid = self.positions.T.unflatten(-1, (side, side))[None]
        return F.interpolate(grid, (height, width), mode="bicubic")[0].flatten(1).T


def build_null_embeds(model: Any) -> Tensor:
    """Return the null embedding of zeros, (1, D), where the model computes."""
    return torch.zeros(1, model.config.embed_dim, device=find_compute_device(model), dtype=model.dtype)


def count_input_channels(latent_channels: int, reads_masks: bool) -> int:
    """Return the channels of the noisy latents with, if masks are read, the latents to keep and the mask."""
    return 2 * latent_channels + 1 if reads_masks else latent_channels


def resolve_masked_latents(decoder: Any, condition: ImageCondition) -> Tensor | None:
    """Return the latents to keep and the mask, (B, C + 1, h, w), for decoders that read them, else None.

    Without any, nothing is kept: (B, C + 1, 1, 1), for latents of every shape.
    """
    if not decoder.config.reads_masks:
        return None
    if condition.masked_latents is not None:
        return condition.masked_latents
    # Of one position, which `concat_masks` repeats: here the shape of the latents is not known
    nothing = condition.embedding.new_zeros(len(condition), decoder.config.latent_channels + 1, 1, 1)
    nothing[:, -1] = 1
    return nothing


def concat_masks(x: Tensor, masked_latents: Tensor) -> Tensor:
    """Return noisy latents, (B, C, h, w), with the latents to keep and the mask as further channels."""
    return torch.cat([x, masked_latents.expand(-1, -1, *x.shape[-2:])], dim=1)


class DecoderBlock(nn.Module):
    """A block of a transformer whose norms the condition scales and shifts, and whose outputs it gates (adaLN-zero)."""

    def __init__(self, width: int, heads: int, condition_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.mlp = build_feed_forward(width)
        self.modulation = zero_layer_weights(Linear(condition_width, 6 * width))
        self.to_key_value = Linear(condition_width, 2 * width)

    @run_like_forward
    def compute_key_value(self, tokens: Tensor) -> KeyValue:
        """Return the keys and values of extra tokens, (B, L, condition_width)."""
        key, value = split_attention_heads(self.to_key_value(tokens), 2 * self.attention.heads).chunk(2, dim=1)
        return key, value

    @run_like_forward
    def forward(self, x: Tensor, condition: Tensor, extra: ExtraTokens, mask: Tensor | None) -> Tensor:
        """Return (B, L, width), like x. condition: (B, condition_width). mask: True for tokens that count."""
        past = self.compute_key_value(extra) if isinstance(extra, Tensor) else extra
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        attended, _ = self.attention(torch.addcmul(shift_1, self.norm(x), 1 + scale_1), mask, [past])
        x = torch.addcmul(x, gate_1, attended)
        return torch.addcmul(x, gate_2, self.mlp(torch.addcmul(shift_2, self.norm(x), 1 + scale_2)))


def zero_layer_weights(layer: Linear) -> Linear:
    """Set weights and bias to zero in place. Gates start closed, so every block starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def build_grid_embedding(side: int, width: int) -> Tensor:
    """Return cosines and sines of rows and columns, (side * side, width), the initial values of learned positions."""
    places = torch.arange(side, dtype=torch.float32)
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))  # a grid is short: wavelengths of 6 to 600
    angles = places[:, None] * frequencies  # (side, width / 4)
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)  # (side, side, width / 2)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
