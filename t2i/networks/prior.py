"""The diffusion prior: from a caption's encoding to an image embedding (Ramesh et al. 2022, DALL-E 2, section 2.2).

A causal transformer over [caption tokens, z_t, timestep, noisy z_i, query]; the query's output is the clean z_i. Under
the causal mask the caption's keys and values depend on neither x nor t, so they are computed once per caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.denoiser import PriorMixin, StoredDefaults
from t2i.diffusion.sampling_loop import check_sampling_defaults
from t2i.networks.layers import (
    Attention,
    KeyValue,
    PackedSequences,
    TimeEmbedding,
    build_feed_forward,
    run_checkpointed_block,
)
from t2i.networks.linear import Linear
from t2i.runtime.hooks import run_like_forward

MAX_PREPARED_TIMESTEPS = 64  # of a sampling; the keys and values of each take memory for every caption


@dataclass
class PriorContext:
    """Keys and values of all tokens before the noisy z_i, which depend on the caption and the timestep alone."""

    past: list[KeyValue]  # one pair a block, of the caption's tokens and z_t
    mask: Tensor  # (B, L + 1), bool
    timesteps: Tensor  # (S,): the timesteps that are prepared
    timestep_key_values: list[KeyValue]  # one pair a block, for U different captions: (U, S, heads, 1, width / heads)
    groups: Tensor  # (B,): the number of each caption among the U


class Prior(StoredDefaults, PriorMixin, ModelMixin, ConfigMixin):
    """Denoiser of z_i, scaled to zero mean and unit variance, given a TextEncoding.

    Args:
        embed_dim: dimensions D of z_t and z_i.
        text_width: dimensions of a caption's token states.
        context_length: longest caption, in tokens.
        width, depth, heads: sizes of the transformer.
        null_length: tokens of the empty caption; a start and an end for most CLIPs.
        clip_fingerprint: digest of the CLIP in training.
        learned_variance: the output has further D dimensions for the variance of the reverse steps.
        unit_length: the CLIP's embeddings have length 1; the network's input z_t is then scaled to unit variance, and
            z_i is normalised. False for the public priors, which were trained on embeddings as they are.
        default_steps, default_guidance_scale: of sampling, where none are given. The scale is 4 for the public priors.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PriorBlock"]  # FSDP shards each as a unit
    lora_targets = ("to_qkv", "to_out")
    prepares_timesteps = True

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        context_length: int,
        width: int,
        depth: int,
        heads: int,
        null_length: int = 2,
        clip_fingerprint: str | None = None,
        learned_variance: bool = False,
        unit_length: bool = True,
        default_steps: int = 25,
        default_guidance_scale: float = 2.0,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        check_sampling_defaults(default_steps, default_guidance_scale)
        # What enters the sequence, and the learned query
        self.from_states = Linear(text_width, width)
        self.from_text = Linear(embed_dim, width)
        self.from_time = TimeEmbedding(width, width)
        self.from_image = Linear(embed_dim, width)
        self.query = nn.Parameter(torch.zeros(width))
        # Of the caption's tokens, then of z_t, the timestep, the noisy z_i and the query
        self.positions = nn.Parameter(torch.randn(context_length + 4, width) * 0.01)
        self.blocks = nn.ModuleList(PriorBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_image = Linear(width, embed_dim * (2 if learned_variance else 1))
        # The statistics of z_i and the encoding of the empty caption, set by `set_embed_statistics`
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("std", torch.full((embed_dim,), embed_dim**-0.5))
        self.register_buffer("null_embedding", torch.zeros(embed_dim))
        self.register_buffer("null_states", torch.zeros(null_length, text_width))

    def forward(self, x: Tensor, t: Tensor, text: TextEncoding) -> Tensor:
        """Return the prediction, (B, D), or (B, 2D) with a learned variance. x: noisy scaled z_i, (B, D); t: (B,)."""
        text = text.expand()
        tokens = torch.cat([embed_caption_tokens(self, text), self.embed_image_tokens(x, t)], dim=1)
        token_mask = torch.cat([text.mask, text.mask.new_ones(len(x), 4)], dim=1)  # (B, L + 4)
        packed, order = PackedSequences.from_token_mask(token_mask)
        tokens = tokens.flatten(0, 1).index_select(0, order)  # (B, L + 4, width) -> (T, width)
        for block in self.blocks[:-1]:
            tokens = run_checkpointed_block(self, block, tokens, packed)
        # Only the query, the last token, is read: the last block computes no other.
        tokens = run_checkpointed_block(self, self.blocks[-1], tokens, packed, True)
        return self.to_image(self.norm(tokens))

    @run_like_forward
    def prepare(self, text: TextEncoding, timesteps: Tensor | None = None) -> PriorContext:
        """Compute the part of `forward` that does not depend on x, once for each different caption.

        timesteps: (S,), those of the sampling, if they are known. Their tokens are computed here too.
        """
        # The sequence [caption, z_t, S timesteps] of U different captions. All timesteps stand at the same position.
        first, groups = text.find_unique_rows()
        text = text.take_rows(first).expand()
        timesteps = text.mask.new_zeros(0, dtype=torch.long) if timesteps is None else timesteps
        timesteps = timesteps[:MAX_PREPARED_TIMESTEPS].to(text.mask.device)
        tokens = embed_caption_tokens(self, text)  # (U, L + 1, width)
        count, length = tokens.shape[:2]
        timestep_tokens = self.from_time(timesteps) + self.positions[-3]
        tokens = torch.cat([tokens, timestep_tokens.expand(count, -1, -1)], dim=1)  # (U, L + 1 + S, width)

        # Caption and z_t are masked causally; a timestep attends to all of them and to itself, to no other timestep.
        token_mask = torch.cat([text.mask, text.mask.new_ones(count, 1)], dim=1)  # (U, L + 1)
        mask = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device).repeat(count, 1, 1, 1)
        causal = torch.ones(mask.shape[2], length, dtype=torch.bool, device=tokens.device).tril()
        mask[..., :length] = token_mask[:, None, None, :] & causal

        # Block by block, keep the keys and values, of B conditions for the caption, of U for the timesteps
        past, timestep_key_values = [], []
        for block in self.blocks:
            tokens, (keys, values) = block.forward_with_key_value(tokens, mask, last=block is self.blocks[-1])
            past.append((keys[groups, :, :length], values[groups, :, :length]))
            keys, values = separate_timesteps(keys[:, :, length:]), separate_timesteps(values[:, :, length:])
            timestep_key_values.append((keys, values))
        return PriorContext(past, token_mask[groups], timesteps, timestep_key_values, groups)

    @run_like_forward
    def step(self, x: Tensor, t: Tensor, context: PriorContext) -> Tensor:
        """Return the prediction: `forward` from the noisy z_i on, or from the timestep on if it was not prepared."""
        tokens = self.embed_image_tokens(x, t)  # (B, 3, width)
        # A timestep that was prepared is taken from the context; others run as a token of their own.
        past = [[pair] for pair in context.past]
        same = t[:, None] == context.timesteps  # (B, S)
        if len(context.timesteps) and same.any(dim=1).all():
            tokens, index = tokens[:, 1:], (context.groups, same.int().argmax(dim=1))
            for pairs, (keys, values) in zip(past, context.timestep_key_values):
                pairs.append((keys[index], values[index]))
        token_mask = torch.cat([context.mask, context.mask.new_ones(len(x), 3)], dim=1)  # (B, L + 4)
        mask = build_causal_mask(token_mask, tokens.shape[1])
        for block, pairs in zip(self.blocks, past):
            tokens, _ = block.forward_with_key_value(tokens, mask, pairs, last=block is self.blocks[-1])
        return self.to_image(self.norm(tokens[:, -1]))

    @torch.no_grad()
    def set_embed_statistics(self, null: TextEncoding, mean: Tensor, std: Tensor) -> None:
        """Store the encoding of the empty caption, and the mean and deviation of each dimension of z_i, (D,)."""
        self.null_embedding.copy_(null.embedding[0])
        self.null_states.copy_(null.states[0])
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-6))

    @run_like_forward
    def null(self, count: int) -> TextEncoding:
        """Return the encoding of the empty caption, `count` times."""
        mask = torch.ones(1, len(self.null_states), dtype=torch.bool, device=self.null_states.device)
        return TextEncoding(self.null_embedding[None], self.null_states[None], mask).repeat(count)

    @run_like_forward
    def scale_image_embeds(self, z_i: Tensor) -> Tensor:
        """Return z_i with zero mean and unit variance in each dimension, as it is denoised."""
        return (z_i - self.mean) / self.std

    @run_like_forward
    def unscale_image_embeds(self, x: Tensor) -> Tensor:
        """Return the z_i of a scaled one, normalised if the CLIP's embeddings have length 1."""
        z_i = x * self.std + self.mean
        return F.normalize(z_i, dim=-1) if self.config.unit_length else z_i

    def embed_image_tokens(self, x: Tensor, t: Tensor) -> Tensor:
        """Return [timestep, noisy z_i, query] at their positions, (B, 3, width)."""
        tokens = torch.stack([self.from_time(t), self.from_image(x), self.query.expand(len(x), -1)], dim=1)
        return tokens + self.positions[-3:]


