"""The autoencoder between images and latents. Only here are latents scaled: outside, they have unit variance."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from t2i.networks.layers import split_into_patches
from t2i.networks.linear import use_onednn_linear
from t2i.runtime.hooks import run_like_forward


class Autoencoder(ModelMixin, ConfigMixin):
    """diffusers' AutoencoderKL, with images optionally cut into patches first, and latents of unit variance.

    Args:
        vae: arguments of `AutoencoderKL`; its input and output have 3 * patch_size**2 channels.
        patch_size: side of the squares of pixels that become channels (space to depth). 1 leaves images as they are;
            4 saves the convolutions at full resolution, which cost most.
        group_norm: True if blocks normalise their input. Without it a step takes little more than half the time, the
            activation is ReLU, and each residual block begins as the identity, so that deep ones train.
    """

    is_cascade = False  # decoding is one pass
    _supports_gradient_checkpointing = True  # in diffusers' blocks
    _no_split_modules = ["ResnetBlock2D"]  # FSDP shards each as a unit

    @register_to_config
    def __init__(self, vae: dict, patch_size: int = 1, group_norm: bool = True):
        super().__init__()
        channels = 3 * patch_size**2
        self.coder = use_onednn_linear(AutoencoderKL(**{**vae, "in_channels": channels, "out_channels": channels}))
        if not group_norm:
            remove_group_norms(self.coder)
        self.register_buffer("mean", torch.zeros(self.channels))
        self.register_buffer("std", torch.ones(self.channels))

    @classmethod
    def from_vae(cls, vae: AutoencoderKL) -> "Autoencoder":
        """Take over a pretrained VAE of diffusers with its published scale."""
        autoencoder = cls({key: value for key, value in vae.config.items() if not key.startswith("_")})
        autoencoder.coder.load_state_dict(vae.state_dict())
        autoencoder.use_published_scale()
        return autoencoder

    def use_published_scale(self) -> None:
        """Scale latents as the configuration of the VAE states."""
        self.std.fill_(1 / self.coder.config.scaling_factor)
        self.mean.fill_(self.coder.config.shift_factor or 0.0)

    @property
    def channels(self) -> int:
        return self.coder.config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return self.config.patch_size * 2 ** (len(self.coder.config.block_out_channels) - 1)

    @run_like_forward
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images, (B, 3, H, W), from sampled latents; also return the KL divergence per value, (B,)."""
        posterior = self.coder.encode(split_into_patches(image, self.config.patch_size)).latent_dist
        reconstruction = F.pixel_shuffle(self.coder.decode(posterior.sample()).sample, self.config.patch_size)
        return reconstruction, posterior.kl() / image[0].numel()

    @run_like_forward
    def encode(self, image: Tensor) -> Tensor:
        """Return latents, (B, C, H / factor, W / factor), of unit variance, of images (B, 3, H, W) in [-1, 1]."""
        latents = self.coder.encode(split_into_patches(image, self.config.patch_size)).latent_dist.mode()
        return (latents - self.mean[:, None, None]) / self.std[:, None, None]

    @run_like_forward
    def decode(self, latents: Tensor) -> Tensor:
        """Return images, (B, 3, h * factor, w * factor), a little beyond [-1, 1], of latents (B, C, h, w)."""
        latents = latents * self.std[:, None, None] + self.mean[:, None, None]
        return F.pixel_shuffle(self.coder.decode(latents).sample, self.config.patch_size)

    def freeze_encoder(self) -> None:
        """Keep the latents of an image as they are: from here on only the decoder's weights are trained."""
        for part in (self.coder.encoder, self.coder.quant_conv):
            if part is not None:  # some VAEs have no convolution there
                part.requires_grad_(False)

    @torch.no_grad()
    def set_latent_statistics(self, images: Iterable[Tensor]) -> None:
        """Set the mean and standard deviation of each latent channel from batches of images, (B, 3, H, W).

        Batches may have different shapes; every position of the latents counts the same.
        """
        # `encode` then returns latents as the coder has them.
        self.mean.zero_()
        self.std.fill_(1)
        # (B, C, h, w) -> (C, B h w), of all batches side by side
        parts = [self.encode(image.to(self.device)).cpu().double().transpose(0, 1).flatten(1) for image in images]
        latents = torch.cat(parts, dim=1)
        self.mean.copy_(latents.mean(dim=1))
        self.std.copy_(latents.std(dim=1, correction=0).clamp(min=1e-6))


def remove_group_norms(model: torch.nn.Module) -> None:
    """Replace a model's group norms by the identity and its SiLU by ReLU, in place, and start residual blocks at 0."""
    for layer in model.modules():
        for name, child in layer.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(layer, name, torch.nn.Identity())
            elif isinstance(child, torch.nn.SiLU):
                setattr(layer, name, torch.nn.ReLU())
        # Without norms, the sum over the blocks of a deep model grows with its depth
        if isinstance(layer, ResnetBlock2D):
            torch.nn.init.zeros_(layer.conv2.weight)
            torch.nn.init.zeros_(layer.conv2.bias)
