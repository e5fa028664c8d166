"""Decoders with a U-Net of diffusers behind the contract of `t2i.diffusion.denoiser`; this project's own is one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from t2i.checks import check_integer
from t2i.diffusion.condition import ImageCondition
from t2i.diffusion.denoiser import DecoderMixin
from t2i.diffusion.sampling_loop import check_sampling_defaults
from t2i.networks.decoder import ImageTokensMixin, concat_masks, count_input_channels, resolve_masked_latents
from t2i.networks.linear import Linear, use_onednn_linear
from t2i.networks.unet_steps import UNetStepContext, prepare_unet_context, run_unet_step
from t2i.runtime.hooks import run_like_forward


@dataclass
class UNetDenoiserContext:
    """The condition of B images as their U-Net takes it."""

    arguments: dict[str, Any]  # of the U-Net's `forward`
    masked_latents: Tensor | None = None  # (B, C + 1, h, w), concatenated to the noisy latents
    step_context: UNetStepContext | None = None  # of `run_unet_step`; None for a U-Net that it does not support


class UNetDenoiser(DecoderMixin, ModelMixin, ConfigMixin, ABC):
    """A decoder with a U-Net of diffusers, `unet`.

    Subclasses name ModelMixin as a base once more, because diffusers' pipelines look for that name in the module of a
    component's class.
    """

    unet: Any
    _group_offload_block_modules: ClassVar[list[str]] = ["unet"]  # has blocks that are offloaded one by one
    _supports_gradient_checkpointing = True  # in diffusers' blocks

    @property
    def latent_multiple(self) -> int:
        return 2 ** (len(self.unet.config.block_out_channels) - 1)  # each level but the last halves the sides

    @abstractmethod
    def build_unet_context(self, condition: ImageCondition) -> UNetDenoiserContext:
        """Return a condition with a row for each image as the U-Net's `forward` takes it."""

    @run_like_forward
    def forward(self, x: Tensor, t: Tensor, condition: ImageCondition) -> Tensor:
        """Return the prediction, (B, C, H, W), or (B, 2C, H, W) with a learned variance. x: noisy latents; t: (B,)."""
        # Here each layer computes its keys and values as it runs: under FSDP it has its weights only then.
        return self.step(x, t, self.build_unet_context(condition.expand()))

    @run_like_forward
    def prepare(self, condition: ImageCondition) -> UNetDenoiserContext:
        context = self.build_unet_context(condition.expand())
        unique = condition.find_unique_rows()
        context.step_context = prepare_unet_context(self.unet, **context.arguments, unique_rows=unique)
        return context

    @run_like_forward
    def step(self, x: Tensor, t: Tensor, context: UNetDenoiserContext) -> Tensor:
        if context.masked_latents is not None:
            x = concat_masks(x, context.masked_latents)
        if context.step_context is not None:
            return run_unet_step(self.unet, x, t, context.step_context)
        return self.unet(x, t, **context.arguments).sample


class UNetDecoder(ImageTokensMixin, UNetDenoiser, ModelMixin):
    """Denoiser of latents of unit variance, given an ImageCondition.

    Args:
        unet: further arguments of `UNet2DConditionModel`.
        context_width: dimensions of the tokens for cross-attention.
        image_tokens: number of tokens made from z_i.

    The other arguments are those of `Decoder`.
    """

    _group_offload_block_modules = ["net"]
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
        default_steps: int = 25,
        default_guidance_scale: float = 1.5,
    ):
        super().__init__()
        check_sampling_defaults(default_steps, default_guidance_scale)
        check_integer("latent_size", latent_size, 1, 1024)  # first, since no tensor of the model has this size
        self.to_tokens = Linear(embed_dim, image_tokens * context_width)
        self.from_text = None if text_width is None else Linear(text_width, context_width)
        # z_i takes the place of a class: it is projected and added to the timestep.
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

    @property
    def unet(self) -> UNet2DConditionModel:  # type: ignore[override]
        """The U-Net. Its tensors have the prefix "net." in files."""
        return self.net

    def build_unet_context(self, condition: ImageCondition) -> UNetDenoiserContext:
        z_i, tokens, mask = self.embed_condition_tokens(condition)
        arguments = {"encoder_hidden_states": tokens, "class_labels": z_i, "encoder_attention_mask": mask}
        return UNetDenoiserContext(arguments, resolve_masked_latents(self, condition))