def embed_caption_tokens(prior: Any, text: TextEncoding) -> Tensor:
    """Return [caption, z_t] at their positions, (B, L + 1, width). z_t keeps its position for captions of any length.

    Raises ValueError for captions beyond the prior's context length.
    """
    length, last = text.mask.shape[1], prior.config.context_length
    if length > last:
        raise ValueError(f"captions must have at most {last} tokens for this prior, got {length}")
    caption = prior.from_states(text.states) + prior.positions[:length]
    scale = prior.config.embed_dim**0.5 if prior.config.get("unit_length", True) else 1.0  # to unit variance
    z_t = prior.from_text(text.embedding * scale) + prior.positions[last]
    return torch.cat([caption, z_t[:, None]], dim=1)


def build_causal_mask(token_mask: Tensor, count: int) -> Tensor:
    """Return what the last `count` tokens attend to: the tokens before them and themselves, (B, 1, count, L), bool.

    token_mask: (B, L), bool, False for padding.
    """
    length = token_mask.shape[1]
    causal = torch.ones(count, length, dtype=torch.bool, device=token_mask.device).tril(length - count)
    return token_mask[:, None, None, :] & causal


def separate_timesteps(x: Tensor) -> Tensor:
    """Bring (U, heads, S, width / heads) to (U, S, heads, 1, width / heads): a pair of indices takes a timestep."""
    return x.transpose(1, 2).unsqueeze(3).contiguous()


