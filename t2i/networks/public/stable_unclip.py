"""Stable unCLIP: Stable Diffusion's U-Net, which is told of a noised image embedding in the place of a class.

What it is told is z_i, noised to a level by a schedule of its own, and beside it the level (as in Ho et al. 2021,
cascaded diffusion, section 3: conditioning augmentation). Captions are read by Stable Diffusion's text encoder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils.accelerate_utils import apply_forward_hook
from tokenizers.processors import RobertaProcessing
from torch import Tensor, nn

from t2i.checks import check_integer
from t2i.diffusion.condition import ImageCondition, TokenStates
from t2i.diffusion.denoiser import DecoderMixin
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components, to_json_types
from t2i.files.fingerprints import EXACT_DTYPES
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.linear import use_onednn_linear
from t2i.networks.public.clip_tokenizer import CLIPTokenizer
from t2i.networks.text_encoder import TextEncoder, parse_encoder_settings
from t2i.networks.tokenizer import TextTokenizer
from t2i.networks.unet_steps import UNetStepContext, prepare_unet_context, run_unet_step


class EmbedNormalizer(nn.Module):
    """Each dimension's mean and deviation of z_i, as the public files hold them: (1, D)."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, embed_dim))  # statistics: training leaves them
        self.register_buffer("std", torch.ones(1, embed_dim))


@dataclass
class StableUnCLIPContext:
    labels: Tensor  # (B, 2D): the noised z_i and its level
    states: Tensor  # (B, L, W): the caption's tokens, to attend to
    step_context: UNetStepContext | None = (
        None  # the same, as the U-Net's steps take it; None for one that they do not know
    )


