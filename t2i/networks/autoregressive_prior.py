"""The autoregressive prior: from a caption's encoding to an image embedding, number by number (DALL-E 2, section 2.2).

z_i is rotated to its principal components, of which those that matter are quantised, in the order of decreasing
variance. A causal transformer over [caption tokens, z_t, z_t . z_i, codes] predicts each code from those before it.

Beside the paper, it may start from a trained regression: the logits of a code are then those of a Gaussian around what
the regression says of it, and the transformer learns the rest. Which of K functions of the caption a position needs is
what a small transformer on little data learns last.
"""

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
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.sampling_loop import Sampling
from t2i.networks.layers import KeyValue, run_checkpointed_block
from t2i.networks.linear import Linear
from t2i.networks.prior import PriorBlock, embed_caption_tokens
from t2i.networks.regression_prior import RegressionPrior


@dataclass
class AutoregressiveContext:
    """What has been read so far, and what it says of the next code; `step` adds to it."""

    past: list[KeyValue]  # one pair a block
    mask: Tensor  # (B, tokens so far), bool
    regression_logits: Tensor | None  # (B, K + 1, buckets), logits by the regression, if there is one
    logits: Tensor  # (B, buckets), of the next code


class AutoregressivePrior(PriorMixin, ModelMixin, ConfigMixin):
    """Predicts the codes of z_i given a TextEncoding; `sample_image_embeds` draws z_i.

    Args:
        embed_dim: dimensions D of z_t and z_i.
        text_width: dimensions of a caption's token states.
        context_length: longest caption, in tokens.
        width, depth, heads: of the transformer.
        components: K, principal components of z_i that are drawn; the others keep their mean.
        buckets: values that a component is quantised to, between the least and the largest of the training data.
        dropout: share of what each block adds that is left out in training.
        regression: arguments of the `RegressionPrior` that it starts from, if any.
        temperature: of the codes when they are drawn; below 1, likely values become likelier.
        null_length: tokens of the empty caption; a start and an end for most CLIPs.
        clip_fingerprint: of the CLIP that it was trained with.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PriorBlock"]  # what FSDP shards as one
    lora_targets = ("to_qkv", "to_out")
    needs_scheduler = takes_noise = False
    takes_temperature = True

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        context_length: int,
        width: int,
        depth: int,
        heads: int,
        components: int,
        buckets: int = 1024,
        dropout: float = 0.0,
        regression: dict[str, Any] | None = None,
        temperature: float = 1.0,
        null_length: int = 2,
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        if not 1 <= components <= embed_dim:
            raise ValueError(f"components must be from 1 to the {embed_dim} dimensions of z_i, got {components}")
        if buckets < 2:
            raise ValueError(f"buckets must be at least 2, got {buckets}")
        self.gradient_checkpointing = False
        self.from_states = Linear(text_width, width)
        self.from_text = Linear(embed_dim, width)
        self.positions = nn.Parameter(torch.randn(context_length + 1 + components, width) * 0.01)
        # A code is read as the number that it stands for, so that neighbours are alike.
        self.directions = nn.Parameter(torch.randn(components, width))
        self.blocks = nn.ModuleList(PriorBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_logits = Linear(width, buckets)
        self.regressor = None
        if regression is not None:
            self.regressor = RegressionPrior(embed_dim, text_width, **regression).requires_grad_(False)
            self.log_width = nn.Parameter(torch.full((components,), 0.1).log())
            nn.init.zeros_(self.to_logits.weight)  # the Gaussian alone
            nn.init.zeros_(self.to_logits.bias)
        # The components and their range, and the encoding of the empty caption: set by `train_prior.py`.
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("basis", torch.eye(embed_dim)[:components].clone())
        self.register_buffer("low", torch.full((components,), -1.0))
        self.register_buffer("high", torch.ones(components))
        self.register_buffer("null_embedding", torch.zeros(embed_dim))
        self.register_buffer("null_states", torch.zeros(null_length, text_width))

    @property
    def default_guidance_scale(self) -> float:
        """2; or 1, off, where it starts from a regression, for guidance takes that too far (docs/priors.md)."""
        return 2.0 if self.config.regression is None else 1.0

    @property
    def codes_per_embedding(self) -> int:
        """Codes of one z_i: its dot product with z_t and its K components."""
        return self.config.components + 1

    def count_steps(self, steps: int) -> int:
        return self.codes_per_embedding

    # z_i as codes

    @torch.no_grad()
    def set_embed_statistics(self, null: TextEncoding, embeddings: Tensor) -> None:
        """Take over the encoding of the empty caption, and the components and their range from z_i, (n, D)."""
        self.null_embedding.copy_(null.embedding[0])
        self.null_states.copy_(null.states[0])
        mean, basis, _ = compute_principal_components(embeddings)
        basis = basis[: self.config.components]
        values = (embeddings.double() - mean) @ basis.T
        low, high = values.amin(dim=0), values.amax(dim=0)
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        self.low.copy_(low)
        self.high.copy_(torch.maximum(high, low + 1e-6))

    def quantise_image_embeds(self, z_t: Tensor, z_i: Tensor) -> Tensor:
        """(B, D), (B, D), unit length -> codes, (B, K + 1), int64: of the dot product, then of the components."""
        values = (z_i.float() - self.mean.float()) @ self.basis.float().T
        share = (values - self.low) / (self.high - self.low)
        dot = ((z_t.float() * z_i.float()).sum(dim=-1, keepdim=True) + 1) / 2
        buckets = self.config.buckets
        return (torch.cat([dot, share], dim=-1) * buckets).long().clamp(0, buckets - 1)

    def dequantise_codes(self, codes: Tensor) -> Tensor:
        """Codes of the dot product and the first k components, (B, 1 + k) -> z_i, (B, D), of unit length, fp32.

        A component between the ends of its range comes back within half a bucket; one that has no code yet as its mean.
        """
        share = (codes[:, 1:].float() + 0.5) / self.config.buckets
        known = slice(0, share.shape[1])
        values = torch.lerp(self.low[known].float(), self.high[known].float(), share)
        return F.normalize(values @ self.basis[known].float() + self.mean.float(), dim=-1)

    # The transformer

    def forward(self, text: TextEncoding, codes: Tensor) -> Tensor:
        """codes: (B, K + 1) -> logits, (B, K + 1, buckets), of each given those before it. What training calls."""
        text, count = text.expand(), codes.shape[1]
        tokens = torch.cat([embed_caption_tokens(self, text), self.embed_code_tokens(codes[:, :-1], 0)], dim=1)
        mask = torch.cat([text.mask, text.mask.new_ones(len(codes), count)], dim=1)[:, None, None, :]
        mask = mask & build_causal_mask(tokens)
        for block in self.blocks:
            tokens = run_checkpointed_block(self, block, tokens, mask)
        logits, guess = self.to_logits(self.norm(tokens[:, -count:])), self.regression_logits(text)
        return logits if guess is None else logits + guess

    @apply_forward_hook
    def prepare(self, text: TextEncoding) -> AutoregressiveContext:
        """The caption read, and the logits of the first code."""
        text = text.expand()
        known = torch.cat([text.mask, text.mask.new_ones(len(text), 1)], dim=1)
        tokens, past = embed_caption_tokens(self, text), []
        mask = known[:, None, None, :] & build_causal_mask(tokens)
        for block in self.blocks:
            tokens, key_value = block.forward_with_key_value(tokens, mask)
            past.append(key_value)
        logits, guess = self.to_logits(self.norm(tokens[:, -1])), self.regression_logits(text)
        return AutoregressiveContext(past, known, guess, logits if guess is None else logits + guess[:, 0])

    @apply_forward_hook
    def step(self, codes: Tensor, position: int, context: AutoregressiveContext) -> None:
        """The code at a position, (B,), read after those before it; changes `context`."""
        tokens = self.embed_code_tokens(codes[:, None], position)
        context.mask = torch.cat([context.mask, context.mask.new_ones(len(codes), 1)], dim=1)
        for i, block in enumerate(self.blocks):
            past = context.past[i]
            tokens, new = block.forward_with_key_value(tokens, context.mask[:, None, None, :], [past])
            context.past[i] = (torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2))
        context.logits = self.to_logits(self.norm(tokens[:, -1]))
        if context.regression_logits is not None:
            context.logits = context.logits + context.regression_logits[:, position + 1]

    def regression_logits(self, text: TextEncoding) -> Tensor | None:
        """(B, K + 1, buckets): the logits of Gaussians around the regression's answer; none for the dot product."""
        if self.regressor is None:
            return None
        answer = self.regressor.sample_image_embeds(text.map_tensors(Tensor.detach))
        values = (answer - self.mean.float()) @ self.basis.float().T
        where = 2 * (values - self.low) / (self.high - self.low) - 1
        buckets = self.config.buckets
        centres = (torch.arange(buckets, device=where.device) + 0.5) * (2 / buckets) - 1
        distance = (centres - where[..., None]) / self.log_width.exp()[:, None]
        return F.pad(-0.5 * distance.square(), (0, 0, 1, 0)).to(text.embedding.dtype)

    def embed_code_tokens(self, codes: Tensor, first: int) -> Tensor:
        """Codes, (B, n), of the positions from `first` on -> (B, n, width)."""
        here = slice(first, first + codes.shape[1])
        number = (codes.to(self.directions.dtype) + 0.5) * (2 / self.config.buckets) - 1
        return number[..., None] * self.directions[here] + self.positions[self.config.context_length + 1 :][here]

    def null(self, count: int) -> TextEncoding:
        """The encoding of the empty caption, `count` times."""
        mask = torch.ones(1, len(self.null_states), dtype=torch.bool, device=self.null_states.device)
        return TextEncoding(self.null_embedding[None], self.null_states[None], mask).repeat(count)

    # Drawing

    @torch.no_grad()
    def sample_image_embeds(
        self,
        text: TextEncoding,
        negative: TextEncoding | None,
        sampling: Sampling,
        temperature: float | None = None,
    ) -> Tensor:
        """Sample z_i of unit length, (N, D), fp32, on the device of `text`.

        The dot product is drawn from the upper half of its distribution, as in the paper, the codes from theirs at a
        temperature (0 takes the likeliest; None is the model's own).

        negative: the captions to guide away from; None is the null. sampling: its steps are the codes, whatever it
        says; with a guidance scale w log-probabilities are negative + w (text - negative); `on_step` gets z_i as far
        as it is known, and cannot change it.
        """
        guidance = self.default_guidance_scale if sampling.guidance is None else sampling.guidance
        scale = Guidance.from_value(guidance).scale
        temperature = self.config.temperature if temperature is None else temperature
        device, count, length = text.device, len(text), self.codes_per_embedding
        uniform = [torch.rand(length, generator=item, device=item.device).to(device) for item in sampling.generators]
        quantiles = torch.stack(uniform, dim=1)
        quantiles[0] = (1 + quantiles[0]) / 2
        text = text.to(device, self.dtype)
        if scale == 1:
            context = self.prepare(text)
        else:
            negative = self.null(count) if negative is None else negative
            context = self.prepare(negative.to(device, self.dtype).cat(text))
        codes = torch.zeros(count, 0, dtype=torch.long, device=device)
        for i in sampling.progress(range(length)):
            logits = context.logits.double().log_softmax(dim=-1)
            if scale != 1:
                away, wanted = logits.chunk(2)
                logits = away.lerp(wanted, scale)
            chosen = select_code_buckets(logits, quantiles[i], 1.0 if i == 0 else temperature)
            codes = torch.cat([codes, chosen[:, None]], dim=1)
            if sampling.on_step is not None:
                sampling.on_step(i, torch.tensor(length - 1 - i), self.dequantise_codes(codes))
            if i + 1 < length:
                self.step(chosen if scale == 1 else chosen.repeat(2), i, context)
        return self.dequantise_codes(codes)


def build_causal_mask(tokens: Tensor) -> Tensor:
    length = tokens.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()


def select_code_buckets(logits: Tensor, where: Tensor, temperature: float) -> Tensor:
    """(B, buckets), (B,) in [0, 1) -> (B,): the bucket that holds this quantile; at temperature 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulated = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    cumulated = cumulated / cumulated[:, -1:]
    return torch.searchsorted(cumulated, where[:, None].to(cumulated.dtype), right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )


def compute_principal_components(embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, D) -> mean, (D,); components of unit length as rows, (D, D), by decreasing variance; variances, (D,)."""
    embeddings = embeddings.double()
    mean = embeddings.mean(dim=0)
    centred = embeddings - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(embeddings))
    return mean, vectors.flip(1).T.contiguous(), variances.flip(0).clamp(min=0)


def count_principal_components(embeddings: Tensor, explained_variance: float) -> int:
    """How many principal components of z_i, (n, D), hold this share of the variance."""
    _, _, variances = compute_principal_components(embeddings)
    share = variances.cumsum(0) / variances.sum().clamp(min=1e-12)
    return min(len(share), int((share < explained_variance - 1e-9).sum()) + 1)
