"""The diffusion prior: from a caption's encoding to an image embedding (DALL-E 2, section 2.2).

A causal transformer over [caption tokens, z_t, timestep, noisy z_i, query]; the query's output is the clean z_i.
Its arithmetic contains diffusers' PriorTransformer: same order, pre-norm, learned positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.denoiser import PriorMixin
from t2i.networks.layers import (
    Attention,
    KeyValue,
    PackedSequences,
    TimeEmbedding,
    build_feed_forward,
    run_checkpointed_block,
)
from t2i.networks.linear import Linear

MAX_PREPARED_TIMESTEPS = 64  # whose tokens are computed ahead: their keys and values are kept, for every caption


@dataclass
class PriorContext:
    """What depends on the caption and the timestep alone: keys and values of all that stands before the noisy z_i."""

    past: list[KeyValue]  # one pair a block, of the caption's tokens and z_t
    mask: Tensor  # (B, L + 1), bool
    timesteps: Tensor  # (S,): the timesteps that are known already
    timestep_key_values: list[KeyValue]  # one pair a block, for U different captions: (U, S, heads, 1, width / heads)
    rows: Tensor  # (B,): which of the U it is


class Prior(PriorMixin, ModelMixin, ConfigMixin):
    """Denoises z_i, scaled to zero mean and unit variance, given a TextEncoding.

    Args:
        embed_dim: dimensions D of z_t and z_i.
        text_width: dimensions of a caption's token states.
        context_length: longest caption, in tokens.
        width, depth, heads: of the transformer.
        null_length: tokens of the empty caption; a start and an end for most CLIPs.
        clip_fingerprint: of the CLIP that it was trained with.
        learned_variance: it also predicts the variance of the reverse steps, as further D dimensions.
        unit_length: of the CLIP's embeddings: z_t comes scaled to unit variance then, and z_i goes out of unit length.
            False for the public priors, which know embeddings as they are.
        usual_guidance: the guidance scale, if nothing is said; 4 for the public priors.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PriorBlock"]  # what FSDP shards as one
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
        usual_guidance: float = 2.0,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.from_states = Linear(text_width, width)
        self.from_text = Linear(embed_dim, width)
        self.from_time = TimeEmbedding(width, width)
        self.from_image = Linear(embed_dim, width)
        self.query = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.randn(context_length + 4, width) * 0.01)
        self.blocks = nn.ModuleList(PriorBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_image = Linear(width, embed_dim * (2 if learned_variance else 1))
        # The statistics of z_i, and the encoding of the empty caption: set by `train_prior.py`.
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("std", torch.full((embed_dim,), embed_dim**-0.5))
        self.register_buffer("null_embedding", torch.zeros(embed_dim))
        self.register_buffer("null_states", torch.zeros(null_length, text_width))

    @property
    def default_guidance_scale(self) -> float:
        return self.config.get("usual_guidance", 2.0)

    def forward(self, x: Tensor, t: Tensor, text: TextEncoding) -> Tensor:
        """x: (B, D) noisy scaled z_i; t: (B,) timesteps -> (B, D), the clean one; or (B, 2D). What training calls."""
        text = text.expand()
        tokens = torch.cat([embed_caption_tokens(self, text), self.embed_image_tokens(x, t)], dim=1)
        rows, order = PackedSequences.from_token_mask(torch.cat([text.mask, text.mask.new_ones(len(x), 4)], dim=1))
        tokens = tokens.flatten(0, 1).index_select(0, order)
        for block in self.blocks[:-1]:
            tokens = run_checkpointed_block(self, block, tokens, rows)
        return self.to_image(self.norm(run_checkpointed_block(self, self.blocks[-1], tokens, rows, True)))

    @apply_forward_hook
    def prepare(self, text: TextEncoding, times: Tensor | None = None) -> PriorContext:
        """The part of `forward` that does not depend on x, once for each different caption.

        times: (S,), the timesteps that `step` will be asked for, as far as they are known. Their tokens see the caption
        and themselves alone, so that all are computed together here.
        """
        first, rows = text.find_unique_rows()
        text = text.take_rows(first).expand()
        times = (
            text.mask.new_zeros(0, dtype=torch.long)
            if times is None
            else times[:MAX_PREPARED_TIMESTEPS].to(text.mask.device)
        )
        tokens = embed_caption_tokens(self, text)
        count, length = tokens.shape[:2]
        tokens = torch.cat([tokens, (self.from_time(times) + self.positions[-3]).expand(count, -1, -1)], dim=1)
        known = torch.cat([text.mask, text.mask.new_ones(count, 1)], dim=1)
        mask = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device).repeat(count, 1, 1, 1)
        causal = torch.ones(mask.shape[2], length, dtype=torch.bool, device=tokens.device).tril()
        mask[..., :length] = known[:, None, None, :] & causal
        past, at_times = [], []
        for block in self.blocks:
            tokens, pair = block.forward_with_key_value(tokens, mask, last=block is self.blocks[-1])
            keys, values = pair
            past.append((keys[rows, :, :length], values[rows, :, :length]))
            at_times.append((separate_timesteps(keys[:, :, length:]), separate_timesteps(values[:, :, length:])))
        return PriorContext(past, known[rows], times, at_times, rows)

    @apply_forward_hook
    def step(self, x: Tensor, t: Tensor, context: PriorContext) -> Tensor:
        """The rest of it: two tokens instead of the whole sequence, or three at a timestep that was not prepared."""
        tokens, past = self.embed_image_tokens(x, t), [[pair] for pair in context.past]
        same = t[:, None] == context.timesteps
        if len(context.timesteps) and same.any(dim=1).all():
            tokens, at = tokens[:, 1:], (context.rows, same.int().argmax(dim=1))
            for pairs, (keys, values) in zip(past, context.timestep_key_values):
                pairs.append((keys[at], values[at]))
        count = tokens.shape[1]
        mask = torch.cat([context.mask, context.mask.new_ones(len(x), 3)], dim=1)[:, None, None, :]
        mask = mask & torch.ones(count, mask.shape[-1], dtype=torch.bool, device=x.device).tril(mask.shape[-1] - count)
        for block, pairs in zip(self.blocks, past):
            tokens, _ = block.forward_with_key_value(tokens, mask, pairs, last=block is self.blocks[-1])
        return self.to_image(self.norm(tokens[:, -1]))

    @torch.no_grad()
    def set_embed_statistics(self, null: TextEncoding, mean: Tensor, std: Tensor) -> None:
        """Take over the encoding of the empty caption, and each dimension's mean and deviation of z_i, (D,)."""
        self.null_embedding.copy_(null.embedding[0])
        self.null_states.copy_(null.states[0])
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-6))

    def null(self, count: int) -> TextEncoding:
        """The encoding of the empty caption, `count` times."""
        mask = torch.ones(1, len(self.null_states), dtype=torch.bool, device=self.null_states.device)
        return TextEncoding(self.null_embedding[None], self.null_states[None], mask).repeat(count)

    def scale_image_embeds(self, z_i: Tensor) -> Tensor:
        """z_i -> what the prior denoises: zero mean and unit variance in each dimension."""
        return (z_i - self.mean) / self.std

    def unscale_image_embeds(self, x: Tensor) -> Tensor:
        """The reverse, of unit length (if the CLIP's embeddings are) whatever x is."""
        z_i = x * self.std + self.mean
        return F.normalize(z_i, dim=-1) if self.config.unit_length else z_i

    def embed_image_tokens(self, x: Tensor, t: Tensor) -> Tensor:
        """[time, noisy z_i, query] at their positions: (B, 3, width)."""
        tokens = torch.stack([self.from_time(t), self.from_image(x), self.query.expand(len(x), -1)], dim=1)
        return tokens + self.positions[-3:]


