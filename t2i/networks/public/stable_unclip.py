"""Stable unCLIP: Stable Diffusion's U-Net with a noised image embedding in the place of a class.

z_i is noised to a level by a schedule of its own, and the level is appended (conditioning augmentation, Ho et al. 2021,
cascaded diffusion, section 3). Captions are read by Stable Diffusion's text encoder.
"""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from tokenizers.processors import RobertaProcessing
from torch import Tensor, nn

from t2i.checks import check_choice, check_integer
from t2i.diffusion.condition import ImageCondition, TokenStates
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components, to_json_types
from t2i.files.fingerprints import EXACT_DTYPES
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.linear import use_onednn_linear
from t2i.networks.public.clip_tokenizer import CLIPTokenizer
from t2i.networks.public.movq import rename_attention_tensor
from t2i.networks.text_encoder import TextEncoder, parse_encoder_settings
from t2i.networks.tokenizer import TextTokenizer
from t2i.networks.unet_decoder import UNetDenoiser, UNetDenoiserContext
from t2i.runtime.hooks import run_like_forward


class EmbedNormalizer(nn.Module):
    """Mean and standard deviation of each dimension of z_i, (1, D), with the names of the public files."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, embed_dim))  # buffers, because training keeps them
        self.register_buffer("std", torch.ones(1, embed_dim))

    @run_like_forward
    def get_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the deviation, (1, D), with the device and dtype of `like`."""
        return self.mean.to(like, copy=True), self.std.to(like, copy=True)


