"""The decoder of DALLE2-pytorch: a U-Net on small images, and the further U-Nets of its cascade."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Generator, Tensor, nn

from t2i.checks import check_integer
from t2i.diffusion.condition import ImageCondition, TokenStates
from t2i.diffusion.ddim import ExactDDIMScheduler
from t2i.diffusion.denoiser import DecoderMixin
from t2i.diffusion.sampling_loop import MAX_STEPS, Sampling, generate_noise, sample_from_noise
from t2i.errors import InputError
from t2i.networks.dalle2.unet import Unet
from t2i.networks.decoder import build_null_embeds
from t2i.networks.upsampler import reduce_to_low_resolution
from t2i.runtime.hooks import run_like_forward
from t2i.runtime.memory import run_in_halves


@dataclass
class DALLE2DecoderContext:
    hiddens: Tensor | None  # (B, 4 dim): z_i, added to the timestep
    image: Tensor | None  # (B, L, cond_dim): tokens of z_i
    text: Tensor | None  # (B, max_text_len, cond_dim): the caption, padded


class DALLE2Decoder(DecoderMixin, ModelMixin, ConfigMixin):
    """Denoiser of images, (B, 3, S, S) in [-1, 1], given an ImageCondition.

    The null condition is the zero z_i and a caption of no tokens. They select the learned vector and tokens of "no
    image", and the learned padding. unet: further arguments of `t2i.networks.dalle2.unet.Unet`; the others are those
    of `t2i.networks.decoder.Decoder`.
    """

    default_guidance_scale, default_steps = 1.7, 100  # the scale of LAION's program for its decoder
    _no_split_modules = ["ResnetBlock"]
    lora_targets = ("to_q", "to_kv", "to_out.0")

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        latent_channels: int,
        latent_size: int,
        unet: dict,
        text_width: int | None = None,
        learned_variance: bool = True,
        reads_masks: bool = False,
        clip_fingerprint: str | None = None,
        text_encoder_fingerprint: str | None = None,
    ):
        super().__init__()
        check_integer("latent_size", latent_size, 1, 1024)  # no tensor has this size
        if reads_masks:
            raise InputError("reads_masks must be false for DALLE2-pytorch's decoder, got true")
        derived = {
            "image_embed_dim": embed_dim,
            "cond_on_image_embeds": True,
            "text_embed_dim": text_width,
            "cond_on_text_encodings": text_width is not None,
            "channels": latent_channels,
            "channels_out": latent_channels * (2 if learned_variance else 1),
        }
        self.net = Unet(**(unet | derived))

    @property
    def states_width(self) -> int | None:
        return self.config.text_width

    @property
    def latent_multiple(self) -> int:
        return self.net.multiple

    @run_like_forward
    def forward(self, x: Tensor, t: Tensor, condition: ImageCondition) -> Tensor:
        """Return the prediction, (B, C, H, W), or (B, 2C, H, W) with a learned variance. x: noisy images; t: (B,)."""
        return self.step(x, t, self.prepare(condition))

    @run_like_forward
    def prepare(self, condition: ImageCondition) -> DALLE2DecoderContext:
        condition, text = condition.expand(), None
        # A zero z_i is the null: no embedding of an image is zero.
        hiddens, image = self.net.embed_image_condition(condition.embedding, (condition.embedding == 0).all(dim=-1))
        if self.config.text_width is not None:
            if condition.text is None:
                raise ValueError("this decoder reads captions: its condition needs a text")
            text = self.net.embed_text_condition(condition.text.states, condition.text.mask)
        return DALLE2DecoderContext(hiddens, image, text)

    @run_like_forward
    def step(self, x: Tensor, t: Tensor, context: DALLE2DecoderContext) -> Tensor:
        return self.net(x, t, context.hiddens, context.image, context.text)

    def null(self, count: int) -> ImageCondition:
        """Return the zero z_i, and a caption of no tokens if the decoder reads captions."""
        z_i, text = build_null_embeds(self), None
        if self.config.text_width is not None:
            states = z_i.new_zeros(1, 1, self.config.text_width)
            text = TokenStates(states, torch.zeros(1, 1, dtype=torch.bool, device=z_i.device))
        return ImageCondition(z_i, text).repeat(count)


class DALLE2Pixels(ModelMixin, ConfigMixin):
    """The place of a pipeline's autoencoder for decoders of a single U-Net, whose "latents" are the images."""

    factor, is_cascade = 1, False

    @register_to_config
    def __init__(self, channels: int = 3):
        super().__init__()
        self.channels = channels
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)  # gives the model a device and a dtype

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def forward(self, image: Tensor) -> Tensor:
        return image


