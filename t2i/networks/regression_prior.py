"""The regression prior: z_i as a function of the caption, always the same. A baseline to measure priors against."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from t2i.checks import check_choice
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.denoiser import PriorMixin
from t2i.networks.linear import Linear
from t2i.runtime.hooks import run_like_forward

REGRESSION_KINDS = ("linear", "mlp")


class RegressionPrior(PriorMixin, ModelMixin, ConfigMixin):
    """Predictor of z_i, scaled to zero mean and unit variance, from a TextEncoding.

    Args:
        embed_dim: dimensions D of z_t and z_i.
        text_width: dimensions of a caption's token states.
        kind: "linear", of z_t alone; or "mlp", of z_t and the mean of the token states.
        width, depth: sizes of the hidden layers of an mlp.
        dropout: rate for the hidden values.
        clip_fingerprint: digest of the CLIP in training.
    """

    _no_split_modules = ["Linear"]
    lora_targets = ("layers",)
    needs_scheduler = takes_noise = takes_guidance = False

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        kind: str = "linear",
        width: int = 512,
        depth: int = 2,
        dropout: float = 0.0,
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        check_choice("kind", kind, REGRESSION_KINDS)
        if kind == "linear":
            self.layers = nn.Sequential(Linear(embed_dim, embed_dim))
        else:
            hidden: list[nn.Module] = []
            for i in range(depth):
                inputs = embed_dim + text_width if i == 0 else width
                hidden += [Linear(inputs, width), nn.GELU(), nn.Dropout(dropout)]
            self.layers = nn.Sequential(*hidden, Linear(width, embed_dim))
        # The statistics of z_i, set by `set_embed_statistics`
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("std", torch.full((embed_dim,), embed_dim**-0.5))

    def forward(self, text: TextEncoding) -> Tensor:
        """Return the scaled z_i, (B, D)."""
        text = text.expand()
        z_t = text.embedding * self.config.embed_dim**0.5  # to unit variance
        if self.config.kind == "linear":
            return self.layers(z_t)
        mask = text.mask[..., None].to(text.states.dtype)
        pooled = (text.states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return self.layers(torch.cat([z_t, pooled], dim=-1))

    @torch.no_grad()
    def sample_image_embeds(self, text: TextEncoding) -> Tensor:
        """Return z_i of unit length, (N, D), fp32, on the device of `text`: always the same for a caption."""
        return self.unscale_image_embeds(self(text.to(text.embedding.device, self.dtype)).float())

    @torch.no_grad()
    def set_embed_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the mean and deviation of each dimension of z_i, (D,)."""
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-6))

    @run_like_forward
    def scale_image_embeds(self, z_i: Tensor) -> Tensor:
        """Return z_i with zero mean and unit variance in each dimension."""
        return (z_i - self.mean) / self.std

    @run_like_forward
    def unscale_image_embeds(self, x: Tensor) -> Tensor:
        """Return the normalised z_i of a scaled one."""
        return F.normalize(x * self.std + self.mean, dim=-1)
