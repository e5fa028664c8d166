"""Kandinsky's decoders: the U-Nets of versions 2.1 and 2.2.

2.2 reads z_i alone, twice: added to the timestep, and as 32 tokens to attend to. Its ControlNet also reads a control
image, such as a depth map, beside the noisy latents. 2.1 also reads the caption from a text
encoder of its own: one vector, added to the timestep, and a state per token.
"""

from typing import Any, Self

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config

from t2i.checks import check_integer
from t2i.diffusion.condition import ImageCondition, TokenStates
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components
from t2i.networks.decoder import resolve_masked_latents
from t2i.networks.linear import use_onednn_linear
from t2i.networks.unet_decoder import UNetDenoiser, UNetDenoiserContext
from t2i.runtime.hooks import run_like_forward

VERSIONS_BY_CONDITION = {  # by a U-Net's addition_embed_type and encoder_hid_dim_type
    ("image", "image_proj"): "2.2",
    ("text_image", "text_image_proj"): "2.1",
    ("image_hint", "image_proj"): "2.2 ControlNet",
}
# The control image is reduced to channels of the size of the latents (diffusers' ImageHintTimeEmbedding).
CONTROL_FACTOR, CONTROL_CHANNELS = 8, 4
DEFAULT_LATENT_SIZE = 64  # where a U-Net has no sample_size: of the reference's default images, 512 x 512
CAPTION_LENGTH = 77  # tokens that 2.1 attends to, whatever the caption's length
NULL_BUFFERS = ("null_embedding", "null_states", "null_pooled")


class KandinskyDecoder(UNetDenoiser, ModelMixin):
    """Denoiser of MoVQ's latents, given an ImageCondition with z_i as CLIP's raw projection.

    Args:
        model: arguments of `UNet2DConditionModel`.
        text_width: dimensions of a caption's token states; None for 2.2, which reads no captions.
        clip_fingerprint: None, because the public files do not contain it.
        text_encoder_fingerprint: digest of the text encoder that encoded the null's empty caption; None for 2.2.

    The other arguments are those of `t2i.networks.decoder.Decoder`, and follow from `model`: see
    `derive_kandinsky_config`.
    """

    default_guidance_scale, default_steps = 4.0, 100  # of the reference's pipelines
    _no_split_modules = ["ResnetBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"]
    _skip_layerwise_casting_patterns = [r"encoder_hid_proj\.image_embeds$"]  # diffusers reads the dtype of its weights
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
                raise InputError(f"{key} must be {value!r} for this U-Net, got {self.config[key]!r:.80}")
        # from_config ignores settings of older versions of diffusers.
        self.unet = use_onednn_linear(UNet2DConditionModel.from_config(dict(model)))
        # The null condition: CLIP's embedding of the zero image and, in 2.1, the encoding of "".
        self.register_buffer("null_embedding", torch.zeros(embed_dim))
        if text_width is not None:
            self.register_buffer("null_states", torch.zeros(CAPTION_LENGTH, text_width))
            self.register_buffer("null_pooled", torch.zeros(embed_dim))

    @classmethod
    def from_component(cls, part: Component, dtype: torch.dtype | None = None) -> Self:
        """Load a public folder `unet`; the caller calls `set_null_condition` next. Raises InputError for others."""
        settings = part.get_config_arguments()
        derived = derive_kandinsky_config(settings)
        buffers = NULL_BUFFERS if derived["text_width"] is not None else NULL_BUFFERS[:1]
        return load_from_components(lambda: cls(settings, **derived), {"unet.": part}, dtype, extra=buffers)

    @torch.no_grad()
    def set_null_condition(self, clip: Any, text_encoder: Any = None) -> None:
        """Compute the null condition with the pipeline's encoders.

        Raises InputError for a CLIP without an image encoder, and without the text encoder that 2.1 needs.
        """
        self.null_embedding.copy_(clip.encode_zero_image()[0])
        if self.config.text_width is not None:
            if text_encoder is None:
                raise InputError("this decoder (Kandinsky 2.1) reads captions: it needs its text_encoder")
            empty = text_encoder.encode([""])
            self.null_states.copy_(empty.states[0])
            self.null_pooled.copy_(empty.pooled[0])
            self.register_to_config(text_encoder_fingerprint=text_encoder.identity)

    @property
    def control_factor(self) -> int | None:  # type: ignore[override]
        """Pixels of a control image along a side of a latent; None for a decoder that is no ControlNet."""
        return CONTROL_FACTOR if self.unet.config.addition_embed_type == "image_hint" else None

    def build_unet_context(self, condition: ImageCondition) -> UNetDenoiserContext:
        """Return z_i, the caption and the control image as the U-Net takes them. Raises for a part that is missing."""
        states, added = None, {"image_embeds": condition.embedding}
        if self.config.text_width is not None:
            if not isinstance(condition.text, TokenStates) or condition.text.pooled is None:
                raise ValueError("this decoder reads captions: its condition needs a text with its pooled vector")
            states, added["text_embeds"] = condition.text.states, condition.text.pooled
        if self.control_factor is not None:
            if condition.control is None:
                raise InputError("this decoder is a ControlNet: its condition needs a control image")
            added["hint"] = condition.control
        kept = resolve_masked_latents(self, condition)
        if kept is not None:  # the public models have 1 where the image stays, and 0 where it is painted
            kept = torch.cat([kept[:, :-1], 1 - kept[:, -1:]], dim=1)
        return UNetDenoiserContext({"encoder_hidden_states": states, "added_cond_kwargs": added}, kept)

    @run_like_forward
    def null(self, count: int) -> ImageCondition:
        """Return the zero image's embedding and, for 2.1, the empty caption."""
        text = None
        if self.config.text_width is not None:
            states = self.null_states[None]
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            text = TokenStates(states, mask, self.null_pooled[None])
        return ImageCondition(self.null_embedding[None], text).repeat(count)


