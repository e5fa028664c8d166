"""Inpainting: what is known, what is painted, and the seam between them.

A mask is 1 where there is to be painted. Two methods keep the rest, and combine: *blending* puts the known latents back
at their noise level after every step (Lugmayr et al. 2022, without the resampling); *conditioning* shows the known
latents and the mask to a decoder that was trained with masks, beside the noisy latents (Rombach et al. 2022).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from t2i.diffusion.process import own_alpha_sigma

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

    def draw_span(size: int) -> tuple[Tensor, Tensor]:
        """Return first and last + 1 of an interval of each mask, (count, 1) each, in 0 to `size`."""
        ends = (torch.rand(count, 2, device=device) * (size + 1)).long().clamp(max=size).sort(dim=1).values
        return ends[:, :1], ends[:, 1:]

    (top, bottom), (left, right) = draw_span(height), draw_span(width)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    # A quarter covers everything; the rest is inside or outside of a rectangle, with equal chances
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
            alpha, sigma = own_alpha_sigma(scheduler, next_timesteps[step], latents)
            known = alpha * latents + sigma * noise
        return torch.where(mask > 0, x, known)

    return on_step


def paste_painted_region(painted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Paste the painted region into the images: (N, 3, H, W) each; mask: (N, 1, H, W).

    The autoencoder returns no image exactly, so that a step would show at the border. Painted pixels near the border
    are shifted by the blurred error of the kept pixels beside them.
    """
    size = 2 * round(3 * SEAM_BLUR_SIGMA) + 1
    # The autoencoder's error of what stays, carried over the border by a blur
    error = gaussian_blur((images - painted) * (1 - mask), [size, size], [SEAM_BLUR_SIGMA, SEAM_BLUR_SIGMA])
    return torch.where(mask > 0, painted + 2 * error, images)  # twice: half of a blur at a border is of the other side
