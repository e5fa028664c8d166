"""From a caption's encoding to z_i, and from z_i to latents: what pipeline and trainers sample with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Generator, Tensor

from t2i.diffusion.condition import ImageCondition, TextEncoding
from t2i.diffusion.denoiser import Predict, PredictTransform, StepCallback, generate_noise, sample_from_noise
from t2i.diffusion.guidance import Guidance, build_guided_predict
from t2i.errors import InputError
from t2i.networks.decoder import Decoder
from t2i.networks.prior import Prior
from t2i.networks.unet_decoder import UNetDecoder


@torch.no_grad()
def sample_prior(
    prior: Prior,
    scheduler: SchedulerMixin,
    text: TextEncoding,
    negative: TextEncoding | None,
    steps: int,
    guidance: float | Guidance,
    generators: list[Generator],
    noise: Tensor | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    on_step: StepCallback | None = None,
    wrap: PredictTransform | None = None,
) -> Tensor:
    """z_i of unit length, (N, D), fp32, on the device of `text`.

    negative: what is guided away from; None is the prior's null. noise: (N, D), else drawn from the generators, one a
    picture. wrap: a further function of the guided `Predict`.
    """
    device = text.embedding.device
    text = text.to(device, prior.dtype)
    negative = prior.null(len(text)) if negative is None else negative
    scheduler.set_timesteps(steps, device=device)
    ahead = [scheduler.timesteps] if isinstance(prior, Prior) else []
    predict = build_guided_predict(prior, text, negative.to(device, prior.dtype), guidance, scheduler, *ahead)
    if wrap is not None:
        predict = wrap(predict)
    if noise is None:
        noise = generate_noise((prior.config.embed_dim,), generators, device)
    return prior.unscale_image_embeds(
        sample_from_noise(predict, scheduler, noise.to(device).float(), steps, generators, progress, on_step)
    )


@torch.no_grad()
def sample_decoder(
    decoder: Decoder | UNetDecoder,
    scheduler: SchedulerMixin,
    z_i: Tensor,
    text: TextEncoding | None,
    steps: int,
    guidance: float | Guidance,
    generators: list[Generator],
    noise: Tensor | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Latents of unit variance, (N, C, h, w), fp32, on the device of `z_i`, (N, D).

    text: for decoders that read captions; None says nothing. noise: (N, C, h, w), else drawn from the generators, one a
    picture.
    """
    predict = build_decoder_predict(decoder, scheduler, z_i, text, guidance)
    if noise is None:
        size = decoder.config.latent_size
        noise = generate_noise((decoder.config.latent_channels, size, size), generators, z_i.device)
    return sample_from_noise(predict, scheduler, noise.to(z_i.device).float(), steps, generators, progress, on_step)


def build_decoder_predict(
    decoder: Decoder | UNetDecoder,
    scheduler: SchedulerMixin,
    z_i: Tensor,
    text: TextEncoding | None,
    guidance: float | Guidance,
    negative: ImageCondition | None = None,
    known: Tensor | None = None,
) -> Predict:
    """What the guided decoder predicts of latents that show z_i, (N, D), on the device of `z_i`.

    known: what is to stay of the picture, for decoders that read it; see
    `t2i.diffusion.inpainting.concat_masked_latents`.
    """
    device, null = z_i.device, decoder.null(len(z_i))
    known = known if decoder.config.reads_masks else None
    condition = ImageCondition(
        noise_image_embeds(decoder, z_i), null.text if text is None or null.text is None else text, known
    )
    away = null if negative is None else negative
    embedding = noise_image_embeds(decoder, away.embedding.to(device))
    negative = ImageCondition(
        embedding, null.text if null.text is None else away.text or null.text, known, rows=away.rows
    )
    dtype = decoder.dtype
    return build_guided_predict(decoder, condition.to(device, dtype), negative.to(device, dtype), guidance, scheduler)


def noise_image_embeds(decoder: Any, z_i: Tensor, noise: Tensor | None = None, level: int = 0) -> Tensor:
    """What a decoder is told of z_i, (N, D): Stable unCLIP's noises it to a level first, with `noise` like z_i."""
    return decoder.noise_image_embeds(z_i, noise, level) if hasattr(decoder, "noise_image_embeds") else z_i


def split_generators(generator: Generator | list[Generator] | None, count: int) -> tuple[list[Generator], ...]:
    """Generators of each picture for the prior and for the decoder.

    Two streams, so that a picture's decoder noise does not depend on the prior's steps. From one generator the seeds of
    all pictures are drawn in order, so the first pictures of a larger batch are those of a smaller one.
    """
    if generator is None:
        generator = Generator().manual_seed(int(torch.randint(2**62, (1,))))
    generators = [generator] * count if isinstance(generator, Generator) else generator
    if not isinstance(generators, list) or not all(isinstance(one, Generator) for one in generators):
        raise InputError(f"generator must be a torch.Generator or a list of them, got {generator!r:.80}")
    if len(generators) != count:
        raise InputError(f"generator has {len(generators)} generators for {count} pictures; give one, or one a picture")
    seeds = [
        [int(torch.randint(2**62, (1,), generator=one, device=one.device)) for _ in range(2)] for one in generators
    ]
    return tuple([Generator().manual_seed(pair[stage]) for pair in seeds] for stage in range(2))
