"""Karlo's decoder: a U-Net on pixels that reads z_i, z_t and the caption's tokens (DALL-E 2, section 2.1).

It is GLIDE's (Nichol et al. 2021), with z_t and z_i added to the timestep, and z_i once more as four tokens.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from t2i.checks import check_choice, check_integer
from t2i.diffusion.condition import ImageCondition, TokenStates
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components, to_json_types
from t2i.networks.linear import Linear, use_onednn_linear
from t2i.networks.unet_decoder import UNetDenoiser, UNetDenoiserContext
from t2i.runtime.hooks import run_like_forward

# Settings of the U-Net that follow from the other arguments of a KarloDecoder.
DERIVED_UNET_KEYS = ("sample_size", "in_channels", "out_channels", "cross_attention_dim", "class_embed_type")


class TextProjection(nn.Module):
    """Projections of z_i, z_t and a caption to inputs of the U-Net; tensors as in diffusers' UnCLIPTextProjModel."""

    def __init__(self, embed_dim: int, text_width: int, time_width: int, context_width: int, extra_tokens: int):
        super().__init__()
        self.extra_tokens = extra_tokens
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(embed_dim))
        self.embedding_proj = Linear(embed_dim, time_width)
        self.clip_image_embeddings_project_to_time_embeddings = Linear(embed_dim, time_width)
        self.clip_extra_context_tokens_proj = Linear(embed_dim, extra_tokens * context_width)
        self.encoder_hidden_states_proj = Linear(text_width, context_width)
        self.text_encoder_hidden_states_norm = nn.LayerNorm(context_width)

    def forward(self, z_i: Tensor, z_t: Tensor, text: TokenStates) -> UNetDenoiserContext:
        """Return z_i and z_t, (B, D), as one vector to add to the timestep, and with the caption as tokens."""
        time = self.clip_image_embeddings_project_to_time_embeddings(z_i) + self.embedding_proj(z_t)
        # The projection's output holds the first dimension of every token, then the second, and so on.
        extra = self.clip_extra_context_tokens_proj(z_i).unflatten(-1, (-1, self.extra_tokens)).mT
        caption = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(text.states))
        tokens = torch.cat([extra, caption], dim=1)
        mask = F.pad(text.mask, (self.extra_tokens, 0), value=True)
        return UNetDenoiserContext(
            {"encoder_hidden_states": tokens, "class_labels": time, "encoder_attention_mask": mask}
        )

    @run_like_forward
    def null(self, count: int) -> Tensor:
        """Return the learned z_i of no image, (count, D)."""
        return self.learned_classifier_free_guidance_embeddings.expand(count, -1)


