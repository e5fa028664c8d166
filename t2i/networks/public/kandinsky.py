"""Kandinsky's decoders: the U-Nets of 2.1 and 2.2 behind the contract of `t2i.diffusion.denoiser`.

2.2 is told z_i alone, twice: added to the timestep, and as 32 tokens to attend to. 2.1 also reads the caption as a
text encoder of its own says it: one vector, added to the timestep, and a state a token.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from t2i.checks import check_integer
from t2i.diffusion.condition import ImageCondition, TokenStates
from t2i.diffusion.denoiser import DecoderMixin
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components
from t2i.networks.decoder import resolve_masked_latents
from t2i.networks.linear import use_onednn_linear
from t2i.networks.unet_steps import UNetStepContext, prepare_unet_context, run_unet_step

VERSIONS_BY_CONDITION = {  # what a U-Net is told, by its addition_embed_type and encoder_hid_dim_type
    ("image", "image_proj"): "2.2",
    ("text_image", "text_image_proj"): "2.1",
}
CAPTION_LENGTH = 77  # tokens that 2.1 attends to, whatever the caption's length
NULL_BUFFERS = ("null_embedding", "null_states", "null_pooled")


@dataclass
class KandinskyContext:
    condition: dict[str, Any]  # as the U-Net's `forward` takes it
    step_context: UNetStepContext | None  # the same, as its steps take it; None for a U-Net that they do not know
    masked_latents: Tensor | None  # (B, C + 1, h, w): the latents that stay, and 1 where they do


class KandinskyDecoder(DecoderMixin, ModelMixin, ConfigMixin):
    """Denoises MoVQ's latents, given an ImageCondition with z_i as CLIP's projection has it.

    The other arguments follow from `model`; `derive_kandinsky_config` says them.

    Args:
        model: arguments of `UNet2DConditionModel`.
        embed_dim: dimensions D of z_i.
        latent_channels, latent_size: shape (C, S, S) of the latents it is trained on.
        learned_variance: it also predicts the variance of the reverse steps, as further C channels.
        reads_masks: it sees what is to stay of a picture; see `t2i.diffusion.inpainting`.
        text_width: dimensions of a caption's token states; None if it reads no captions, as 2.2.
        clip_fingerprint: None, for the public files do not say what they were trained with.
        text_encoder_fingerprint: of the text encoder that said the empty caption of the null; None of 2.2.
    """

    default_guidance_scale, default_steps = 4.0, 100  # of the reference's pipelines
    _supports_gradient_checkpointing = True  # diffusers' blocks do it
    _no_split_modules = ["ResnetBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"]
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")

    @register_to_config
    def __init__(
        self,
        model: dict[str, Any],
        embed_dim: int,
        latent_channels: int,
        latent_size: int,
        learned_variance: bool = True,
        reads_masks: bool = False,
        text_width: int | None = None,
        clip_fingerprint: str | None = None,
        text_encoder_fingerprint: str | None = None,
    ):
        super().__init__()
        for key, value in derive_kandinsky_config(model).items():
            if self.config[key] != value:
                raise InputError(f"{key} is {self.config[key]!r:.80}, but {value!r} follows from the U-Net's settings")
        # from_config passes over settings of older versions.
        self.unet = use_onednn_linear(UNet2DConditionModel.from_config(dict(model)))
        # What guidance goes away from: CLIP's embedding of the zero picture and, of 2.1, the encoding of "".
        self.register_buffer("null_embedding", torch.zeros(embed_dim))
        if text_width is not None:
            self.register_buffer("null_states", torch.zeros(CAPTION_LENGTH, text_width))
            self.register_buffer("null_pooled", torch.zeros(embed_dim))

    @classmethod
    def from_component(cls, part: Component, dtype: torch.dtype | None = None) -> Self:
        """Of a public folder `unet`; its null is still to be set, by `set_null_condition`.

        Raises InputError, in one line, for one that is no whole U-Net of Kandinsky's.
        """
        settings = part.get_config_arguments()
        known = derive_kandinsky_config(settings)
        extra = NULL_BUFFERS if known["text_width"] is not None else NULL_BUFFERS[:1]
        return load_from_components(lambda: cls(settings, **known), {"unet.": part}, dtype, extra=extra)

    @torch.no_grad()
    def set_null_condition(self, clip: Any, text_encoder: Any = None) -> None:
        """Set what guidance goes away from, by the pipeline's own encoders; text_encoder: for 2.1.

        Raises InputError if the CLIP has no image encoder, or the text encoder is missing.
        """
        self.null_embedding.copy_(clip.encode_zero_image()[0])
        if self.config.text_width is not None:
            if text_encoder is None:
                raise InputError("this decoder (Kandinsky 2.1) reads captions: it needs its text_encoder")
            empty = text_encoder.encode([""])
            self.null_states.copy_(empty.states[0])
            self.null_pooled.copy_(empty.pooled[0])
            self.register_to_config(text_encoder_fingerprint=text_encoder.identity)

    def forward(self, x: Tensor, t: Tensor, condition: ImageCondition) -> Tensor:
        """x: (B, C, H, W) noisy latents; t: (B,) timesteps -> (B, C, H, W), the prediction; or (B, 2C, H, W)."""
        # In one pass each layer makes its own keys and values: FSDP has its weights only while it runs.
        return self.step(x, t, self.build_unet_context(condition.expand()))

    @apply_forward_hook
    def prepare(self, condition: ImageCondition) -> KandinskyContext:
        unique, context = condition.find_unique_rows(), self.build_unet_context(condition.expand())
        context.step_context = prepare_unet_context(self.unet, **context.condition, unique_rows=unique)
        return context

    def build_unet_context(self, condition: ImageCondition) -> KandinskyContext:
        """The condition as the U-Net takes it."""
        known, text = resolve_masked_latents(self, condition), None
        if self.config.text_width is not None:
            if not isinstance(condition.text, TokenStates) or condition.text.pooled is None:
                raise ValueError("this decoder reads captions: its condition needs a text with its pooled vector")
            text = condition.text
        if known is not None:  # the public models have 1 where the picture stays
            known = torch.cat([known[:, :-1], 1 - known[:, -1:]], dim=1)
        told = {"image_embeds": condition.embedding} | ({} if text is None else {"text_embeds": text.pooled})
        states = None if text is None else text.states
        return KandinskyContext({"encoder_hidden_states": states, "added_cond_kwargs": told}, None, known)

    @apply_forward_hook
    def step(self, x: Tensor, t: Tensor, context: KandinskyContext) -> Tensor:
        if context.masked_latents is not None:
            x = torch.cat([x, context.masked_latents], dim=1)
        if context.step_context is not None:
            return run_unet_step(self.unet, x, t, context.step_context)
        return self.unet(x, t, **context.condition).sample

    def null(self, count: int) -> ImageCondition:
        """The zero picture's embedding and, of 2.1, the empty caption."""
        text = None
        if self.config.text_width is not None:
            states = self.null_states[None]
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            text = TokenStates(states, mask, self.null_pooled[None])
        return ImageCondition(self.null_embedding[None], text).repeat(count)