class StableUnCLIPDecoder(UNetDenoiser, ModelMixin):
    """Denoiser of latents, given an ImageCondition whose embedding is that of `noise_image_embeds`, (B, 2D).

    Args:
        unet_config: configuration of diffusers' `UNet2DConditionModel`.
        noising: configuration of the `DDPMScheduler` that noises z_i.
        context_length: tokens of a caption, padding included.
        clip_fingerprint: None, because the public files do not contain it.
        learned_variance, reads_masks: False; no such model is known.

    The other arguments are those of `t2i.networks.decoder.Decoder`.
    """

    default_guidance_scale, default_steps = 10.0, 20
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]  # units that FSDP shards
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @register_to_config
    def __init__(
        self,
        unet_config: dict,
        noising: dict,
        embed_dim: int,
        latent_channels: int,
        latent_size: int,
        text_width: int,
        context_length: int = 77,
        clip_fingerprint: str | None = None,
        text_encoder_fingerprint: str | None = None,
        learned_variance: bool = False,
        reads_masks: bool = False,
    ):
        super().__init__()
        check_integer("latent_size", latent_size, 1, 1024)  # no tensor has this size
        check_integer("embed_dim", embed_dim, 1, 100_000)
        check_integer("noising.num_train_timesteps", noising.get("num_train_timesteps", 1000), 1, 100_000)
        check_stable_unet(unet_config, embed_dim, "unet")
        self.unet = use_onednn_linear(UNet2DConditionModel.from_config(unet_config))
        self.normalizer = EmbedNormalizer(embed_dim)
        # The encoding of the empty caption, set by `set_null_condition`.
        self.register_buffer("null_states", torch.zeros(context_length, text_width))

    @classmethod
    def from_components(
        cls, unet: Component, normalizer: Component, noising: dict[str, Any], dtype: torch.dtype | None = None
    ) -> Self:
        """Load the folders `unet` and `image_normalizer`; the caller calls `set_null_condition` next.

        noising: the configuration of `image_noising_scheduler`. Raises InputError for parts that do not fit each other.
        """
        # diffusers' defaults stand for what a configuration lacks.
        settings = unet.get_config_arguments()
        arguments = {
            "unet_config": to_json_types(settings),
            "noising": to_json_types({key: value for key, value in noising.items() if not key.startswith("_")}),
            "embed_dim": normalizer.get_config_arguments().get("embedding_dim", 768),
            "latent_channels": settings.get("in_channels", 4),
            "latent_size": settings.get("sample_size"),
            "text_width": settings.get("cross_attention_dim", 1280),
        }
        check_stable_unet(settings, arguments["embed_dim"], repr(str(unet.folder)))
        parts = {"unet.": unet, "normalizer.": normalizer}
        return load_from_components(lambda: cls(**arguments), parts, dtype, extra=("null_states",))

    @torch.no_grad()
    def set_null_condition(self, clip: Any, text_encoder: TextEncoder | None) -> None:
        """Store the text encoder's encoding of the empty caption, which guidance leads away from.

        Raises InputError without a text encoder, and for another one than the decoder's.
        """
        if text_encoder is None:
            raise InputError("this decoder (Stable unCLIP) reads captions: it needs its text_encoder")
        states = text_encoder.encode([""]).states[0]
        if states.shape != self.null_states.shape:
            shape, expected = tuple(states.shape), tuple(self.null_states.shape)
            raise InputError(f"the text encoder gives a caption {shape} values, the decoder reads {expected}")
        self.null_states.copy_(states)
        self.register_to_config(text_encoder_fingerprint=text_encoder.identity)

    @property
    def noise_levels(self) -> int:
        """Number of levels that `noise_image_embeds` takes, from 0 on."""
        return self.config.noising.get("num_train_timesteps", 1000)

    @run_like_forward
    def noise_image_embeds(self, z_i: Tensor, noise: Tensor | None = None, level: int | Tensor = 0) -> Tensor:
        """Return the input of the U-Net for z_i, (B, D) -> (B, 2D): z_i noised to a level, and the level.

        noise: (B, D), of unit variance; None is none. level: one timestep for all, or (B,), int64. Zero, the null, is
        returned as zero.
        """
        levels = torch.as_tensor(level, device=z_i.device).expand(len(z_i))
        mean, std = self.normalizer.get_statistics(z_i)
        noise = torch.zeros_like(z_i) if noise is None else noise.to(z_i)
        schedule = DDPMScheduler.from_config(self.config.noising)
        noisy = schedule.add_noise((z_i - mean) / std, noise, levels) * std + mean
        # The level is embedded as a timestep. A zero z_i, the null, stays zero with its level.
        waves = get_timestep_embedding(levels, self.config.embed_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([noisy, waves.to(z_i)], dim=1) * z_i.any(dim=1, keepdim=True)

    def build_unet_context(self, condition: ImageCondition) -> UNetDenoiserContext:
        if not isinstance(condition.text, TokenStates):
            raise ValueError("this decoder reads captions: its condition needs a text")
        states = condition.text.states
        return UNetDenoiserContext({"encoder_hidden_states": states, "class_labels": condition.embedding})

    @run_like_forward
    def null(self, count: int) -> ImageCondition:
        """Return the zero embedding without a level, and the encoding of the empty caption."""
        z_i, states = self.null_states.new_zeros(1, 2 * self.config.embed_dim), self.null_states[None]
        text = TokenStates(states, states.new_ones(states.shape[:2], dtype=torch.bool))
        return ImageCondition(z_i, text).repeat(count)


def check_stable_unet(unet: dict[str, Any], embed_dim: int, where: str) -> None:
    """Refuse a U-Net that does not take z_i and its level, D values each, or that learned the variance."""
    channels = unet.get("in_channels", 4)
    for key, default, expected in (
        ("class_embed_type", None, "projection"),
        ("projection_class_embeddings_input_dim", None, 2 * embed_dim),
        ("out_channels", 4, channels),
    ):
        if unet.get(key, default) != expected:
            value = f"{unet.get(key, default)!r:.80}"
            raise InputError(f"{key} of {where} must be {expected} for {embed_dim} dimensions of z_i, got {value}")
    for key in ("sample_size", "cross_attention_dim"):
        check_integer(f"{key} of {where}", unet.get(key), 1, 100_000)


def load_caption_encoder(text_encoder: Component, tokenizer: Path, dtype: torch.dtype | None = None) -> TextEncoder:
    """Load Stable Diffusion's text encoder, CLIP's text tower, from the folders `text_encoder` and `tokenizer`.

    Raises InputError for another model.
    """
    kind, model = parse_encoder_settings(text_encoder.config, text_encoder.folder)
    check_choice(f"model_type in {str(text_encoder.folder)!r}", kind, ("clip_text_model",))
    positions, vocab_size = model["max_position_embeddings"], model["vocab_size"]
    words = CLIPTokenizer.from_folder(tokenizer, positions, vocab_size, tokenizer.parent)
    # TextTokenizer takes the start and end tokens from the post-processor.
    start, end = (words.names["bos_token"], words.start), (words.names["eos_token"], words.end)
    words.tokenizer.post_processor = RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    length, model["pad_token_id"] = words.context_length, words.pad
    # Names differ between versions of transformers: with and without `text_model.`
    encoder = load_from_components(
        lambda: TextEncoder(kind, model, length, padded=True),
        {"net.": text_encoder},
        dtype,
        rename=lambda name: name.replace("net.text_model.", "net."),
        unused=("net.text_model.embeddings.position_ids", "net.embeddings.position_ids"),
    )
    encoder.tokenizer = TextTokenizer(words.tokenizer, length, words.pad)
    encoder.register_to_config(fingerprint=encoder.compute_fingerprint(), rounded=encoder.dtype not in EXACT_DTYPES)
    return encoder


def load_latent_autoencoder(vae: Component, dtype: torch.dtype | None = None) -> Autoencoder:
    """Load Stable Diffusion's VAE from the folder `vae`, with the scale of latents in its configuration."""
    settings = to_json_types(vae.get_config_arguments())
    scale, shift = settings.get("scaling_factor", 1.0), settings.get("shift_factor") or 0.0
    where = f"in {str(vae.folder)!r}"
    if type(scale) not in (int, float) or not scale > 0:
        raise InputError(f"scaling_factor {where} must be a number above 0, got {scale!r:.80}")
    if type(shift) not in (int, float):
        raise InputError(f"shift_factor {where} must be a number, got {shift!r:.80}")
    autoencoder = load_from_components(
        lambda: Autoencoder(settings), {"coder.": vae}, dtype, rename=rename_attention_tensor, extra=("mean", "std")
    )
    autoencoder.use_published_scale()
    return autoencoder
