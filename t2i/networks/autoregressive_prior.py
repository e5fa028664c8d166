"""The autoregressive prior: from a caption's encoding to an image embedding, number by number (DALL-E 2, section 2.2).

z_i is rotated to its principal components. The K with the largest variance are quantised to codes, largest first. A
causal transformer over [caption tokens, z_t, z_t . z_i, codes] predicts each code from those before it.

Beyond the paper, it may start from a trained regression, which a small transformer is slow to learn from little data:
the logits of a code are then those of a Gaussian around the regression's prediction, plus the transformer's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.denoiser import PriorMixin
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.sampling_loop import Sampling
from t2i.networks.layers import KeyValue, run_checkpointed_block
from t2i.networks.linear import Linear
from t2i.networks.prior import PriorBlock, build_causal_mask, embed_caption_tokens
from t2i.networks.regression_prior import RegressionPrior
from t2i.runtime.hooks import run_like_forward


@dataclass
class AutoregressiveContext:
    """The keys and values of the tokens so far, and the logits of the next code; `step` updates both."""

    past: list[KeyValue]  # one pair a block
    mask: Tensor  # (B, tokens so far), bool
    regression_logits: Tensor | None  # (B, K + 1, buckets), if there is a regression
    logits: Tensor  # (B, buckets), of the next code


class AutoregressivePrior(PriorMixin, ModelMixin, ConfigMixin):
    """Predictor of the codes of z_i given a TextEncoding; `sample_image_embeds` samples z_i.

    Args:
        components: K, the principal components of z_i that are sampled; the others keep their mean.
        buckets: number of values of a code, between the least and the largest of the training data.
        dropout: rate for the output of each attention and feed-forward layer.
        regression: arguments of the `RegressionPrior` that it starts from, if any.
        temperature: spread of sampling; below 1, likely codes become likelier.

    The other arguments are those of `Prior`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PriorBlock"]  # FSDP shards each as a unit
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
        # Of the caption's tokens, then of z_t and of all codes but the last
        self.positions = nn.Parameter(torch.randn(context_length + 1 + components, width) * 0.01)
        # A code is embedded by its value times a direction, so that neighbouring codes are alike.
        self.directions = nn.Parameter(torch.randn(components, width))
        self.blocks = nn.ModuleList(PriorBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_logits = Linear(width, buckets)
        self.regressor = None
        if regression is not None:
            self.regressor = RegressionPrior(embed_dim, text_width, **regression).requires_grad_(False)
            self.log_width = nn.Parameter(torch.full((components,), 0.1).log())
            nn.init.zeros_(self.to_logits.weight)  # training starts with the Gaussian alone
            nn.init.zeros_(self.to_logits.bias)
        # The components, their range and the encoding of the empty caption, set by `set_embed_statistics`
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("basis", torch.eye(embed_dim)[:components].clone())
        self.register_buffer("low", torch.full((components,), -1.0))
        self.register_buffer("high", torch.ones(components))
        self.register_buffer("null_embedding", torch.zeros(embed_dim))
        self.register_buffer("null_states", torch.zeros(null_length, text_width))

    @property
    def default_guidance_scale(self) -> float:
        """Default of guidance: 2; or 1, off, if the prior starts from a regression."""
        # Guidance takes z_i too far from a regression's prediction (docs/explanation/priors.md).
        return 2.0 if self.config.regression is None else 1.0

    @property
    def codes_per_embedding(self) -> int:
        """Number of codes of a z_i: K + 1, for its dot product with z_t and its K components."""
        return self.config.components + 1

    def count_steps(self, steps: int) -> int:
        return self.codes_per_embedding

    # z_i as codes

    @torch.no_grad()
    def set_embed_statistics(self, null: TextEncoding, embeddings: Tensor) -> None:
        """Store the encoding of the empty caption, and the principal components of z_i, (n, D), with their ranges."""
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

    @run_like_forward
    def quantise_image_embeds(self, z_t: Tensor, z_i: Tensor) -> Tensor:
        """Return the codes of z_i, (B, K + 1), int64: of the dot product with z_t, then of the components.

        z_t, z_i: (B, D) of unit length.
        """
        values = (z_i.float() - self.mean.float()) @ self.basis.float().T
        fractions = (values - self.low) / (self.high - self.low)  # (B, K), from 0 to 1 in the range
        dot = ((z_t.float() * z_i.float()).sum(dim=-1, keepdim=True) + 1) / 2  # from [-1, 1] to [0, 1]
        buckets = self.config.buckets
        return (torch.cat([dot, fractions], dim=-1) * buckets).long().clamp(0, buckets - 1)

    @run_like_forward
    def dequantise_codes(self, codes: Tensor) -> Tensor:
        """Return z_i, (B, D), of unit length, fp32, from the codes of the dot product and the first k components.

        codes: (B, 1 + k). Components come back within half a bucket; those without a code are their mean.
        """
        fractions = (codes[:, 1:].float() + 0.5) / self.config.buckets  # the middle of each bucket
        count = fractions.shape[1]
        values = torch.lerp(self.low[:count].float(), self.high[:count].float(), fractions)
        return F.normalize(values @ self.basis[:count].float() + self.mean.float(), dim=-1)

    # The transformer

    def forward(self, text: TextEncoding, codes: Tensor) -> Tensor:
        """Return the logits, (B, K + 1, buckets), of codes, (B, K + 1), each given those before it. For training."""
        text, count = text.expand(), codes.shape[1]
        # [caption, z_t, all codes but the last], of which the last K + 1 positions predict the K + 1 codes
        tokens = torch.cat([embed_caption_tokens(self, text), self.embed_code_tokens(codes[:, :-1], 0)], dim=1)
        token_mask = torch.cat([text.mask, text.mask.new_ones(len(codes), count)], dim=1)
        mask = build_causal_mask(token_mask, tokens.shape[1])
        for block in self.blocks:
            tokens = run_checkpointed_block(self, block, tokens, mask)
        logits, regression = self.to_logits(self.norm(tokens[:, -count:])), self.compute_regression_logits(text)
        return logits if regression is None else logits + regression

    @run_like_forward
    def prepare(self, text: TextEncoding) -> AutoregressiveContext:
        """Return the context of captions, with the logits of the first code."""
        text = text.expand()
        token_mask = torch.cat([text.mask, text.mask.new_ones(len(text), 1)], dim=1)  # (B, L + 1)
        tokens, past = embed_caption_tokens(self, text), []
        mask = build_causal_mask(token_mask, tokens.shape[1])
        for block in self.blocks:
            tokens, key_value = block.forward_with_key_value(tokens, mask)
            past.append(key_value)
        logits, regression = self.to_logits(self.norm(tokens[:, -1])), self.compute_regression_logits(text)
        if regression is not None:
            logits = logits + regression[:, 0]
        return AutoregressiveContext(past, token_mask, regression, logits)

    @run_like_forward
    def step(self, codes: Tensor, position: int, context: AutoregressiveContext) -> None:
        """Read the codes at a position, (B,), after those before it; updates `context`."""
        tokens = self.embed_code_tokens(codes[:, None], position)
        context.mask = torch.cat([context.mask, context.mask.new_ones(len(codes), 1)], dim=1)
        for i, block in enumerate(self.blocks):
            keys, values = context.past[i]
            tokens, new = block.forward_with_key_value(tokens, context.mask[:, None, None, :], [(keys, values)])
            context.past[i] = (torch.cat([keys, new[0]], dim=2), torch.cat([values, new[1]], dim=2))
        context.logits = self.to_logits(self.norm(tokens[:, -1]))
        if context.regression_logits is not None:
            context.logits = context.logits + context.regression_logits[:, position + 1]

    def compute_regression_logits(self, text: TextEncoding) -> Tensor | None:
        """Return the logits of Gaussians around the regression's prediction, (B, K + 1, buckets), or None without one.

        They are 0 for the first code, the dot product.
        """
        if self.regressor is None:
            return None
        z_i = self.regressor.sample_image_embeds(text.map_tensors(Tensor.detach))
        values = (z_i - self.mean.float()) @ self.basis.float().T
        means = 2 * (values - self.low) / (self.high - self.low) - 1  # (B, K), from -1 to 1 in the range
        buckets = self.config.buckets
        centres = (torch.arange(buckets, device=means.device) + 0.5) * (2 / buckets) - 1  # (buckets,), on that scale
        distance = (centres - means[..., None]) / self.log_width.exp()[:, None]  # in standard deviations
        return F.pad(-0.5 * distance.square(), (0, 0, 1, 0)).to(text.embedding.dtype)

    def embed_code_tokens(self, codes: Tensor, first: int) -> Tensor:
        """Return the tokens, (B, n, width), of the codes, (B, n), at the positions from `first` on."""
        here = slice(first, first + codes.shape[1])
        values = (codes.to(self.directions.dtype) + 0.5) * (2 / self.config.buckets) - 1  # from -1 to 1
        return values[..., None] * self.directions[here] + self.positions[self.config.context_length + 1 :][here]

    @run_like_forward
    def null(self, count: int) -> TextEncoding:
        """Return the encoding of the empty caption, `count` times."""
        mask = torch.ones(1, len(self.null_states), dtype=torch.bool, device=self.null_states.device)
        return TextEncoding(self.null_embedding[None], self.null_states[None], mask).repeat(count)

    # Sampling

    @torch.no_grad()
    def sample_image_embeds(
        self, text: TextEncoding, negative: TextEncoding | None, sampling: Sampling, temperature: float | None = None
    ) -> Tensor:
        """Sample z_i of unit length, (N, D), fp32, on the device of `text`.

        negative: the captions to guide away from; None is the null. sampling: each code is a step, whatever number of
        steps it has; `on_step` gets z_i from the codes so far, and cannot change it. temperature: spread of all codes
        but the dot product; 0 takes the likeliest, None is the model's own.
        """
        guidance = self.default_guidance_scale if sampling.guidance is None else sampling.guidance
        scale = Guidance.from_value(guidance).scale
        temperature = self.config.temperature if temperature is None else temperature

        # A quantile for each code, (K + 1, N), from each image's generator. The dot product, the first code, is
        # sampled from the upper half of its distribution, as in the paper: z_i is then closer to the caption.
        device, count, length = text.device, len(text), self.codes_per_embedding
        uniform = [torch.rand(length, generator=item, device=item.device).to(device) for item in sampling.generators]
        quantiles = torch.stack(uniform, dim=1)
        quantiles[0] = (1 + quantiles[0]) / 2

        # Guidance runs both captions in one batch
        text = text.to(device, self.dtype)
        if scale == 1:
            context = self.prepare(text)
        else:
            negative = self.null(count) if negative is None else negative
            context = self.prepare(negative.to(device, self.dtype).cat(text))

        # Code by code
        codes = torch.zeros(count, 0, dtype=torch.long, device=device)
        for i in sampling.progress(range(length)):
            logits = context.logits.double().log_softmax(dim=-1)
            if scale != 1:
                negative_logits, positive_logits = logits.chunk(2)
                logits = negative_logits.lerp(positive_logits, scale)
            chosen = select_code_buckets(logits, quantiles[i], 1.0 if i == 0 else temperature)
            codes = torch.cat([codes, chosen[:, None]], dim=1)
            if sampling.on_step is not None:
                sampling.on_step(i, torch.tensor(length - 1 - i), self.dequantise_codes(codes))
            if i + 1 < length:
                self.step(chosen if scale == 1 else chosen.repeat(2), i, context)
        return self.dequantise_codes(codes)


def select_code_buckets(logits: Tensor, quantiles: Tensor, temperature: float) -> Tensor:
    """Return buckets, (B,): those with quantiles (B,) of logits (B, buckets), or the likeliest at temperature 0."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulated = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    cumulated = cumulated / cumulated[:, -1:]  # rounding leaves the last value a little beside 1
    buckets = torch.searchsorted(cumulated, quantiles[:, None].to(cumulated.dtype), right=True)[:, 0]
    return buckets.clamp(max=logits.shape[-1] - 1)


def compute_code_cross_entropy(logits: Tensor, codes: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of codes, (B, L), from logits (B, L, buckets) and the true codes, (B, L), int64.

    smoothing: standard deviation, in buckets, of a Gaussian target around the true bucket; 0 is that bucket alone.
    """
    if smoothing == 0:
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
    distance = (torch.arange(logits.shape[-1], device=codes.device) - codes[..., None]) / smoothing
    return -((-0.5 * distance.square()).softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)


def compute_principal_components(embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, (D,), components of unit length as rows, (D, D), by decreasing variance, and variances, (D,)."""
    embeddings = embeddings.double()
    mean = embeddings.mean(dim=0)
    centred = embeddings - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(embeddings))
    return mean, vectors.flip(1).T.contiguous(), variances.flip(0).clamp(min=0)


def count_principal_components(embeddings: Tensor, explained_variance: float) -> int:
    """Return how many principal components of z_i, (n, D), explain this fraction of the variance."""
    _, _, variances = compute_principal_components(embeddings)
    fractions = variances.cumsum(0) / variances.sum().clamp(min=1e-12)
    return min(len(fractions), int((fractions < explained_variance - 1e-9).sum()) + 1)