def derive_kandinsky_config(unet: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a KandinskyDecoder that follow from its U-Net's settings.

    Raises InputError for the U-Net of another model.
    """
    kinds = unet.get("addition_embed_type"), unet.get("encoder_hid_dim_type")
    if kinds[0] == "image_hint":
        raise InputError(
            "this is the U-Net of Kandinsky 2.2's ControlNet (addition_embed_type image_hint): it needs a depth "
            "picture at every step, which no pipeline here has; take kandinsky-2-2-decoder"
        )
    if kinds not in VERSIONS_BY_CONDITION:
        found = f"addition_embed_type {kinds[0]!r:.80} and encoder_hid_dim_type {kinds[1]!r:.80}"
        raise InputError(f"this U-Net has {found}; Kandinsky's have image and image_proj, or text_image(_proj)")
    width, outer = unet.get("cross_attention_dim", 1280), unet.get("encoder_hid_dim")
    check_integer("cross_attention_dim", width, 1, 100_000)
    check_integer("encoder_hid_dim", outer, 1, 100_000)
    check_integer("sample_size", unet.get("sample_size"), 1, 1024)  # no tensor has this size
    read, made = unet.get("in_channels", 4), unet.get("out_channels", 4)
    channels = read if made in (read, 2 * read) else (read - 1) // 2
    if read not in (channels, 2 * channels + 1) or made not in (channels, 2 * channels):
        raise InputError(f"this U-Net has {read} channels in and {made} out; Kandinsky's have 4 or 9, and 8")
    captions = VERSIONS_BY_CONDITION[kinds] == "2.1"
    return {
        "embed_dim": width if captions else outer,
        "latent_channels": channels,
        "latent_size": unet["sample_size"],
        "learned_variance": made == 2 * channels,
        "reads_masks": read != channels,
        "text_width": outer if captions else None,
    }
