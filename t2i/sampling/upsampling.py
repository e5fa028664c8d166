"""Upsampling of images in few steps and bounded memory."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Generator, Tensor

from t2i.checks import check_integer, check_multiple_of, check_range
from t2i.diffusion.process import own_alpha_sigma
from t2i.diffusion.sampling_loop import (
    MAX_STEPS,
    Sampling,
    generate_noise,
    get_initial_scale,
    sample_from_noise,
    set_timesteps,
)
from t2i.diffusion.windows import Window, build_windowed_predict
from t2i.errors import InputError
from t2i.limits import MAX_PIXELS
from t2i.networks.upsampler import (
    LowResolution,
    Upsampler,
    UpsamplerContext,
    augment_low_resolution,
    enlarge_low_resolution,
)
from t2i.runtime.hooks import find_compute_device
from t2i.runtime.memory import run_in_halves

DEFAULT_TILE_SIZE = 512  # pixels of the high resolution
MAX_ENLARGEMENTS = 8  # times that an image passes through the upsampler
SEED_STRIDE = 0x9E3779B97F4A7C15  # between the seeds of stages: 2^64 by the golden ratio, as in SplitMix64


@torch.no_grad()
def sample_upsampler(
    upsampler: Upsampler,
    scheduler: SchedulerMixin,
    low: Tensor,
    sampling: Sampling,
    z_i: Tensor | None = None,
    level: float = 0.0,
    tile: int = DEFAULT_TILE_SIZE,
    overlap: int | None = None,
) -> Tensor:
    """Sample (N, 3, factor h, factor w) in [-1, 1], fp32, on the upsampler's device, from `low`, (N, 3, h, w).

    Starts where the schedule does, from the resized low resolution noised to there: from noise alone if the schedule
    ends in noise. Images have any size; those that no multiple fits are continued at the right and below meanwhile.

    Args:
        low: images in [-1, 1].
        sampling: its noise is drawn for whole images, so that it does not depend on the tiles; x in its `on_step` and
            `transform` has the sides that the network takes, with the image as its upper left part.
        z_i: (N, D), unit length, for upsamplers that take it.
        level: noise of the noise-conditioning augmentation, up to the upsampler's `max_level`: more redraws more.
        tile, overlap: larger images are denoised in overlapping windows of `tile` x `tile` pixels of the high
            resolution, whose predictions are blended in every step, so that the window bounds the memory of a step.
            Both are multiples of the upsampler's `image_size_multiple`; overlap None is an eighth of the window.

    Raises InputError, in one line, for an image that is too small or too large, and values out of range.
    """
    # Check the arguments
    factor, multiple, generators = upsampler.config.factor, upsampler.image_size_multiple, sampling.generators
    check_low_resolution(upsampler, low, len(generators))
    check_integer("steps", sampling.steps, 1, MAX_STEPS)
    check_range("level", level, 0, upsampler.config.max_level)
    overlap = resolve_tile_overlap(tile, overlap, multiple)
    # Prepare the condition: the padded low resolution, noised to the level
    device, dtype, (height, width) = find_compute_device(upsampler), upsampler.dtype, low.shape[-2:]
    low = pad_edges(low.to(device).float(), factor, multiple)
    levels, seen = torch.full((len(low),), float(level), device=device), low
    if level:
        seen = augment_low_resolution(low, levels, generate_noise(low.shape[1:], generators, device))
    takes_embeds = z_i is not None and upsampler.config.embed_dim is not None
    condition = LowResolution(seen, levels, z_i if takes_embeds else upsampler.null(len(low)).embedding)
    context = upsampler.prepare(condition.to(device, dtype))

    def predict_window(window: Window, x: Tensor, t: Tensor) -> Tensor:
        def predict_rows(x: Tensor, *rows: Tensor) -> Tensor:
            return upsampler.step(x.to(dtype), t.expand(len(x)), UpsamplerContext(*rows)).to(x.dtype)

        part = context.crop_window(window.rows, window.columns)
        return run_in_halves(predict_rows, x, part.low, part.embedding)

    # Start from the resized low resolution, noised to the first timestep
    set_timesteps(scheduler, sampling, device)
    start = enlarge_low_resolution(low, factor)
    alpha, sigma = own_alpha_sigma(scheduler, scheduler.timesteps[0], start)
    x = alpha * start + sigma * generate_noise(start.shape[1:], generators, device)
    x = x / get_initial_scale(scheduler)  # by which sampling multiplies what it takes for noise
    windows = build_tile_windows(x.shape[-2], x.shape[-1], tile, overlap)
    predict = build_windowed_predict([partial(predict_window, window) for window in windows], windows)
    x = sample_from_noise(predict, scheduler, x, sampling)
    return x[..., : factor * height, : factor * width].clamp(-1, 1)


def build_tile_windows(height: int, width: int, tile: int, overlap: int) -> list[Window]:
    """Return windows that cover an image, with the weights of their predictions.

    The outer quarter of an overlap has no weight, because a network sees nothing beyond its window; the middle half
    fades from one window to the next. So a network whose receptive field is a quarter of the overlap predicts the same
    in windows and as a whole.
    """
    windows = []
    for rows in build_tile_slices(height, tile, overlap):
        for columns in build_tile_slices(width, tile, overlap):
            down = compute_fade_weights(rows, height, overlap)
            across = compute_fade_weights(columns, width, overlap)
            windows.append(Window(rows, columns, down[:, None] * across))
    return windows


def build_tile_slices(side: int, tile: int, overlap: int) -> list[slice]:
    """Return windows that cover 0 ... side, the last one moved back to the end."""
    if side <= tile:
        return [slice(0, side)]
    # The last window is moved back, so that all have one size
    starts = [*range(0, side - tile, tile - overlap), side - tile]
    return [slice(start, start + tile) for start in starts]


def compute_fade_weights(span: slice, side: int, overlap: int) -> Tensor:
    """Return the weight of each pixel of a window along a side: 1, falling to 0 where another window overlaps."""
    position = torch.arange(span.start, span.stop) + 0.5
    weight = torch.ones(len(position))
    for is_inside, distance in ((span.start > 0, position - span.start), (span.stop < side, span.stop - position)):
        if is_inside:
            weight *= ((distance - overlap / 4) / (overlap / 2)).clamp(0, 1)
    return weight


def pad_edges(low: Tensor, factor: int, multiple: int) -> Tensor:
    """Repeat the last row and column of images until their enlarged sides are multiples of `multiple`."""
    step = max(1, multiple // factor)
    down, across = (-side % step for side in low.shape[-2:])
    return F.pad(low, (0, across, 0, down), mode="replicate") if down or across else low


def check_low_resolution(upsampler: Upsampler, low: Tensor, generators: int) -> None:
    if low.ndim != 4 or low.shape[1] != 3:
        raise InputError(f"low must be images, (N, 3, height, width), got {tuple(low.shape)}")
    if len(low) != generators:
        raise InputError(f"there are {generators} generators for {len(low)} images; give one an image")
    check_upsampled_size(upsampler, low.shape[-1], low.shape[-2])


def check_upsampled_size(upsampler: Upsampler, width: int, height: int, times: int = 1) -> None:
    """Refuse images that are smaller than a patch of the network, or too large after `times` enlargements."""
    factor = upsampler.config.factor
    least = max(1, upsampler.image_size_multiple // factor)
    if min(width, height) < least:
        raise InputError(f"image to upsample must have sides of at least {least} pixels, got {width} x {height}")
    scale = factor**times
    if width * height * scale**2 > MAX_PIXELS:
        larger = f"{width} x {height} would become {width * scale} x {height * scale}"
        raise InputError(f"upsampled images may have {MAX_PIXELS:,} pixels, {larger}")


def resolve_tile_overlap(tile: Any, overlap: Any, multiple: int) -> int:
    """Check the tile and return the overlap: the given one, or an eighth of the tile."""
    check_integer("tile", tile, multiple, 8192)
    if overlap is None:
        overlap = max(multiple, tile // 8 // multiple * multiple)
    check_multiple_of("tile", tile, multiple)
    check_integer("overlap", overlap, multiple, tile // 2)
    check_multiple_of("overlap", overlap, multiple)
    return overlap


def derive_stage_generators(generators: list[Generator], stage: int) -> list[Generator]:
    """Return generators for another stage from the seeds of the decoder's, whose state stays as it is.

    stage: any number but 0.
    """
    return [Generator().manual_seed((item.initial_seed() + SEED_STRIDE * stage) % 2**63) for item in generators]