def derive_kandinsky_config(unet: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a KandinskyDecoder that follow from its U-Net's settings.

    Raises InputError for the U-Net of another model.
    """
    kinds = unet.get("addition_embed_type"), unet.get("encoder_hid_dim_type")
    if kinds not in VERSIONS_BY_CONDITION:
        got = f"got {kinds[0]!r:.80} and {kinds[1]!r:.80}"
        raise InputError(
            "addition_embed_type and encoder_hid_dim_type of Kandinsky's U-Nets must be image and image_proj, "
            f"image_hint and image_proj, or text_image and text_image_proj; {got}"
        )
    # Widths of the condition. In 2.1 z_i is as wide as the tokens; in 2.2 the tokens are made from it.
    width, outer = unet.get("cross_attention_dim", 1280), unet.get("encoder_hid_dim")
    check_integer("cross_attention_dim", width, 1, 100_000)
    check_integer("encoder_hid_dim", outer, 1, 100_000)
    size = DEFAULT_LATENT_SIZE if unet.get("sample_size") is None else unet["sample_size"]
    check_integer("sample_size", size, 1, 1024)  # no tensor has this size
    # Channels: twice as many out with a learned variance, and one more than twice in with masks
    given, predicted, controlled = unet.get("in_channels", 4), unet.get("out_channels", 4), kinds[0] == "image_hint"
    read = given - CONTROL_CHANNELS if controlled else given
    channels = read if controlled or predicted in (read, 2 * read) else (read - 1) // 2
    if read not in (channels, 2 * channels + 1) or predicted not in (channels, 2 * channels):
        raise InputError(
            "in_channels and out_channels of Kandinsky's U-Nets must be 4 or 9 (8 of a ControlNet), and 8; got "
            f"{given} and {predicted}"
        )
    captions = VERSIONS_BY_CONDITION[kinds] == "2.1"
    return {
        "embed_dim": width if captions else outer,
        "latent_channels": channels,
        "latent_size": size,
        "learned_variance": predicted == 2 * channels,
        "reads_masks": read != channels,
        "text_width": outer if captions else None,
    }
