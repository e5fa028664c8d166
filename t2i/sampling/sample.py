"""From the encoding of a caption to z_i, and from z_i to latents: the sampling of prior and decoder."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Generator, Tensor

from t2i.diffusion.condition import ImageCondition, TextEncoding, TokenStates
from t2i.diffusion.denoiser import Predict
from t2i.diffusion.guidance import Guidance, build_guided_predict
from t2i.diffusion.sampling_loop import Sampling, sample_from_noise, set_timesteps
from t2i.diffusion.windows import Window, build_windowed_predict
from t2i.errors import InputError


@torch.no_grad()
def sample_prior(
    prior: Any, scheduler: SchedulerMixin, text: TextEncoding, negative: TextEncoding | None, sampling: Sampling
) -> Tensor:
    """Sample z_i of unit length, (N, D), fp32, on the device of `text`, by a diffusion prior.

    negative: the captions to guide away from; None: the prior's null. sampling.noise: (N, D).
    """
    device = text.device
    text = text.to(device, prior.dtype)
    negative = prior.null(len(text)) if negative is None else negative
    guidance = prior.default_guidance_scale if sampling.guidance is None else sampling.guidance
    set_timesteps(scheduler, sampling, device)
    # Set before: `prepare` computes tokens of these timesteps ahead
    timesteps = scheduler.timesteps if prior.prepares_timesteps else None
    predict = build_guided_predict(prior, text, negative.to(device, prior.dtype), guidance, scheduler, timesteps)
    noise = sampling.get_noise((prior.config.embed_dim,), device)
    return prior.unscale_image_embeds(sample_from_noise(predict, scheduler, noise, sampling))


@torch.no_grad()
def sample_decoder(
    decoder: Any,
    scheduler: SchedulerMixin,
    condition: ImageCondition,
    sampling: Sampling,
    negative: ImageCondition | None = None,
    windows: Sequence[Window] = (),
) -> Tensor:
    """Sample latents of unit variance, (N, C, h, w), fp32, on the device of `condition`.

    condition, negative, windows: see `build_decoder_predict`. sampling.noise: (N, C, h, w); None: drawn, of the size
    that the decoder was trained on.
    """
    guidance = decoder.default_guidance_scale if sampling.guidance is None else sampling.guidance
    predict = build_decoder_predict(decoder, scheduler, condition, guidance, negative, windows)
    side = decoder.config.latent_size
    noise = sampling.get_noise((decoder.config.latent_channels, side, side), condition.device)
    return sample_from_noise(predict, scheduler, noise, sampling)


def build_decoder_condition(
    decoder: Any,
    z_i: Tensor,
    text: TextEncoding | TokenStates | None = None,
    masked_latents: Tensor | None = None,
    noise: Tensor | None = None,
    level: int = 0,
    control: Tensor | None = None,
) -> ImageCondition:
    """Return the decoder's condition for z_i, (N, D), with the parts that this decoder reads, and no others.

    text: None is the null's caption. masked_latents: (N, C + 1, h, w), see
    `t2i.diffusion.inpainting.concat_masked_latents`. noise, level: arguments for decoders that noise z_i first; noise
    is (N, D). control: (N, 3, H, W) in [0, 1], with sides `decoder.control_factor` times the latents'.
    """
    # The null has a caption only if the decoder reads captions
    null = decoder.null(len(z_i))
    read = None if null.text is None else text or null.text
    masked_latents = masked_latents if decoder.config.reads_masks else None
    return ImageCondition(decoder.noise_image_embeds(z_i, noise, level), read, masked_latents, control)


def build_decoder_predict(
    decoder: Any,
    scheduler: SchedulerMixin,
    condition: ImageCondition,
    guidance: float | Guidance,
    negative: ImageCondition | None = None,
    windows: Sequence[Window] = (),
) -> Predict:
    """Return the guided decoder's prediction, of latents on the device of `condition`.

    condition, negative: results of `build_decoder_condition`; a negative of None is the decoder's null. It gets the
    masked latents and the control images of `condition`. windows: parts that cover the latents, for the decoder to see
    one after the other.
    """
    device, dtype = condition.device, decoder.dtype
    condition = condition.to(device, dtype)
    negative = decoder.null(len(condition)) if negative is None else negative
    given = {"masked_latents": condition.masked_latents, "control": condition.control}
    negative = replace(negative, **given).to(device, dtype)
    if not windows:
        return build_guided_predict(decoder, condition, negative, guidance, scheduler)

    def build_window_predict(window: Window) -> Predict:
        latents = condition.masked_latents
        part = None if latents is None else window.crop(latents)
        positive, away = (replace(whole, masked_latents=part) for whole in (condition, negative))
        return build_guided_predict(decoder, positive, away, guidance, scheduler)

    # One prediction a window, for guidance with momentum has a state.
    return build_windowed_predict([build_window_predict(window) for window in windows], windows)


def split_generators(generator: Generator | list[Generator] | None, count: int) -> tuple[list[Generator], ...]:
    """Return generators for the prior and for the decoder, one an image each.

    Two streams, so that the noise of the decoder does not depend on the prior's steps. From one generator the seeds of
    all images are drawn in order, so that the first images of a larger batch are those of a smaller one.
    """
    if generator is None:
        generator = Generator().manual_seed(int(torch.randint(2**62, (1,))))
    generators = [generator] * count if isinstance(generator, Generator) else generator
    if not isinstance(generators, list) or not all(isinstance(item, Generator) for item in generators):
        raise InputError(f"generator must be a torch.Generator or a list of them, got {generator!r:.80}")
    if len(generators) != count:
        raise InputError(f"generator has {len(generators)} generators for {count} images; give one, or one an image")
    seeds = [
        [int(torch.randint(2**62, (1,), generator=item, device=item.device)) for _ in range(2)] for item in generators
    ]
    return tuple([Generator().manual_seed(pair[stage]) for pair in seeds] for stage in range(2))