def embed_caption_tokens(prior: Any, text: TextEncoding) -> Tensor:
    """[caption, z_t] at their positions: (B, L + 1, width). z_t keeps its place however short the captions are."""
    length, last = text.mask.shape[1], prior.config.context_length
    if length > last:
        raise ValueError(f"a caption has {length} tokens, the prior takes at most {last}")
    caption = prior.from_states(text.states) + prior.positions[:length]
    scale = prior.config.embed_dim**0.5 if prior.config.get("unit_length", True) else 1.0
    z_t = prior.from_text(text.embedding * scale) + prior.positions[last]
    return torch.cat([caption, z_t[:, None]], dim=1)


def separate_timesteps(x: Tensor) -> Tensor:
    """(U, heads, S, width / heads) -> (U, S, heads, 1, width / heads)"""
    return x.transpose(1, 2).unsqueeze(3).contiguous()


class PriorBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = build_feed_forward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | PackedSequences, last: bool = False) -> Tensor:
        """mask: what x, (B, L, width), may look at; or how x, (T, width), is sequences, which look back.

        last: of sequences, only what comes out for the last token of each, (B, width).
        """
        if not isinstance(mask, PackedSequences):
            return self.forward_with_key_value(x, mask)[0]
        normed = self.norm_1(x)
        attended = (
            self.attention.attend_last_tokens(normed, mask) if last else self.attention.attend_all_tokens(normed, mask)
        )
        x = (x[mask.last_rows] if last else x) + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm_2(x)))

    def forward_with_key_value(
        self, x: Tensor, mask: Tensor, past: Sequence[KeyValue] = (), last: bool = False
    ) -> tuple[Tensor, KeyValue]:
        """Also the keys and values of x; training, which has no use for them, does not keep them.

        last: only what comes out for the last token, (B, 1, width).
        """
        attended, key_value = self.attention(self.norm_1(x), mask, past, last)
        x = (x[:, -1:] if last else x) + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm_2(x))), key_value
