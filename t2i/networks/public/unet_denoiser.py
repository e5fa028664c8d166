"""The base of the public decoders: diffusers' UNet2DConditionModel behind the contract of `t2i.diffusion.denoiser`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from t2i.diffusion.condition import ImageCondition
from t2i.diffusion.denoiser import DecoderMixin
from t2i.networks.unet_steps import UNetStepContext, prepare_unet_context, run_unet_step


@dataclass
class UNetDenoiserContext:
    """The condition of B pictures as their U-Net takes it."""

    arguments: dict[str, Any]  # of the U-Net's `forward`
    masked_latents: Tensor | None = None  # (B, C + 1, h, w), to stand beside the noisy latents
    step_context: UNetStepContext | None = None  # of `run_unet_step`; None for a U-Net that it does not support


class UNetDenoiser(DecoderMixin, ModelMixin, ConfigMixin, ABC):
    """A decoder with a U-Net of diffusers, `unet`.

    Subclasses name ModelMixin as a base once more, because diffusers' pipelines look for that name in the module of a
    component's class.
    """

    unet: UNet2DConditionModel
    _supports_gradient_checkpointing = True  # by diffusers' blocks

    @abstractmethod
    def build_unet_context(self, condition: ImageCondition) -> UNetDenoiserContext:
        """Return a condition with a row for each picture as the U-Net's `forward` takes it."""

    def forward(self, x: Tensor, t: Tensor, condition: ImageCondition) -> Tensor:
        """Predict from noisy latents x, (B, C, H, W), at timesteps t, (B,).

        Returns (B, C, H, W), or (B, 2C, H, W) if the U-Net has learned the variance.
        """
        # In one pass each layer makes its own keys and values: FSDP has its weights only while it runs.
        return self.step(x, t, self.build_unet_context(condition.expand()))

    @apply_forward_hook
    def prepare(self, condition: ImageCondition) -> UNetDenoiserContext:
        context = self.build_unet_context(condition.expand())
        unique = condition.find_unique_rows()
        context.step_context = prepare_unet_context(self.unet, **context.arguments, unique_rows=unique)
        return context

    @apply_forward_hook
    def step(self, x: Tensor, t: Tensor, context: UNetDenoiserContext) -> Tensor:
        if context.masked_latents is not None:
            x = torch.cat([x, context.masked_latents], dim=1)
        if context.step_context is not None:
            return run_unet_step(self.unet, x, t, context.step_context)
        return self.unet(x, t, **context.arguments).sample
