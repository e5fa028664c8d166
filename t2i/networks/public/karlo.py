"""Karlo's decoder: a U-Net on pixels that reads z_i, z_t and the caption's tokens (DALL-E 2, section 2.1).

Karlo is the public unCLIP model nearest to the paper. Its decoder is GLIDE's (Nichol et al. 2021), with z_t and z_i
added to the timestep, and z_i once more as four tokens beside the caption's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from t2i.checks import check_integer
from t2i.diffusion.condition import ImageCondition, TokenStates
from t2i.diffusion.denoiser import DecoderMixin
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components, to_json_types
from t2i.networks.linear import Linear, use_onednn_linear
from t2i.networks.unet_steps import UNetStepContext, prepare_unet_context, run_unet_step

DERIVED_UNET_KEYS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "class_embed_type",
)  # of the U-Net


@dataclass
class KarloContext:
    embedding: Tensor  # (B, E): z_i and z_t, added to the timestep
    tokens: Tensor  # (B, L, W), to attend to
    mask: Tensor  # (B, L), bool
    step_context: UNetStepContext | None = (
        None  # the same, as the U-Net's steps take it; None for one that they do not know
    )


class TextProjection(nn.Module):
    """From z_i and a caption to what the U-Net is told. The tensors of diffusers' UnCLIPTextProjModel, by its names."""

    def __init__(self, embed_dim: int, text_width: int, time_width: int, context_width: int, extra_tokens: int):
        super().__init__()
        self.extra_tokens = extra_tokens
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(embed_dim))
        self.embedding_proj = Linear(embed_dim, time_width)
        self.clip_image_embeddings_project_to_time_embeddings = Linear(embed_dim, time_width)
        self.clip_extra_context_tokens_proj = Linear(embed_dim, extra_tokens * context_width)
        self.encoder_hidden_states_proj = Linear(text_width, context_width)
        self.text_encoder_hidden_states_norm = nn.LayerNorm(context_width)

    def forward(self, z_i: Tensor, z_t: Tensor, text: TokenStates) -> KarloContext:
        time = self.clip_image_embeddings_project_to_time_embeddings(z_i) + self.embedding_proj(z_t)
        # A token's dimensions are not neighbours in what is projected: the first number of every token comes first.
        extra = self.clip_extra_context_tokens_proj(z_i).unflatten(-1, (-1, self.extra_tokens)).mT
        caption = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(text.states))
        tokens = torch.cat([extra, caption], dim=1)
        return KarloContext(time, tokens, F.pad(text.mask, (self.extra_tokens, 0), value=True))

    @apply_forward_hook
    def null(self, count: int) -> Tensor:
        """(count, D): the learned z_i of no picture."""
        return self.learned_classifier_free_guidance_embeddings.expand(count, -1)


