"""How much memory a batch of pictures needs, stage by stage, and how many fit. See `t2i.runtime.memory`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from t2i.pipelines.options import DecoderOptions, PriorOptions
from torch import nn

from t2i.errors import InputError
from t2i.networks.unet_steps import can_pack_weights, is_known_unet
from t2i.networks.upsampler import LowResolution
from t2i.runtime.memory import (
    MEMORY_MARGIN,
    count_peak_bytes,
    format_bytes,
    measure_available_memory,
    release_freed_memory,
)
from t2i.sampling.embeddings import count_candidates
from t2i.sampling.upsampling import DEFAULT_TILE_SIZE, pad_edges

AMPLE_BYTES_PER_PIXEL = (
    12_000  # bytes for each pixel, and for as many for each latent: with so much, nothing needs to be counted
)
# What is counted may be more than what is taken: by a ninth where captions are long beside so few pixels, and by more
# without AVX-512 (tests allow 1.05, and 1.25 there). Who asks for a batch is refused only what does not fit even so.
OVERCOUNT_FACTOR = 1.25


class BatchTooLargeError(InputError):
    """A batch needs more memory than there is. said: without advice. fewer: how many fit; 0 if not even one does."""

    def __init__(self, said: str, fewer: int):
        super().__init__(f"{said}; " + (f"draw {fewer} at once" if fewer else "ask for smaller pictures"))
        self.reason, self.fitting_count = said, fewer


def check_batch_fits(
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
    there = measure_available_memory(device).divide_by_processes(processes)
    if has_ample_memory(pipeline, decoder, count, there.free):
        return
    needs = build_byte_counter(pipeline, prior, decoder, window)
    if needs(count) > there.free * OVERCOUNT_FACTOR:
        release_freed_memory()
        there = measure_available_memory(device).divide_by_processes(processes)
    if needs(count) <= there.free * OVERCOUNT_FACTOR:
        return
    safe, least = (halve_until_fits(needs, count, there.free * part) for part in (1 / MEMORY_MARGIN, OVERCOUNT_FACTOR))
    said = f"a batch of {count} does not fit into memory: it needs {format_bytes(needs(count))}, {there}"
    raise BatchTooLargeError(said + f" for each of {processes} processes" * (processes > 1), safe or least)


def find_fitting_count(
    pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions, count: int, free: float
) -> int:
    """The count, halved until so many bytes are enough; 0 if they are not for one."""
    needs = build_byte_counter(pipeline, prior, decoder)
    return halve_until_fits(
        lambda few: 0 if has_ample_memory(pipeline, decoder, few, free) else needs(few), count, free
    )


def halve_until_fits(needs: Callable[[int], int], count: int, free: float) -> int:
    while needs(count) > free:
        if count == 1:
            return 0
        count = (count + 1) // 2
    return count


def build_byte_counter(
    pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions, window: int | None = None
) -> Callable[[int], int]:
    """`count_bytes_needed` of a count, counted once for each. Not kept for longer: pipelines and their parts change."""
    return cache(lambda count: count_bytes_needed(pipeline, prior, decoder, count, window))


def has_ample_memory(pipeline: Any, decoder: DecoderOptions, count: int, free: float) -> bool:
    """Whether so much is free that counting, which takes tenths of a second, would say nothing new."""
    _, height, width = pipeline.compute_latent_shape(decoder)
    factor = pipeline.autoencoder.factor
    if decoder.upsample and pipeline.upsampler is not None:
        factor *= pipeline.upsampler.config.factor**decoder.upsample
    return count * height * width * (factor**2 + 64) * AMPLE_BYTES_PER_PIXEL < free


def count_bytes_needed(
    pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions, count: int, window: int | None = None
) -> int:
    """Bytes at the peak of drawing so many pictures, beside the weights: of the stage that needs most.

    A stage that cannot be counted is left out, and so is CLIP, which needs little. window: as of `check_batch_fits`.
    """
    works = collect_stage_workloads(pipeline, prior, decoder, count, window)
    peaks = {name: count_peak_bytes(getattr(pipeline, name), work) for name, work in works.items()}
    if peaks["decoder"] is not None:
        peaks["decoder"] += count_packed_bytes(pipeline.decoder)
    return max((one for one in peaks.values() if one is not None), default=0)


def collect_stage_workloads(
    pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions, count: int, window: int | None = None
) -> dict[str, Callable[[Any], object]]:
    """By a component's name, what takes most of its memory; the captions are as short as they can be."""
    channels, height, width = pipeline.compute_latent_shape(decoder)
    sides = [height * pipeline.autoencoder.factor, width * pipeline.autoencoder.factor]

    def run_denoiser(model: Any, rows: int, *shape: int) -> None:
        context = model.prepare(model.null(rows).expand())  # as many captions as there are rows
        model.step(torch.empty(rows, *shape, dtype=model.dtype), torch.zeros(rows, dtype=torch.long), context)

    def run_upsampler(model: Any) -> None:
        last = [side * model.config.factor ** (decoder.upsample - 1) for side in sides]
        low = pad_edges(torch.empty(count, 3, *last, dtype=model.dtype), model.config.factor, model.image_size_multiple)
        null = model.null(count)
        context = model.prepare(LowResolution(low, null.level, null.embedding))
        rows, columns = (slice(0, DEFAULT_TILE_SIZE), slice(0, DEFAULT_TILE_SIZE))
        x = torch.empty_like(context.low)
        model.step(x[..., rows, columns], torch.zeros(count, dtype=torch.long), context.crop_window(rows, columns))

    at_once = (channels, *(min(side, window or side) for side in (height, width)))
    guided = 1 if decoder.guidance_scale.is_off else 2
    works: dict[str, Callable[[Any], object]] = {
        "decoder": lambda model: run_denoiser(model, guided * count, *at_once),
        "autoencoder": lambda model: model.decode(torch.empty(count, channels, height, width, dtype=model.dtype)),
    }
    if prior is not None and pipeline.prior is not None:
        twice = 1 if prior.prior_guidance_scale.is_off else 2
        rows = twice * count * count_candidates(pipeline.prior, prior.prior_candidates, prior.prior_latents)
        works["prior"] = lambda model: run_denoiser(model, rows, pipeline.clip.embed_dim)
    if decoder.upsample and pipeline.upsampler is not None:
        works["upsampler"] = run_upsampler
    return works


def count_packed_bytes(decoder: nn.Module) -> int:
    """Of the copies of convolutions' weights that a U-Net's steps keep in oneDNN's order."""
    found = 0
    for unet in decoder.modules():
        if (
            isinstance(unet, UNet2DConditionModel)
            and is_known_unet(unet)
            and can_pack_weights(unet, next(unet.parameters()))
        ):
            layers = [one for one in unet.modules() if type(one) is nn.Conv2d]
            found += sum(one.weight.numel() * one.weight.element_size() for one in layers)
    return found
