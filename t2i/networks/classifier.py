"""A classifier of noisy latents, whose gradient steers in classifier guidance (Dhariwal and Nichol 2021, section 4.1).

Its input is the noise level as an angle, not as a timestep, so it works with every variance-preserving schedule. A
second head predicts the image embedding z_i of the clean image from the noisy one, for CLIP guidance (Liu et al.
2021, "More Control for Free!", section 3.2).
"""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from t2i.checks import check_integer, check_range
from t2i.diffusion.process import alpha_sigma
from t2i.errors import InputError
from t2i.networks.layers import Attention, TimeEmbedding, run_checkpointed_block
from t2i.runtime.hooks import run_like_forward

MAX_LISTED_CLASSES = 8  # in an error message


class LatentClassifier(ModelMixin, ConfigMixin):
    """Classes and image embeddings of noisy latents, (B, C, S, S), at any level of noise.

    Args:
        classes: names of the classes, at least two.
        latent_channels, latent_size: shape (C, S, S) of the latents.
        embed_dim: dimensions of z_i.
        widths: channels at each resolution; each is half the one before.
        depth: convolutional blocks at each resolution.
        heads: number in the self-attention at the lowest resolution.
        dropout: rate for the features that both heads read.
        autoencoder_fingerprint: digest of the autoencoder of these latents.
        clip_fingerprint: digest of the CLIP that computes z_i.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # FSDP shards each as a unit

    @register_to_config
    def __init__(
        self,
        classes: list[str],
        latent_channels: int,
        latent_size: int,
        embed_dim: int,
        widths: list[int],
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        autoencoder_fingerprint: str | None = None,
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        check_integer("latent_size", latent_size, 1, 1024)
        check_integer("depth", depth, 1, 64)
        check_range("dropout", dropout, 0, 0.9)
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise InputError(f"classes must be at least two different names, got {len(classes)}")
        if not widths or latent_size % 2 ** (len(widths) - 1):
            raise InputError(
                f"latents of side {latent_size} cannot be halved {len(widths) - 1} times; use fewer widths"
            )
        self.gradient_checkpointing = False
        # Convolutions, with `depth` blocks at each resolution
        condition_width = 4 * widths[0]
        self.from_level = TimeEmbedding(widths[0], condition_width)
        self.from_latents = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        outputs = [width for width in widths for _ in range(depth)]
        inputs = [widths[0], *outputs[:-1]]
        self.blocks = nn.ModuleList(Block(before, after, condition_width) for before, after in zip(inputs, outputs))
        # Attention over all positions, then two heads on their mean and maximum
        self.norm = nn.LayerNorm(widths[-1])
        self.attention = Attention(widths[-1], heads)
        self.pooled = nn.LayerNorm(2 * widths[-1])
        self.drop = nn.Dropout(dropout)
        self.to_class = nn.Linear(2 * widths[-1], len(classes))
        self.to_embedding = nn.Linear(2 * widths[-1], embed_dim)

    @property
    def min_latent_side(self) -> int:
        """The least side of latents, which are halved between the widths."""
        return 2 ** (len(self.config.widths) - 1)

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, (B, classes), and z_i of unit length, (B, D), of noisy latents x, (B, C, H, W).

        level: (B,) in [0, 1], see `compute_noise_level`.
        """
        condition = F.silu(self.from_level(1000 * level.float()))  # in the range of timesteps, for its frequencies
        x = self.from_latents(x)
        # `depth` blocks at each resolution, then half the sides
        for number, block in enumerate(self.blocks):
            if number and number % self.config.depth == 0:
                x = F.avg_pool2d(x, 2)
            x = run_checkpointed_block(self, block, x, condition)
        # Features of the whole image from those of its places: (B, width, h, w) -> (B, h w, width) -> (B, 2 width)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(self.norm(tokens))[0]
        pooled = self.drop(self.pooled(torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=-1)))
        return self.to_class(pooled), F.normalize(self.to_embedding(pooled), dim=-1)

    @run_like_forward
    def predict_log_probs(self, x: Tensor, level: Tensor) -> Tensor:
        """Return log p(class | x), (B, classes), fp32."""
        return self(x.to(self.dtype), level)[0].float().log_softmax(dim=-1)

    @run_like_forward
    def predict_image_embeds(self, x: Tensor, level: Tensor) -> Tensor:
        """Return z_i of the clean image, (B, D), of unit length, fp32."""
        return F.normalize(self(x.to(self.dtype), level)[1].float(), dim=-1)

    def find_class_index(self, name: str) -> int:
        """Return the index of a class. Raises InputError with the classes there are."""
        classes = list(self.config.classes)
        if name not in classes:
            listed = ", ".join(classes[:MAX_LISTED_CLASSES])
            more = f" and {len(classes) - MAX_LISTED_CLASSES} more" if len(classes) > MAX_LISTED_CLASSES else ""
            raise InputError(f"the classifier has no class {name!r:.80}; it has {listed}{more}")
        return classes.index(name)


class Block(nn.Module):
    """Two convolutions with a shortcut; the noise level scales and shifts the features between them."""

    def __init__(self, channels: int, out: int, condition_width: int):
        super().__init__()
        self.norm_1, self.norm_2 = (nn.GroupNorm(math.gcd(8, width), width) for width in (channels, out))
        self.conv_1, self.conv_2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.modulation = nn.Linear(condition_width, 2 * out)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[..., None, None].chunk(2, dim=1)
        inner = self.norm_2(self.conv_1(F.silu(self.norm_1(x)))) * (1 + scale) + shift
        return self.shortcut(x) + self.conv_2(F.silu(inner))


def compute_noise_level(scheduler: SchedulerMixin, t: Tensor, like: Tensor) -> Tensor:
    """Return the noise level of x_t, (B,), fp32: 0 for a clean sample, 1 for pure noise, whatever the schedule.

    It is the angle a in x_t = cos(a) x0 + sin(a) noise, as a fraction of a right angle. t: () or (B,) timesteps;
    like: (B, ...), a batch with the shape of x_t.
    """
    alpha, sigma = alpha_sigma(scheduler, t, like.float())
    return (torch.atan2(sigma, alpha) * (2 / math.pi)).flatten().expand(len(like))
