"""Painting a part of a picture, and pictures larger than the decoder's own.

A mask is 1 where there is to be painted. What is not painted is held in two ways, which combine: *blended*, every step
puts the known latents back at their noise level (Lugmayr et al. 2022, without the resampling); *conditioned*, a decoder
that was trained with masks reads the known latents and the mask beside the noisy ones (Rombach et al. 2022).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from t2i.diffusion.denoiser import Predict
from t2i.diffusion.process import alpha_sigma

SEAM_BLUR_SIGMA = 1.0  # deviation in pixels of the blur that hides the border; more shows it more, docs/inpainting.md
FULL_MASK_FRACTION = 0.25  # of the masks in training cover everything, so that the decoder still draws whole pictures


def concat_masked_latents(latents: Tensor, mask: Tensor) -> Tensor:
    """(B, C, h, w) and (B, 1, h, w) -> (B, C + 1, h, w): the latents that stay, zero elsewhere, and the mask."""
    return torch.cat([latents * (1 - mask), mask], dim=1)


def downsample_mask(mask: Tensor, factor: int) -> Tensor:
    """(B, 1, H, W) of pixels -> (B, 1, H / factor, W / factor): 1 wherever a pixel is to be painted."""
    return F.max_pool2d(mask, factor)


def generate_random_masks(count: int, height: int, width: int, device: torch.device) -> Tensor:
    """(count, 1, height, width) of 0 and 1: rectangles of any size, what lies outside of them, or everything."""

    def span(size: int) -> tuple[Tensor, Tensor]:
        ends = (torch.rand(count, 2, device=device) * (size + 1)).long().clamp(max=size).sort(dim=1).values
        return ends[:, :1], ends[:, 1:]

    (top, bottom), (left, right) = span(height), span(width)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    kind = torch.rand(count, 1, 1, device=device)
    mask = torch.where(kind < (1 + FULL_MASK_FRACTION) / 2, inside, ~inside)
    return (mask | (kind < FULL_MASK_FRACTION))[:, None].float()


def build_blend_callback(
    scheduler: SchedulerMixin, latents: Tensor, mask: Tensor, noise: Tensor
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Build the callback that puts known latents back after each step, at the noise level of the next step.

    scheduler: the one that is sampled with, of levels as `t2i.diffusion.process.alpha_sigma` has them. latents, noise:
    (B, C, h, w),
    the noise that sampling started from; mask: (B, 1, h, w).
    """
    left = torch.zeros(0)

    def on_step(step: int, t: Tensor, x: Tensor) -> Tensor:
        nonlocal left
        if step == 0:  # below full strength, sampling starts in the middle of the timesteps
            times = scheduler.timesteps[scheduler.timesteps >= 0]
            left = times[int((times == t).nonzero()[-1]) + 1 :]
        known = latents
        if step < len(left):  # by number and not by time: Heun's method visits each twice
            alpha, sigma = alpha_sigma(scheduler, left[step], latents)
            known = alpha * latents + sigma * noise
        return torch.where(mask > 0, x, known)

    return on_step


def paste_painted_region(painted: Tensor, pictures: Tensor, mask: Tensor) -> Tensor:
    """Return the painted region within the kept picture: (N, 3, H, W) each, mask: (N, 1, H, W).

    The autoencoder returns no picture exactly, so that a step would show at the border; what is painted next to it is
    shifted by the error that the kept pixels beside it have.
    """
    size = 2 * round(3 * SEAM_BLUR_SIGMA) + 1
    error = gaussian_blur((pictures - painted) * (1 - mask), [size, size], [SEAM_BLUR_SIGMA, SEAM_BLUR_SIGMA])
    return torch.where(mask > 0, painted + 2 * error, pictures)  # half of a blur at a border is of the other side


@dataclass(frozen=True)
class Window:
    """A square of a canvas, in latents."""

    top: int
    left: int
    size: int

    def crop_latents(self, x: Tensor) -> Tensor:
        """(..., h, w) -> (..., size, size)."""
        return x[..., self.top : self.top + self.size, self.left : self.left + self.size]


def build_canvas_windows(height: int, width: int, size: int) -> list[Window]:
    """Squares that cover a canvas and overlap by half at least; one for a canvas that is such a square."""

    def starts(length: int) -> list[int]:
        count = 1 + -(-(length - size) // max(1, size // 2))
        return [round(i * (length - size) / max(1, count - 1)) for i in range(count)]

    return [Window(top, left, size) for top in starts(height) for left in starts(width)]


def build_windowed_predict(predicts: list[Predict], places: list[Window]) -> Predict:
    """One prediction from those of overlapping windows, each weighted by the distance from its border (Bar-Tal et al.
    2023 average them)."""
    if len(places) == 1:
        return predicts[0]
    size = places[0].size
    ramp = 1 - ((torch.arange(size) + 0.5) / size * 2 - 1).abs()
    weight = ramp[:, None] * ramp

    def predict(x: Tensor, t: Tensor) -> Tensor:
        total, share = None, x.new_zeros(x.shape[-2:])
        for one, place in zip(predicts, places):
            part = one(place.crop_latents(x), t)
            if total is None:
                total = x.new_zeros(len(x), part.shape[1], *x.shape[-2:])
            place.crop_latents(total).add_(part * weight.to(x))
            place.crop_latents(share).add_(weight.to(x))
        assert total is not None, "there are windows"
        return total / share

    return predict