class DALLE2Cascade(ModelMixin, ConfigMixin):
    """The further U-Nets: each enlarges the images of the one before. They read neither z_i nor captions.

    Pipelines have it in the place of the autoencoder, as `t2i.networks.public.super_resolution.SuperResolution`:
    `encode` and `decode` only resize, `draw_images` is the diffusion.

    Args:
        low_size: side of the images of the decoder.
        sizes: side of the images of each further U-Net.
        unets: arguments of `t2i.networks.dalle2.unet.Unet` for each.
        schedulers: arguments of `DDIMScheduler` for each.
        noise_levels: for each, the timestep of a linear schedule of 1,000 that its small image is noised to; None for
            a U-Net that was trained with blurred images.
        channels: number in the images.
    """

    is_cascade = True  # `draw_images` is a diffusion of its own

    @register_to_config
    def __init__(
        self,
        low_size: int,
        sizes: list[int],
        unets: list[dict],
        schedulers: list[dict],
        noise_levels: list[int | None],
        channels: int = 3,
    ):
        super().__init__()
        # Check that each U-Net enlarges by whole pixels
        if not len(sizes) == len(unets) == len(schedulers) == len(noise_levels) > 0:
            raise InputError("sizes, unets, schedulers and noise_levels must have one value a U-Net, at least one")
        for before, size in zip([low_size, *sizes], sizes):
            check_integer("a side of the cascade", size, 1, 4096)
            if size % before or size == before:
                raise InputError(f"each side of a cascade must be a multiple of the one before, got {before}, {size}")
        self.channels = channels
        # The U-Nets, and what noises their images
        self.nets = nn.ModuleList()
        for unet, level in zip(unets, noise_levels):
            derived = {"channels": channels, "lowres_cond": True, "lowres_noise_cond": level is not None}
            self.nets.append(Unet(**(unet | derived)))
        self.all_schedulers = [ExactDDIMScheduler(**arguments) for arguments in schedulers]
        self.noising = DDPMScheduler(beta_schedule="linear")  # in every model, whatever the U-Nets' own schedules are

    @property
    def factor(self) -> int:
        """Factor by which the sides grow."""
        return self.config.sizes[-1] // self.config.low_size

    @property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler of the last U-Net."""
        return self.all_schedulers[-1]

    def encode(self, image: Tensor) -> Tensor:
        """Shrink images, (B, 3, H, W) in [-1, 1], to (B, 3, H / factor, W / factor), bicubic with antialiasing."""
        return reduce_to_low_resolution(image, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Enlarge images, (B, 3, h, w), to (B, 3, factor h, factor w); each pixel becomes a square."""
        return F.interpolate(latents, scale_factor=self.factor, mode="nearest")

    @run_like_forward
    @torch.no_grad()
    def draw_images(self, latents: Tensor, sampling: Sampling) -> Tensor:
        """Enlarge small images, (N, 3, h, w), to (N, 3, factor h, factor w) in [-1, 1], fp32, on their device.

        sampling: steps and generators are for each U-Net, the rest for the last; `noise` is like the result.
        """
        check_integer("steps", sampling.steps, 1, MAX_STEPS)
        # A caller sees and steers only what has the final size.
        hidden = replace(sampling, noise=None, on_step=None, transform=None)
        x, before = latents.float(), self.config.low_size
        for i, (net, size, level) in enumerate(zip(self.nets, self.config.sizes, self.config.noise_levels)):
            settings = sampling if i == len(self.nets) - 1 else hidden
            low = F.interpolate(x, scale_factor=size // before, mode="nearest").clamp(-1, 1)
            start = settings.get_noise(low.shape[1:], low.device)
            if start.shape != low.shape:
                raise InputError(f"the noise must be of shape {tuple(low.shape)}, got {tuple(start.shape)}")
            predict = self.build_unet_predict(net, low, level, sampling.generators)
            x = sample_from_noise(predict, self.all_schedulers[i], start, settings)
            before = size
        return x.clamp(-1, 1)

    def build_unet_predict(self, net: nn.Module, low: Tensor, level: int | None, generators: list[Generator]) -> Any:
        """Return the `Predict` of a U-Net. low: (N, 3, H, W), enlarged images. level: timestep to noise them to."""
        levels = None if level is None else torch.full((len(low),), level, device=low.device)
        if levels is not None:
            low = self.noising.add_noise(low, generate_noise(low.shape[1:], generators, low.device), levels)
        low = low.to(self.dtype)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            def predict_rows(x: Tensor, low: Tensor, levels: Tensor | None = None) -> Tensor:
                return net(x.to(self.dtype), t.expand(len(x)), low=low, level=levels).to(x.dtype)

            return run_in_halves(predict_rows, x, low, *([] if levels is None else [levels]))

        return predict

    def forward(self, image: Tensor) -> Tensor:
        """Shrink and enlarge images without a network."""
        return self.decode(self.encode(image))
