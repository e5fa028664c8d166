"""Inpainting, and images larger than those that the decoder was trained on.

A mask is 1 where there is to be painted. Two methods keep the rest, and combine: *blending* puts the known latents back
at their noise level after every step (Lugmayr et al. 2022, without the resampling); *conditioning* shows the known
latents and the mask to a decoder that was trained with masks, beside the noisy latents (Rombach et al. 2022).
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

SEAM_BLUR_SIGMA = 1.0  # pixels: deviation of the blur that hides the border; see docs/how-to/inpaint.md
FULL_MASK_FRACTION = 0.25  # fraction of training masks that cover everything, so that whole images are learned too


def concat_masked_latents(latents: Tensor, mask: Tensor) -> Tensor:
    """Join latents that are kept, zero elsewhere, and the mask: (B, C, h, w), (B, 1, h, w) -> (B, C + 1, h, w)."""
    return torch.cat([latents * (1 - mask), mask], dim=1)


def downsample_mask(mask: Tensor, factor: int) -> Tensor:
    """Reduce a mask of pixels, (B, 1, H, W), to (B, 1, H / factor, W / factor), 1 wherever a pixel is painted."""
    return F.max_pool2d(mask, factor)


def generate_random_masks(count: int, height: int, width: int, device: torch.device) -> Tensor:
    """Draw masks of 0 and 1, (count, 1, height, width): rectangles of any size, their outsides, or everything."""

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
    """Return a callback that puts known latents back, at the noise level of the next step, where nothing is painted.

    scheduler: the one that samples. latents, noise: (B, C, h, w), the noise that sampling starts from. mask:
    (B, 1, h, w).
    """
    next_timesteps = torch.zeros(0)

    def on_step(step: int, t: Tensor, x: Tensor) -> Tensor:
        nonlocal next_timesteps
        if step == 0:  # below full strength, sampling starts in the middle of the timesteps
            timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
            next_timesteps = timesteps[int((timesteps == t).nonzero()[-1]) + 1 :]
        known = latents
        if step < len(next_timesteps):  # by number, not by timestep: Heun's method visits each twice
            alpha, sigma = alpha_sigma(scheduler, next_timesteps[step], latents)
            known = alpha * latents + sigma * noise
        return torch.where(mask > 0, x, known)

    return on_step


def paste_painted_region(painted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Paste the painted region into the images: (N, 3, H, W) each; mask: (N, 1, H, W).

    The autoencoder returns no image exactly, so that a step would show at the border. Painted pixels near the border
    are shifted by the blurred error of the kept pixels beside them.
    """
    size = 2 * round(3 * SEAM_BLUR_SIGMA) + 1
    error = gaussian_blur((images - painted) * (1 - mask), [size, size], [SEAM_BLUR_SIGMA, SEAM_BLUR_SIGMA])
    return torch.where(mask > 0, painted + 2 * error, images)  # twice: half of a blur at a border is of the other side


@dataclass(frozen=True)
class Window:
    """Square part of a canvas, in latents."""

    top: int
    left: int
    size: int

    def crop_latents(self, x: Tensor) -> Tensor:
        """Crop (..., h, w) to (..., size, size)."""
        return x[..., self.top : self.top + self.size, self.left : self.left + self.size]


def build_canvas_windows(height: int, width: int, size: int) -> list[Window]:
    """Return squares that cover a canvas and overlap by at least half; a canvas of that size is one square."""

    def starts(length: int) -> list[int]:
        count = 1 + -(-(length - size) // max(1, size // 2))
        return [round(i * (length - size) / max(1, count - 1)) for i in range(count)]

    return [Window(top, left, size) for top in starts(height) for left in starts(width)]


def build_windowed_predict(predicts: list[Predict], windows: list[Window]) -> Predict:
    """Blend the predictions of overlapping windows, weighted by the distance from their borders.

    Bar-Tal et al. 2023 take the plain average.
    """
    if len(windows) == 1:
        return predicts[0]
    size = windows[0].size
    ramp = 1 - ((torch.arange(size) + 0.5) / size * 2 - 1).abs()
    weight = ramp[:, None] * ramp

    def predict(x: Tensor, t: Tensor) -> Tensor:
        total, weights = None, x.new_zeros(x.shape[-2:])
        for predict_window, window in zip(predicts, windows):
            part = predict_window(window.crop_latents(x), t)
            if total is None:  # a learned variance has twice the channels of x
                total = x.new_zeros(len(x), part.shape[1], *x.shape[-2:])
            window.crop_latents(total).add_(part * weight.to(x))
            window.crop_latents(weights).add_(weight.to(x))
        assert total is not None, "there are windows"
        return total / weights

    return predict
