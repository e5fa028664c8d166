"""The upsampler: a denoiser of images conditioned on the same image in low resolution.

Ho et al. 2021, "Cascaded Diffusion Models", section 3: the low resolution is resized and concatenated to the noisy
image, noised a little, so that errors of the stage before are redrawn instead of enlarged.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from t2i.checks import check_choice, check_integer, check_range
from t2i.diffusion.condition import Condition
from t2i.errors import InputError
from t2i.networks.layers import TimeEmbedding, split_into_patches
from t2i.networks.linear import use_onednn_linear
from t2i.runtime.hooks import find_compute_device, run_like_forward

UPSAMPLING_FACTORS = (2, 4)


@dataclass
class LowResolution(Condition):
    """The images to enlarge: the condition of the upsampler."""

    low: Tensor  # (B, 3, h, w) in [-1, 1], noised by `augment_low_resolution`
    level: Tensor  # (B,) in [0, 1]: of that noise
    embedding: Tensor | None = None  # (B, D), unit length or zero: z_i, for upsamplers that take it


@dataclass
class UpsamplerContext:
    low: Tensor  # (B, 3, H, W): the low resolution, resized
    embedding: Tensor  # (B, E): level and z_i, added to the timestep

    def crop_window(self, rows: slice, columns: slice) -> Self:
        """Return the context of a part of the images."""
        return replace(self, low=self.low[..., rows, columns])


class Upsampler(ModelMixin, ConfigMixin):
    """Denoiser of images, (B, 3, H, W) in [-1, 1], given a LowResolution whose sides are smaller by `factor`.

    Without attention in `unet` it is convolutional, and works on images of any size that is a multiple of
    `image_size_multiple`.

    Args:
        factor: 2 or 4.
        low_size: side of the low resolution in training, where it is a crop; other sizes work as well.
        unet: arguments of `UNet2DModel`; its channels in and out are those of the patches.
        patch_size: side of the squares of pixels that become channels (space to depth), as in the autoencoder.
        max_level: the largest augmentation in training.
        adds_detail: the network predicts the difference to the resized low resolution. For schedulers whose
            prediction_type is `sample`; false for the others.
        embed_dim: dimensions of z_i; None if the upsampler takes none.
        clip_fingerprint: digest of the CLIP that computes z_i.
    """

    _supports_gradient_checkpointing = True  # in diffusers' blocks
    _group_offload_block_modules = ["net"]  # has blocks that are offloaded one by one
    _no_split_modules = ["ResnetBlock2D"]  # FSDP shards each as a unit

    @register_to_config
    def __init__(
        self,
        factor: int,
        low_size: int,
        unet: dict,
        patch_size: int = 1,
        max_level: float = 0.5,
        adds_detail: bool = True,
        embed_dim: int | None = None,
        clip_fingerprint: str | None = None,
    ):
        super().__init__()
        check_choice("factor", factor, UPSAMPLING_FACTORS)
        check_integer("low_size", low_size, 4, 4096)
        check_integer("patch_size", patch_size, 1, 16)
        check_range("max_level", max_level, 0, 1)
        channels = 3 * patch_size**2
        # Both images enter; the embedding of level and z_i takes the place of a class.
        fixed = {"in_channels": 2 * channels, "out_channels": channels, "class_embed_type": "identity"}
        self.net = use_onednn_linear(UNet2DModel(**{"add_attention": False, **unet, **fixed}))
        self.net._no_split_modules = self._no_split_modules  # diffusers has none, and asks for them
        nn.init.zeros_(self.net.conv_out.weight)  # so with `adds_detail` training starts from the resized image
        nn.init.zeros_(self.net.conv_out.bias)
        width = self.net.config.block_out_channels[0]
        self.from_level = TimeEmbedding(width, self.net.time_embedding.linear_2.out_features)
        self.from_image = None if embed_dim is None else nn.Linear(embed_dim, self.from_level.linear_2.out_features)

    @property
    def image_size_multiple(self) -> int:
        """The number that must divide the sides of an image, in pixels of the high resolution."""
        return self.config.patch_size * 2 ** (len(self.net.config.block_out_channels) - 1)

    @run_like_forward
    def forward(self, x: Tensor, t: Tensor, condition: LowResolution) -> Tensor:
        """Return the prediction, (B, 3, H, W), for noisy images x, (B, 3, H, W), at timesteps t, (B,)."""
        return self.step(x, t, self.prepare(condition))

    @run_like_forward
    def prepare(self, condition: LowResolution) -> UpsamplerContext:
        if (condition.embedding is None) != (self.from_image is None):
            takes, got = ("no z_i", "with") if self.from_image is None else ("z_i", "without")
            raise InputError(f"this upsampler takes {takes}, got a condition {got} it")
        embedding = self.from_level(1000 * condition.level)  # in the range of timesteps, for its frequencies
        if self.from_image is not None:  # scaled to unit variance
            embedding = embedding + self.from_image(condition.embedding * self.config.embed_dim**0.5)
        return UpsamplerContext(enlarge_low_resolution(condition.low, self.config.factor), embedding)

    @run_like_forward
    def step(self, x: Tensor, t: Tensor, context: UpsamplerContext) -> Tensor:
        if x.shape != context.low.shape:
            size, expected = ("x".join(map(str, tensor.shape[-2:])) for tensor in (x, context.low))
            raise InputError(f"image must have {expected} pixels as the enlarged low resolution, got {size}")
        if any(side % self.image_size_multiple or not side for side in x.shape[-2:]):
            sides = " x ".join(map(str, x.shape[-2:]))
            raise InputError(f"the image's sides must be multiples of {self.image_size_multiple} pixels, got {sides}")
        # The network sees both images as patches: (B, 3, H, W) twice -> (B, 6 p^2, H / p, W / p)
        both = torch.cat([split_into_patches(image, self.config.patch_size) for image in (x, context.low)], dim=1)
        out = F.pixel_shuffle(self.net(both, t, class_labels=context.embedding).sample, self.config.patch_size)
        return out + context.low if self.config.adds_detail else out

    def null(self, count: int) -> LowResolution:
        """Return images at noise level 1, where nothing is left of them, in the size of training."""
        side, dim = self.config.low_size, self.config.embed_dim
        options: dict[str, Any] = {"device": find_compute_device(self), "dtype": self.dtype}
        embedding = None if dim is None else torch.zeros(count, dim, **options)
        return LowResolution(torch.zeros(count, 3, side, side, **options), torch.ones(count, **options), embedding)


def augment_low_resolution(low: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Noise images, (B, 3, h, w), by levels, (B,): 0 changes nothing, 1 leaves only noise (section 3)."""
    level = level.view(-1, 1, 1, 1)
    return (1 - level.square()).sqrt() * low + level * noise


def enlarge_low_resolution(low: Tensor, factor: int) -> Tensor:
    """Enlarge images, (B, 3, h, w), without a model: bicubic, to (B, 3, factor h, factor w)."""
    return F.interpolate(low.float(), scale_factor=factor, mode="bicubic").to(low.dtype)


def reduce_to_low_resolution(image: Tensor, factor: int) -> Tensor:
    """Reduce images, (B, 3, H, W), to (B, 3, H / factor, W / factor), bicubic with antialiasing, within [-1, 1]."""
    height, width = image.shape[-2:]
    if height % factor or width % factor:
        raise InputError(f"the image's sides must be multiples of the factor {factor}, got {width} x {height}")
    size = (height // factor, width // factor)
    # In fp32: there is no such kernel in half precision on processors.
    reduced = F.interpolate(image.float(), size=size, mode="bicubic", antialias=True)
    return reduced.clamp(-1, 1).to(image.dtype)
