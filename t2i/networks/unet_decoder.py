"""The decoder as a U-Net: diffusers' UNet2DConditionModel behind the contract of `t2i.diffusion.denoiser`."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from t2i.checks import check_integer
from t2i.diffusion.condition import ImageCondition
from t2i.diffusion.denoiser import DecoderMixin
from t2i.networks.decoder import (
    build_null_condition,
    count_input_channels,
    embed_condition_tokens,
    resolve_masked_latents,
)
from t2i.networks.linear import Linear, use_onednn_linear
from t2i.networks.unet_steps import UNetStepContext, prepare_unet_context, run_unet_step


@dataclass
class UNetContext:
    embedding: Tensor  # (B, D): z_i of unit variance, added to the timestep
    tokens: Tensor  # (B, L, context_width), to attend to
    mask: Tensor | None  # (B, L), bool
    masked_latents: Tensor | None = None  # (B, C + 1, h, w), to stand beside the noisy latents
    step_context: UNetStepContext | None = (
        None  # the same, as the U-Net's steps take it; None for one that they do not know
    )


class UNetDecoder(DecoderMixin, ModelMixin, ConfigMixin):
    """Denoises latents of unit variance, given an ImageCondition.

    Args:
        embed_dim: dimensions D of z_i.
        latent_channels, latent_size: shape (C, S, S) of the latents it is trained on.
        unet: further arguments of `UNet2DConditionModel`.
        context_width: dimensions of the tokens that it attends to.
        image_tokens: tokens made from z_i.
        text_width: dimensions of a caption's token states; None if it reads no captions.
        clip_fingerprint: of the CLIP that it was trained with.
        learned_variance: it also predicts the variance of the reverse steps, as further C channels.
        reads_masks: it sees what is to stay of a picture; see `t2i.diffusion.inpainting`.
        text_encoder_fingerprint: of the text encoder that its captions come from; None if they come from CLIP.
    """

    _supports_gradient_checkpointing = True  # diffusers' blocks do it
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]  # what FSDP shards as one
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        latent_channels: int,
        latent_size: int,
        unet: dict,
        context_width: int = 128,
        image_tokens: int = 4,
        text_width: int | None = None,
        clip_fingerprint: str | None = None,
        learned_variance: bool = False,
        reads_masks: bool = False,
        text_encoder_fingerprint: str | None = None,
    ):
        super().__init__()
        check_integer("latent_size", latent_size, 1, 1024)  # no tensor has this size
        self.to_tokens = Linear(embed_dim, image_tokens * context_width)
        self.from_text = None if text_width is None else Linear(text_width, context_width)
        self.net = use_onednn_linear(
            UNet2DConditionModel(
                sample_size=latent_size,
                in_channels=count_input_channels(latent_channels, reads_masks),
                out_channels=latent_channels * (2 if learned_variance else 1),
                cross_attention_dim=context_width,
                class_embed_type="projection",
                projection_class_embeddings_input_dim=embed_dim,
                **unet,
            )
        )

    def forward(self, x: Tensor, t: Tensor, condition: ImageCondition) -> Tensor:
        """x: (B, C, H, W) noisy latents; t: (B,) timesteps -> (B, C, H, W), the prediction; or (B, 2C, H, W)."""
        # In one pass each layer makes its own keys and values: FSDP has its weights only while it runs.
        return self.step(x, t, self.build_unet_context(condition.expand()))

    @apply_forward_hook
    def prepare(self, condition: ImageCondition) -> UNetContext:
        unique, context = condition.find_unique_rows(), self.build_unet_context(condition.expand())
        context.step_context = prepare_unet_context(
            self.net, context.tokens, context.embedding, None, context.mask, unique
        )
        return context

    def build_unet_context(self, condition: ImageCondition) -> UNetContext:
        """The condition as the U-Net takes it."""
        z_i, tokens, mask = embed_condition_tokens(self, condition)
        return UNetContext(z_i, tokens, mask, resolve_masked_latents(self, condition))

    @apply_forward_hook
    def step(self, x: Tensor, t: Tensor, context: UNetContext) -> Tensor:
        if context.masked_latents is not None:
            x = torch.cat([x, context.masked_latents], dim=1)
        if context.step_context is not None:
            return run_unet_step(self.net, x, t, context.step_context)
        return self.net(
            x, t, context.tokens, class_labels=context.embedding, encoder_attention_mask=context.mask
        ).sample

    def null(self, count: int) -> ImageCondition:
        """The zero embedding, and a caption of no tokens."""
        return build_null_condition(self, count)
