"""Count the memory that a batch of images needs, stage by stage, and how many images fit; see `t2i.runtime.memory`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from t2i.pipelines.options import DecoderOptions, PriorOptions
from torch import nn

from t2i.data.buckets import Shape
from t2i.errors import InputError
from t2i.networks.unet_steps import can_pack_weights, is_supported_unet
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

# Upper bound of any stage: this many bytes per pixel, plus 64 times as many per latent. If that fits, nothing is
# counted.
AMPLE_BYTES_PER_PIXEL = 12_000
# The count may exceed what is allocated: by a ninth where captions are long and images small, by more without AVX-512
# (tests allow 1.05 and 1.25). A batch is refused only if the count divided by this is too much.
OVERCOUNT_FACTOR = 1.25


class BatchTooLargeError(InputError):
    """A batch that needs more memory than there is.

    reason: the message without advice. fitting_count: the number of images that fit; 0 if not even one does.
    """

    def __init__(self, reason: str, fitting_count: int):
        advice = f"draw {fitting_count} at once" if fitting_count else "ask for smaller images"
        super().__init__(f"{reason}; {advice}")
        self.reason, self.fitting_count = reason, fitting_count


def check_batch_fits(
    pipeline: Any,
    prior: PriorOptions | None,
    decoder: DecoderOptions,
    count: int,
    processes: int = 1,
    window: Shape | None = None,
) -> None:
    """Raise BatchTooLargeError, before any work, if a batch of `count` images certainly needs more memory than is free.

    Args:
        prior: None if the prior is not used.
        processes: processes of this machine that draw such a batch at the same time.
        window: sides of the parts of the latents that the decoder denoises one after another; None denoises them whole.
    """
    device = pipeline._execution_device
    memory = measure_available_memory(device).divide_by_processes(processes)
    if has_ample_memory(pipeline, decoder, count, memory.free):
        return
    needed = count_bytes_needed(pipeline, prior, decoder, count, window)
    if needed > memory.free * OVERCOUNT_FACTOR:
        # Memory freed earlier may still belong to the C library
        release_freed_memory()
        memory = measure_available_memory(device).divide_by_processes(processes)
    if needed <= memory.free * OVERCOUNT_FACTOR:
        return
    # Advise a count that fits with a margin, else one that may just fit
    fitting_count = 0
    for free in (memory.free / MEMORY_MARGIN, memory.free * OVERCOUNT_FACTOR):
        fitting_count = fitting_count or find_fitting_count(pipeline, prior, decoder, count, free, window)
    reason = f"a batch of {count} does not fit into memory: it needs {format_bytes(needed)}, {memory}"
    if processes > 1:
        reason += f" for each of {processes} processes"
    raise BatchTooLargeError(reason, fitting_count)


def find_fitting_count(
    pipeline: Any,
    prior: PriorOptions | None,
    decoder: DecoderOptions,
    count: int,
    free: float,
    window: Shape | None = None,
) -> int:
    """Return `count`, halved (rounding up) until a batch needs at most `free` bytes; 0 if one image needs more."""
    while not has_ample_memory(pipeline, decoder, count, free):
        if count_bytes_needed(pipeline, prior, decoder, count, window) <= free:
            break
        if count == 1:
            return 0
        count = (count + 1) // 2
    return count


def count_fitting_pixels(pipeline: Any, processes: int = 1) -> float:
    """Return how many pixels of images can be drawn at once, with a margin, in the memory that is free now.

    Infinity if the pipeline's stages cannot be counted. processes: see `check_batch_fits`.
    """
    prior, decoder = pipeline.resolve_options()
    # What each further image needs: packed weights are there already
    one, two = (count_bytes_needed(pipeline, prior, decoder, count) for count in (1, 2))
    if two <= one:
        return math.inf
    height, width = pipeline.compute_image_shape(decoder)
    memory = measure_available_memory(pipeline._execution_device).divide_by_processes(processes)
    return memory.free / MEMORY_MARGIN / (two - one) * height * width


def has_ample_memory(pipeline: Any, decoder: DecoderOptions, count: int, free: float) -> bool:
    """Return True if so much memory is free that counting, which takes tenths of a second, is unnecessary."""
    _, height, width = pipeline.compute_latent_shape(decoder)
    factor = pipeline.autoencoder.factor
    if decoder.upsample and pipeline.upsampler is not None:
        factor *= pipeline.upsampler.config.factor**decoder.upsample
    return count * height * width * (factor**2 + 64) * AMPLE_BYTES_PER_PIXEL < free


def count_bytes_needed(
    pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions, count: int, window: Shape | None = None
) -> int:
    """Return the peak of bytes that drawing `count` images allocates, without the weights: that of the largest stage.

    Stages that cannot be counted are left out, and so is CLIP, which needs little. window: see `check_batch_fits`.
    """
    workloads = collect_stage_workloads(pipeline, prior, decoder, count, window)
    # Stages run one after another, so that the largest one decides
    peaks = {name: count_peak_bytes(getattr(pipeline, name), workload) for name, workload in workloads.items()}
    if peaks["decoder"] is not None:
        peaks["decoder"] += count_packed_bytes(pipeline.decoder)
    return max((peak for peak in peaks.values() if peak is not None), default=0)


def collect_stage_workloads(
    pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions, count: int, window: Shape | None = None
) -> dict[str, Callable[[Any], object]]:
    """Return, by component, a function of the model that allocates as much as its stage does at its peak.

    Captions are the null condition, which is as short as any.
    """
    # Each function takes a step as the stage does, of tensors without values
    channels, height, width = pipeline.compute_latent_shape(decoder)
    sides = [height * pipeline.autoencoder.factor, width * pipeline.autoencoder.factor]

    def run_denoiser(model: Any, rows: int, *shape: int) -> None:
        condition = model.null(rows).expand()  # as many captions as there are rows
        if factor := model.control_factor:
            condition.control = torch.empty(rows, 3, *(factor * side for side in shape[1:]), dtype=model.dtype)
        context = model.prepare(condition)
        model.step(torch.empty(rows, *shape, dtype=model.dtype), torch.zeros(rows, dtype=torch.long), context)

    def run_upsampler(model: Any) -> None:
        last = [side * model.config.factor ** (decoder.upsample - 1) for side in sides]
        low = pad_edges(torch.empty(count, 3, *last, dtype=model.dtype), model.config.factor, model.image_size_multiple)
        null = model.null(count)
        context = model.prepare(LowResolution(low, null.level, null.embedding))
        rows, columns = (slice(0, DEFAULT_TILE_SIZE), slice(0, DEFAULT_TILE_SIZE))
        x = torch.empty_like(context.low)
        model.step(x[..., rows, columns], torch.zeros(count, dtype=torch.long), context.crop_window(rows, columns))

    # Guidance doubles the rows of the denoisers
    decoder_rows = count if decoder.guidance_scale.is_off else 2 * count
    height_seen, width_seen = window or (height, width)
    workloads: dict[str, Callable[[Any], object]] = {
        "decoder": lambda model: run_denoiser(model, decoder_rows, channels, height_seen, width_seen),
        "autoencoder": lambda model: model.decode(torch.empty(count, channels, height, width, dtype=model.dtype)),
    }
    if prior is not None and pipeline.prior is not None:
        candidates = count_candidates(pipeline.prior, prior.prior_candidates, prior.prior_latents)
        prior_rows = candidates * (count if prior.prior_guidance_scale.is_off else 2 * count)
        workloads["prior"] = lambda model: run_denoiser(model, prior_rows, pipeline.clip.embed_dim)
    if decoder.upsample and pipeline.upsampler is not None:
        workloads["upsampler"] = run_upsampler
    return workloads


def count_packed_bytes(decoder: nn.Module) -> int:
    """Return the bytes of the convolution weights that a U-Net's steps copy into oneDNN's order."""
    packed = 0
    for unet in decoder.modules():
        if not isinstance(unet, UNet2DConditionModel) or not is_supported_unet(unet):
            continue
        if can_pack_weights(unet, next(unet.parameters())):
            convolutions = [layer for layer in unet.modules() if type(layer) is nn.Conv2d]
            packed += sum(layer.weight.numel() * layer.weight.element_size() for layer in convolutions)
    return packed