class PriorBlock(nn.Module):
    """A block of a pre-norm transformer."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = build_feed_forward(width)
        self.dropout = nn.Dropout(dropout)

    @run_like_forward
    def forward(self, x: Tensor, mask: Tensor | PackedSequences, last: bool = False) -> Tensor:
        """Return the output for x: (B, L, width) with a bool mask, or (T, width) with the layout of its sequences.

        Packed sequences are masked causally. last: of these, return the output of each last token alone, (B, width).
        """
        if not isinstance(mask, PackedSequences):
            return self.forward_with_key_value(x, mask)[0]
        attend = self.attention.attend_last_tokens if last else self.attention.attend_all_tokens
        attended = attend(self.norm_1(x), mask)
        x = (x[mask.last_rows] if last else x) + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm_2(x)))

    @run_like_forward
    def forward_with_key_value(
        self, x: Tensor, mask: Tensor, past: Sequence[KeyValue] = (), last: bool = False
    ) -> tuple[Tensor, KeyValue]:
        """Return the output for x, (B, L, width), and its keys and values; arguments as of `Attention.forward`.

        last: return the output of the last token alone, (B, 1, width).
        """
        attended, key_value = self.attention(self.norm_1(x), mask, past, last)
        x = (x[:, -1:] if last else x) + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm_2(x))), key_value