class KarloDecoder(UNetDenoiser, ModelMixin):
    """Denoiser of images, (B, 3, 64, 64) in [-1, 1], given an ImageCondition with a caption.

    z_i and z_t are CLIP's raw projections, not of unit length.

    Args:
        context_width, time_width: dimensions of the tokens that the U-Net attends to, and of its timestep's embedding.
        unet_config: further arguments of `UNet2DConditionModel`.
        extra_tokens: number of tokens made from z_i.
        null_length: tokens of the empty caption.

    The other arguments are those of `t2i.networks.decoder.Decoder`.
    """

    default_guidance_scale = 8.0
    _no_split_modules = ["ResnetBlock2D"]  # units that FSDP shards
    lora_targets = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out.0")

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        latent_channels: int,
        latent_size: int,
        text_width: int,
        context_width: int,
        time_width: int,
        unet_config: dict,
        extra_tokens: int = 4,
        null_length: int = 2,
        learned_variance: bool = True,
        reads_masks: bool = False,
        clip_fingerprint: str | None = None,
        text_encoder_fingerprint: str | None = None,
    ):
        super().__init__()
        check_integer("latent_size", latent_size, 1, 1024)  # no tensor has this size
        if reads_masks:
            raise InputError("reads_masks must be false for Karlo's decoder, got true")
        derived = {
            "sample_size": latent_size,
            "in_channels": latent_channels,
            "out_channels": latent_channels * (2 if learned_variance else 1),
            "cross_attention_dim": context_width,
            "class_embed_type": "identity",
        }
        # from_config ignores settings of older versions of diffusers.
        self.unet = use_onednn_linear(UNet2DConditionModel.from_config({**unet_config, **derived}))
        width = self.unet.time_embedding.linear_2.out_features
        if width != time_width:
            raise InputError(f"time_width must be {width}, the dimensions of the U-Net's timesteps, got {time_width}")
        self.text_proj = TextProjection(embed_dim, text_width, time_width, context_width, extra_tokens)
        # CLIP's encoding of the empty caption, set by `set_null_condition`.
        self.register_buffer("null_pooled", torch.zeros(embed_dim))
        self.register_buffer("null_states", torch.zeros(null_length, text_width))

    @classmethod
    def from_components(cls, decoder: Component, text_proj: Component, dtype: torch.dtype | None = None) -> Self:
        """Load a folder's `decoder` and `text_proj`; the caller calls `set_null_condition` next.

        dtype: None is that of the files. Raises InputError for a U-Net of another kind, or that does not fit the
        projection.
        """
        config = derive_karlo_config(decoder, text_proj)
        parts = {"unet.": decoder, "text_proj.": text_proj}
        return load_from_components(lambda: cls(**config), parts, dtype, extra=("null_pooled", "null_states"))

    @torch.no_grad()
    def set_null_condition(self, clip: Any, text_encoder: Any = None) -> None:
        """Store CLIP's encoding of the empty caption, which guidance leads away from."""
        null = clip.encode_text([""])
        shape, expected = tuple(null.states[0].shape), tuple(self.null_states.shape)
        if shape != expected:
            raise InputError(f"CLIP's empty caption has {shape} (tokens, width), the decoder takes {expected}")
        self.null_pooled.copy_(null.embedding[0])
        self.null_states.copy_(null.states[0])

    def build_unet_context(self, condition: ImageCondition) -> UNetDenoiserContext:
        text = condition.text
        if not isinstance(text, TokenStates) or text.pooled is None:
            raise ValueError("Karlo's decoder reads captions: its condition needs a text and its z_t")
        return self.text_proj(condition.embedding, text.pooled, text)

    def step(self, x: Tensor, t: Tensor, context: UNetDenoiserContext) -> Tensor:
        if context.step_context is None:
            # Sides are halved at each level, and rounded up.
            halvings = range(len(self.unet.config.block_out_channels))
            areas = {-(-x.shape[-2] // 2**i) * -(-x.shape[-1] // 2**i) for i in halvings}
            context = replace(context, arguments=pad_caption_tokens(context.arguments, areas))
        return super().step(x, t, context)

    @run_like_forward
    def null(self, count: int) -> ImageCondition:
        """Return the learned z_i of no image, and the empty caption."""
        mask = torch.ones(1, len(self.null_states), dtype=torch.bool, device=self.null_states.device)
        text = TokenStates(self.null_states[None], mask, self.null_pooled[None])
        return ImageCondition(self.text_proj.null(1), text).repeat(count)


def pad_caption_tokens(arguments: dict[str, Any], areas: Iterable[int]) -> dict[str, Any]:
    """Return the U-Net's arguments with the tokens padded until their number is none of `areas`, the numbers of pixels
    in the U-Net's levels."""
    tokens, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
    # With as many tokens as pixels, diffusers takes the tokens' mask for one of tokens and pixels, and fails.
    while tokens.shape[1] in areas:
        tokens, mask = F.pad(tokens, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=False)
    return arguments | {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}


def derive_karlo_config(decoder: Component, text_proj: Component) -> dict[str, Any]:
    """Return the arguments of `KarloDecoder` for the parts of a folder. Raises InputError if they are not Karlo's."""
    unet, projection = decoder.get_config_arguments(), text_proj.get_config_arguments()
    where = f"in {str(decoder.folder)!r}"
    check_choice(f"class_embed_type {where}", unet.get("class_embed_type"), ("identity",))
    channels, out = unet.get("in_channels", 4), unet.get("out_channels", 4)
    check_choice(f"out_channels {where}", out, (channels, 2 * channels))
    # The projection makes the tokens that the U-Net reads.
    context, read = projection.get("cross_attention_dim"), unet.get("cross_attention_dim", 1280)
    if read != context:
        widths = f"makes tokens of {context!r:.80} dimensions, the decoder reads {read!r:.80}"
        raise InputError(f"{str(text_proj.folder)!r} {widths}; they were not trained together")
    return {
        "embed_dim": projection.get("clip_embeddings_dim", 768),
        "latent_channels": channels,
        "latent_size": unet.get("sample_size"),
        "text_width": projection.get("clip_embeddings_dim", 768),
        "context_width": context,
        "time_width": projection.get("time_embed_dim"),
        "unet_config": to_json_types({key: value for key, value in unet.items() if key not in DERIVED_UNET_KEYS}),
        "extra_tokens": projection.get("clip_extra_context_tokens", 4),
        "learned_variance": out != channels,
    }
