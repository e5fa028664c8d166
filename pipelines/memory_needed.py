"""How much memory a batch of pictures needs, stage by stage, and how many fit. See `t2i.runtime.memory`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from t2i.pipelines.options import DecoderOptions, PriorOptions
from torch import nn

from t2i.diffusion.guidance import Guidance
from t2i.errors import InputError
from t2i.networks.unet_steps import is_known, packs
from t2i.networks.upsampler import LowResolution
from t2i.runtime.memory import MARGIN, give_back, in_units, peak, room
from t2i.sampling.embeddings import candidates_drawn
from t2i.sampling.upsampling import TILE, continued

PLENTY = 12_000  # bytes for each pixel, and for as many for each latent: with so much, nothing needs to be counted
# What is counted may be more than what is taken: by a ninth where captions are long beside so few pixels, and by more
# without AVX-512 (tests allow 1.05, and 1.25 there). Who asks for a batch is refused only what does not fit even so.
OVERCOUNTED = 1.25


class DoesNotFit(InputError):
    """A batch needs more memory than there is. said: without advice. fewer: how many fit; 0 if not even one does."""

    def __init__(self, said: str, fewer: int):
        super().__init__(f"{said}; " + (f"draw {fewer} at once" if fewer else "ask for smaller pictures"))
        self.said, self.fewer = said, fewer


def check_fits(
    pipeline: Any,
    prior: PriorOptions | None,
    decoder: DecoderOptions,
    count: int,
    processes: int = 1,
    window: int | None = None,
) -> None:
    """Refuse a batch of so many pictures before any work, where what is counted is surely more than what is free.

    processes: of this machine, that draw as much each. window: side of the parts of the latents that the decoder sees
    one after the other; None is all at once.
    """
    device = pipeline._execution_device
    there = room(device).shared(processes)
    if is_plenty(pipeline, decoder, count, there.free):
        return
    needs = counter(pipeline, prior, decoder, window)
    if needs(count) > there.free * OVERCOUNTED:
        give_back()
        there = room(device).shared(processes)
    if needs(count) <= there.free * OVERCOUNTED:
        return
    safe, least = (halved(needs, count, there.free * part) for part in (1 / MARGIN, OVERCOUNTED))
    said = f"a batch of {count} does not fit into memory: it needs {in_units(needs(count))}, {there}"
    raise DoesNotFit(said + f" for each of {processes} processes" * (processes > 1), safe or least)


def largest_half(pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions, count: int, free: float) -> int:
    """The count, halved until so many bytes are enough; 0 if they are not for one."""
    needs = counter(pipeline, prior, decoder)
    return halved(lambda few: 0 if is_plenty(pipeline, decoder, few, free) else needs(few), count, free)


def halved(needs: Callable[[int], int], count: int, free: float) -> int:
    while needs(count) > free:
        if count == 1:
            return 0
        count = (count + 1) // 2
    return count


def counter(
    pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions, window: int | None = None
) -> Callable[[int], int]:
    """`bytes_needed` of a count, counted once for each. Not kept for longer: pipelines and their parts change."""
    return cache(lambda count: bytes_needed(pipeline, prior, decoder, count, window))


def is_plenty(pipeline: Any, decoder: DecoderOptions, count: int, free: float) -> bool:
    """Whether so much is free that counting, which takes tenths of a second, would say nothing new."""
    _, height, width = pipeline.shape_of(decoder)
    factor = pipeline.autoencoder.factor
    if decoder.upsample and pipeline.upsampler is not None:
        factor *= pipeline.upsampler.config.factor**decoder.upsample
    return count * height * width * (factor**2 + 64) * PLENTY < free


def bytes_needed(
    pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions, count: int, window: int | None = None
) -> int:
    """Bytes at the peak of drawing so many pictures, beside the weights: of the stage that needs most.

    A stage that cannot be counted is left out, and so is CLIP, which needs little. window: as of `check_fits`.
    """
    works = works_of(pipeline, prior, decoder, count, window)
    peaks = {name: peak(getattr(pipeline, name), work) for name, work in works.items()}
    if peaks["decoder"] is not None:
        peaks["decoder"] += packed_bytes(pipeline.decoder)
    return max((one for one in peaks.values() if one is not None), default=0)


def works_of(
    pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions, count: int, window: int | None = None
) -> dict[str, Callable[[Any], object]]:
    """By a component's name, what takes most of its memory; the captions are as short as they can be."""
    channels, height, width = pipeline.shape_of(decoder)
    sides = [height * pipeline.autoencoder.factor, width * pipeline.autoencoder.factor]

    def denoise(model: Any, rows: int, *shape: int) -> None:
        context = model.prepare(model.null(rows))
        model.step(torch.empty(rows, *shape, dtype=model.dtype), torch.zeros(rows, dtype=torch.long), context)

    def enlarge(model: Any) -> None:
        last = [side * model.config.factor ** (decoder.upsample - 1) for side in sides]
        low = continued(torch.empty(count, 3, *last, dtype=model.dtype), model.config.factor, model.multiple)
        null = model.null(count)
        context = model.prepare(LowResolution(low, null.level, null.embedding))
        rows, columns = (slice(0, TILE), slice(0, TILE))
        x = torch.empty_like(context.low)
        model.step(x[..., rows, columns], torch.zeros(count, dtype=torch.long), context.window(rows, columns))

    at_once = (channels, *(min(side, window or side) for side in (height, width)))
    guided = 1 if Guidance.of(decoder.guidance_scale).is_off else 2
    works: dict[str, Callable[[Any], object]] = {
        "decoder": lambda model: denoise(model, guided * count, *at_once),
        "autoencoder": lambda model: model.decode(torch.empty(count, channels, height, width, dtype=model.dtype)),
    }
    if prior is not None and pipeline.prior is not None:
        twice = 1 if pipeline.prior_guidance(prior).is_off else 2
        rows = twice * count * candidates_drawn(pipeline.prior, prior.prior_candidates, prior.prior_latents)
        works["prior"] = lambda model: denoise(model, rows, pipeline.clip.embed_dim)
    if decoder.upsample and pipeline.upsampler is not None:
        works["upsampler"] = enlarge
    return works


def packed_bytes(decoder: nn.Module) -> int:
    """Of the copies of convolutions' weights that a U-Net's steps keep in oneDNN's order."""
    found = 0
    for unet in decoder.modules():
        if isinstance(unet, UNet2DConditionModel) and is_known(unet) and packs(unet, next(unet.parameters())):
            layers = [one for one in unet.modules() if type(one) is nn.Conv2d]
            found += sum(one.weight.numel() * one.weight.element_size() for one in layers)
    return found
