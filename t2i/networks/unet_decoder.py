"""The decoder as a U-Net: diffusers' UNet2DConditionModel with the contract of `t2i.diffusion.denoiser`."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from t2i.checks import check_integer
from t2i.diffusion.condition import ImageCondition
from t2i.networks.decoder import ImageTokensMixin, count_input_channels, resolve_masked_latents
from t2i.networks.linear import Linear, use_onednn_linear
from t2i.networks.unet_steps import UNetStepContext, prepare_unet_context, run_unet_step


@dataclass
class UNetContext:
    """All that depends on the condition alone."""

    embedding: Tensor  # (B, D): z_i of unit variance, added to the timestep's embedding
    tokens: Tensor  # (B, L, context_width), for cross-attention
    mask: Tensor | None  # (B, L), bool: False for padding; None without padding
    masked_latents: Tensor | None = None  # (B, C + 1, h, w), concatenated to the noisy latents
    step_context: UNetStepContext | None = None  # the condition for `run_unet_step`; None: the U-Net runs by itself


class UNetDecoder(ImageTokensMixin, ModelMixin, ConfigMixin):
    """Denoiser of latents of unit variance, given an ImageCondition.

    Args:
        unet: further arguments of `UNet2DConditionModel`.
        context_width: dimensions of the tokens for cross-attention.
        image_tokens: number of tokens made from z_i.

    The other arguments are those of `Decoder`.
    """

    _supports_gradient_checkpointing = True  # in diffusers' blocks
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]  # FSDP shards each as a unit
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
        check_integer("latent_size", latent_size, 1, 1024)  # first, since no tensor of the model has this size
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
        """Return the prediction, (B, C, H, W); or (B, 2C, H, W) with a learned variance.

        x: (B, C, H, W) noisy latents; t: (B,) timesteps.
        """
        # Here each layer computes its keys and values as it runs: under FSDP it has its weights only then.
        return self.step(x, t, self.build_unet_context(condition))

    @apply_forward_hook
    def prepare(self, condition: ImageCondition) -> UNetContext:
        context = self.build_unet_context(condition)
        context.step_context = prepare_unet_context(
            self.net,
            encoder_hidden_states=context.tokens,
            class_labels=context.embedding,
            encoder_attention_mask=context.mask,
            unique_rows=condition.find_unique_rows(),
        )
        return context

    def build_unet_context(self, condition: ImageCondition) -> UNetContext:
        """Return the condition as the U-Net's own `forward` takes it."""
        condition = condition.expand()
        z_i, tokens, mask = self.embed_condition_tokens(condition)
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