class KarloDecoder(DecoderMixin, ModelMixin, ConfigMixin):
    """Denoises pictures, (B, 3, 64, 64) in [-1, 1], given an ImageCondition with a caption; learns the variance too.

    z_i and z_t are CLIP's projections as they are, not of unit length.

    Args:
        embed_dim: dimensions D of z_i and z_t.
        latent_channels, latent_size: shape (C, S, S) of the pictures.
        text_width: dimensions of a caption's token states.
        context_width, time_width: dimensions of the tokens that the U-Net attends to, and of its timestep's embedding.
        unet_config: further arguments of `UNet2DConditionModel`.
        extra_tokens: made from z_i.
        null_length: tokens of the empty caption.
        learned_variance: it also predicts the variance of the reverse steps, as further C channels.
        reads_masks, clip_fingerprint, text_encoder_fingerprint: as of `t2i.networks.unet_decoder.UNetDecoder`.
    """

    default_guidance_scale, default_steps = 8.0, 25
    _supports_gradient_checkpointing = True  # diffusers' blocks do it
    _no_split_modules = ["ResnetBlock2D"]  # what FSDP shards as one
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
            raise InputError("Karlo's decoder reads no masks, got reads_masks = true")
        own = {
            "sample_size": latent_size,
            "in_channels": latent_channels,
            "out_channels": latent_channels * (2 if learned_variance else 1),
            "cross_attention_dim": context_width,
            "class_embed_type": "identity",
        }
        # from_config passes over settings of older versions.
        self.unet = use_onednn_linear(UNet2DConditionModel.from_config({**unet_config, **own}))
        if self.unet.time_embedding.linear_2.out_features != time_width:
            ours = self.unet.time_embedding.linear_2.out_features
            raise InputError(f"the U-Net's timesteps have {ours} dimensions, what is added to them {time_width}")
        self.text_proj = TextProjection(embed_dim, text_width, time_width, context_width, extra_tokens)
        # What CLIP says of the empty caption: set by `set_null_condition`.
        self.register_buffer("null_pooled", torch.zeros(embed_dim))
        self.register_buffer("null_states", torch.zeros(null_length, text_width))

    @classmethod
    def from_components(cls, decoder: Component, text_proj: Component, dtype: torch.dtype | None = None) -> Any:
        """Of a folder's `decoder` and `text_proj`, in their own dtype if none is given; `set_null_condition` is
        still to come.

        Raises InputError for a U-Net of another kind, or that does not go with the projection.
        """
        config = derive_karlo_config(decoder, text_proj)
        parts = {"unet.": decoder, "text_proj.": text_proj}
        return load_from_components(lambda: cls(**config), parts, dtype, extra=("null_pooled", "null_states"))

    @torch.no_grad()
    def set_null_condition(self, clip: Any, text_encoder: Any = None) -> None:
        """Take over what `clip` says of the empty caption, which the decoder is guided away from."""
        null = clip.encode_text([""])
        if null.states[0].shape != self.null_states.shape:
            ours, theirs = tuple(self.null_states.shape), tuple(null.states[0].shape)
            raise InputError(f"CLIP says {theirs} of the empty caption (tokens, width), the decoder takes {ours}")
        self.null_pooled.copy_(null.embedding[0])
        self.null_states.copy_(null.states[0])

    def forward(self, x: Tensor, t: Tensor, condition: ImageCondition) -> Tensor:
        """x: (B, C, H, W) noisy pictures; t: (B,) timesteps -> (B, 2C, H, W): the noise, and of the variance."""
        # In one pass each layer makes its own keys and values: FSDP has its weights only while it runs.
        return self.step(x, t, self.build_unet_context(condition.expand()))

    @apply_forward_hook
    def prepare(self, condition: ImageCondition) -> KarloContext:
        unique, context = condition.find_unique_rows(), self.build_unet_context(condition.expand())
        context.step_context = prepare_unet_context(
            self.unet, context.tokens, context.embedding, None, context.mask, unique
        )
        return context

    def build_unet_context(self, condition: ImageCondition) -> KarloContext:
        """The condition as the U-Net takes it."""
        text = condition.text
        if not isinstance(text, TokenStates) or text.pooled is None:
            raise ValueError("Karlo's decoder reads captions: its condition needs a text and its z_t")
        return self.text_proj(condition.embedding, text.pooled, text)

    @apply_forward_hook
    def step(self, x: Tensor, t: Tensor, context: KarloContext) -> Tensor:
        if context.step_context is not None:
            return run_unet_step(self.unet, x, t, context.step_context)
        halvings = range(len(self.unet.config.block_out_channels))
        areas = {-(-x.shape[-2] // 2**i) * -(-x.shape[-1] // 2**i) for i in halvings}
        tokens, mask = pad_caption_tokens(context.tokens, context.mask, areas)
        return self.unet(x, t, tokens, class_labels=context.embedding, encoder_attention_mask=mask).sample

    def null(self, count: int) -> ImageCondition:
        """The learned z_i of no picture, and the empty caption."""
        mask = torch.ones(1, len(self.null_states), dtype=torch.bool, device=self.null_states.device)
        text = TokenStates(self.null_states[None], mask, self.null_pooled[None])
        return ImageCondition(self.text_proj.null(1), text).repeat(count)


def pad_caption_tokens(tokens: Tensor, mask: Tensor, areas: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Tokens, (B, L, W), and their mask, (B, L), padded until L is none of `areas`, the pixels of the U-Net's levels.

    Where it is, diffusers takes the mask of the tokens for one of tokens and pixels together, and fails.
    """
    while tokens.shape[1] in areas:
        tokens, mask = F.pad(tokens, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=False)
    return tokens, mask


def derive_karlo_config(decoder: Component, text_proj: Component) -> dict[str, Any]:
    """The arguments of `KarloDecoder` for a folder's parts. Raises InputError for those that are not Karlo's."""
    unet, projection = decoder.get_config_arguments(), text_proj.get_config_arguments()
    if unet.get("class_embed_type") != "identity":
        raise InputError(
            f"{str(decoder.folder)!r} has class_embed_type {unet.get('class_embed_type')!r:.80}; Karlo's is 'identity'"
        )
    channels, out = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if out not in (channels, 2 * channels):
        raise InputError(
            f"{str(decoder.folder)!r} has in_channels {channels} and out_channels {out}, not as many or 2x"
        )
    context = projection.get("cross_attention_dim")
    if unet.get("cross_attention_dim", 1280) != context:
        theirs = f"tokens of {context} dimensions, the decoder reads {unet.get('cross_attention_dim', 1280)!r:.80}"
        raise InputError(f"{str(text_proj.folder)!r} makes {theirs}; they were not trained together")
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
