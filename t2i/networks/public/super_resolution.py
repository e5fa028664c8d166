"""Karlo's super-resolution, from 64 to 256 pixels: a diffusion of few steps, the last with a network of its own.

Pipelines have it in the place of the autoencoder: the decoder's "latents" are small images, decoding enlarges them.
"""

from typing import Self

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from t2i.checks import check_integer
from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.sampling_loop import MAX_STEPS, Sampling, sample_from_noise
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components, to_json_types
from t2i.networks.linear import use_onednn_linear
from t2i.networks.unet_steps import prepare_unconditional_context, run_unet_step
from t2i.networks.upsampler import reduce_to_low_resolution
from t2i.runtime.hooks import run_like_forward
from t2i.runtime.memory import run_in_halves


class SuperResolution(ModelMixin, ConfigMixin):
    """Two U-Nets on images in [-1, 1] that read the small image, enlarged, beside the noisy one.

    `encode` and `decode` only resize, for previews and inpainting; `draw_images` is the diffusion.

    Args:
        first, last: arguments of `UNet2DModel`, for all steps but the last, and for the last.
        scheduler: arguments of `UnCLIPScheduler`.
        low_size: side of the small images; the large ones have the networks' sample_size.
    """

    default_steps = 7
    _group_offload_block_modules = ["super_res_first", "super_res_last"]  # have blocks that are offloaded one by one
    is_cascade = True  # `draw_images` is a diffusion of its own

    @register_to_config
    def __init__(self, first: dict, last: dict, scheduler: dict, low_size: int):
        super().__init__()
        check_integer("low_size", low_size, 1, 1024)  # no tensor has this size
        check_integer("sample_size", first.get("sample_size"), 1, 4096)
        if first["sample_size"] % low_size or first["sample_size"] != last.get("sample_size"):
            sizes = f"{first['sample_size']} and {last.get('sample_size')}"
            raise InputError(f"both sample_size must be the same multiple of low_size {low_size}, got {sizes}")
        self.super_res_first = use_onednn_linear(UNet2DModel.from_config(first))
        self.super_res_last = use_onednn_linear(UNet2DModel.from_config(last))
        self.scheduler: SchedulerMixin = UnCLIPRespacedScheduler(**scheduler)

    @classmethod
    def from_components(
        cls, first: Component, last: Component, scheduler: dict, low_size: int, dtype: torch.dtype | None = None
    ) -> Self:
        """Load a folder's `super_res_first` and `super_res_last`. scheduler: the config of `super_res_scheduler`."""
        arguments = {key: value for key, value in scheduler.items() if not key.startswith("_")}
        config = {
            "first": to_json_types(first.get_config_arguments()),
            "last": to_json_types(last.get_config_arguments()),
            "scheduler": to_json_types(arguments),
        }
        parts = {"super_res_first.": first, "super_res_last.": last}
        return load_from_components(lambda: cls(**config, low_size=low_size), parts, dtype)

    @property
    def channels(self) -> int:
        return self.super_res_first.config.in_channels // 2

    @property
    def factor(self) -> int:
        """Factor by which the sides grow."""
        return self.config.first["sample_size"] // self.config.low_size

    def encode(self, image: Tensor) -> Tensor:
        """Shrink images, (B, 3, H, W) in [-1, 1], to (B, 3, H / factor, W / factor), bicubic with antialiasing."""
        return reduce_to_low_resolution(image, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Enlarge images, (B, 3, h, w), to (B, 3, factor h, factor w), bicubic, as the networks read them."""
        size = [self.factor * side for side in latents.shape[-2:]]
        # Karlo sets `antialias`, which changes the kernel even here, where nothing shrinks.
        return F.interpolate(latents.float(), size=size, mode="bicubic", antialias=True).to(latents.dtype)

    @run_like_forward
    @torch.no_grad()
    def draw_images(self, latents: Tensor, sampling: Sampling) -> Tensor:
        """Enlarge small images, (N, 3, h, w), to (N, 3, factor h, factor w) in [-1, 1], fp32, on their device.

        Values beyond [-1, 1] are cut. sampling.noise: like the result.
        """
        check_integer("steps", sampling.steps, 1, MAX_STEPS)
        # The networks read the enlarged small image beside the noisy one.
        low = self.decode(latents.float().clamp(-1, 1))
        noise = sampling.get_noise(low.shape[1:], low.device)
        if noise.shape != low.shape:
            raise InputError(f"the noise must be of shape {tuple(low.shape)}, got {tuple(noise.shape)}")

        networks, dtype = (self.super_res_first, self.super_res_last), self.dtype
        contexts = [prepare_unconditional_context(network, low.to(dtype)) for network in networks]

        # The last step has a network of its own.
        def predict(x: Tensor, t: Tensor) -> Tensor:
            timesteps = self.scheduler.timesteps
            is_last = bool(t == timesteps[timesteps >= 0][-1])
            network, context = networks[is_last], contexts[is_last]

            def predict_rows(x: Tensor, low: Tensor) -> Tensor:
                both = torch.cat([x, low], dim=1).to(dtype)
                if context is None:
                    return network(both, t).sample.to(x.dtype)
                return run_unet_step(network, both, t.expand(len(both)), context).to(x.dtype)

            return run_in_halves(predict_rows, x, low)

        return sample_from_noise(predict, self.scheduler, noise, sampling).clamp(-1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Shrink and enlarge images without a network."""
        return self.decode(self.encode(image))