class StableUnCLIPDecoder(DecoderMixin, ModelMixin, ConfigMixin):
    """Denoises latents, given an ImageCondition whose embedding is that of `noise_image_embeds`, (B, 2D).

    Args:
        unet_config: configuration of diffusers' `UNet2DConditionModel`.
        noising: configuration of the `DDPMScheduler` that z_i is noised by.
        embed_dim: dimensions D of z_i.
        latent_channels, latent_size: shape (C, S, S) of the latents.
        text_width: dimensions W of a caption's token states.
        context_length: tokens of a caption, padding included.
        clip_fingerprint: of the CLIP that it was trained with; None, for the public files do not say.
        text_encoder_fingerprint: of the text encoder that said the empty caption of the null.
        learned_variance, reads_masks: False; no such model is known.
    """

    default_guidance_scale = 10.0
    default_steps = 20
    _supports_gradient_checkpointing = True  # diffusers' blocks do it
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]  # what FSDP shards as one
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
        check_unet_config(unet_config, embed_dim)
        self.unet = use_onednn_linear(UNet2DConditionModel.from_config(unet_config))
        self.normalizer = EmbedNormalizer(embed_dim)
        # The encoding of the empty caption, set by `set_null_condition`.
        self.register_buffer("null_states", torch.zeros(context_length, text_width))

    @classmethod
    def from_components(
        cls, unet: Component, normalizer: Component, noising: dict[str, Any], dtype: torch.dtype | None = None
    ) -> "StableUnCLIPDecoder":
        """Of the folders `unet` and `image_normalizer`; noising: the configuration of `image_noising_scheduler`.

        Raises InputError for parts that do not fit each other or their configurations.
        """
        settings = unet.get_config_arguments()
        arguments = {
            "unet_config": to_json_types(settings),
            "noising": to_json_types({key: value for key, value in noising.items() if not key.startswith("_")}),
            "embed_dim": normalizer.get_config_arguments().get("embedding_dim", 768),
            "latent_channels": settings.get("in_channels", 4),
            "latent_size": settings.get("sample_size"),
            "text_width": settings.get("cross_attention_dim", 1280),
        }
        check_unet_config(settings, arguments["embed_dim"], unet.folder)
        parts = {"unet.": unet, "normalizer.": normalizer}
        return load_from_components(lambda: cls(**arguments), parts, dtype, extra=("null_states",))

    @torch.no_grad()
    def set_null_condition(self, clip: Any, text_encoder: TextEncoder) -> None:
        """Keep what the text encoder says of the empty caption, what is guided away from, and which encoder it is."""
        states = text_encoder.encode([""]).states[0]
        if states.shape != self.null_states.shape:
            got, wanted = tuple(states.shape), tuple(self.null_states.shape)
            raise InputError(f"the text encoder gives a caption {got} values, the decoder reads {wanted}")
        self.null_states.copy_(states)
        self.register_to_config(text_encoder_fingerprint=text_encoder.identity)

    @property
    def noise_schedule(self) -> DDPMScheduler:
        return DDPMScheduler.from_config(self.config.noising)

    @property
    def noise_levels(self) -> int:
        """`noise_image_embeds` takes levels from 0 to one less."""
        return self.config.noising.get("num_train_timesteps", 1000)

    @apply_forward_hook
    def noise_image_embeds(self, z_i: Tensor, noise: Tensor | None = None, level: int = 0) -> Tensor:
        """Return the input of the U-Net for z_i, (B, D) -> (B, 2D): z_i noised to a level, and the level.

        noise: (B, D), of unit variance; None is none. Zero, the null, is returned as zero.
        """
        levels = torch.full((len(z_i),), level, device=z_i.device)
        mean, std = self.normalizer.mean.to(z_i), self.normalizer.std.to(z_i)
        noise = torch.zeros_like(z_i) if noise is None else noise.to(z_i)
        noisy = self.noise_schedule.add_noise((z_i - mean) / std, noise, levels) * std + mean
        waves = get_timestep_embedding(levels, self.config.embed_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([noisy, waves.to(z_i)], dim=1) * z_i.any(dim=1, keepdim=True)

    def forward(self, x: Tensor, t: Tensor, condition: ImageCondition) -> Tensor:
        """x: (B, C, H, W) noisy latents; t: (B,) timesteps -> (B, C, H, W), the prediction."""
        # In one pass each layer makes its own keys and values: FSDP has its weights only while it runs.
        return self.step(x, t, self.build_unet_context(condition.expand()))

    @apply_forward_hook
    def prepare(self, condition: ImageCondition) -> StableUnCLIPContext:
        unique, context = condition.find_unique_rows(), self.build_unet_context(condition.expand())
        context.step_context = prepare_unet_context(self.unet, context.states, context.labels, unique_rows=unique)
        return context

    def build_unet_context(self, condition: ImageCondition) -> StableUnCLIPContext:
        """The condition as the U-Net takes it."""
        if not isinstance(condition.text, TokenStates):
            raise ValueError("this decoder reads captions: its condition needs a text")
        return StableUnCLIPContext(condition.embedding, condition.text.states)

    @apply_forward_hook
    def step(self, x: Tensor, t: Tensor, context: StableUnCLIPContext) -> Tensor:
        if context.step_context is not None:
            return run_unet_step(self.unet, x, t, context.step_context)
        return self.unet(x, t, context.states, class_labels=context.labels).sample

    def null(self, count: int) -> ImageCondition:
        """Return the zero embedding without a level, and the encoding of the empty caption."""
        z_i, states = self.null_states.new_zeros(1, 2 * self.config.embed_dim), self.null_states[None]
        text = TokenStates(states, states.new_ones(states.shape[:2], dtype=torch.bool))
        return ImageCondition(z_i, text).repeat(count)


def check_unet_config(unet: dict[str, Any], embed_dim: int, folder: Path | None = None) -> None:
    """Refuse a U-Net that is not told of z_i and its level, D values each, or that learned the variance."""
    wanted = {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2 * embed_dim,
        "out_channels": unet.get("in_channels", 4),
    }
    where = "unet" if folder is None else repr(str(folder))
    for key, value in wanted.items():
        if (found := unet.get(key, 4 if key == "out_channels" else None)) != value:
            raise InputError(f"{where} has {key} {found!r:.80}; a Stable unCLIP of {embed_dim} dimensions has {value}")
    for key in ("sample_size", "cross_attention_dim"):
        check_integer(f"{key} of {where}", unet.get(key), 1, 100_000)


def load_caption_encoder(text_encoder: Component, tokenizer: Path, dtype: torch.dtype | None = None) -> TextEncoder:
    """Stable Diffusion's text encoder: CLIP's text tower, whose states are read for the padding too.

    Of the folders `text_encoder` and `tokenizer`. Raises InputError for any other model.
    """
    kind, model = parse_encoder_settings(text_encoder.config, text_encoder.folder)
    if kind != "clip_text_model":
        place = repr(str(text_encoder.folder))
        raise InputError(f"{place} is a {kind}; Stable Diffusion reads captions by a clip_text_model")
    words = CLIPTokenizer.from_folder(
        tokenizer, model["max_position_embeddings"], model["vocab_size"], tokenizer.parent
    )
    start, end = (words.names["bos_token"], words.start), (words.names["eos_token"], words.end)
    words.tokenizer.post_processor = RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    length, model["pad_token_id"] = words.context_length, words.pad
    encoder = load_from_components(
        lambda: TextEncoder(kind, model, length, padded=True),
        {"net.": text_encoder},
        dtype,
        rename=lambda name: name.replace("net.text_model.", "net."),
        unused=("net.text_model.embeddings.position_ids", "net.embeddings.position_ids"),
    )
    encoder.tokenizer = TextTokenizer(words.tokenizer, length, words.pad)
    encoder.register_to_config(fingerprint=encoder.fingerprint(), rounded=encoder.dtype not in EXACT_DTYPES)
    return encoder


def load_latent_autoencoder(vae: Component, dtype: torch.dtype | None = None) -> Autoencoder:
    """Stable Diffusion's VAE, of the folder `vae`, in the scale that it was published with."""
    settings, extra = to_json_types(vae.get_config_arguments()), ("mean", "std")
    scale, shift = settings.get("scaling_factor", 1.0), settings.get("shift_factor") or 0.0
    for name, value in {"scaling_factor": scale, "shift_factor": shift}.items():
        if type(value) not in (int, float) or not (value > 0 or name == "shift_factor"):
            wanted = "a number above 0" if name == "scaling_factor" else "a number"
            raise InputError(f"{str(vae.folder)!r} has {name} {value!r:.80}; it must be {wanted}")
    autoencoder = load_from_components(
        lambda: Autoencoder(settings), {"coder.": vae}, dtype, rename=rename_vae_tensor, extra=extra
    )
    published = autoencoder.coder.config
    autoencoder.std.fill_(1 / published.scaling_factor)
    autoencoder.mean.fill_(published.shift_factor or 0.0)
    return autoencoder


def rename_vae_tensor(name: str) -> str:
    """diffusers' name for a VAE's tensor that older files know by another: those of its attention."""
    for old, new in (("query.", "to_q."), ("key.", "to_k."), ("value.", "to_v."), ("proj_attn.", "to_out.0.")):
        name = name.replace(f"attentions.0.{old}", f"attentions.0.{new}")
    return name
