"""What can be seen of a drawing while it is made, and how it is stopped."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor


class Interrupted(RuntimeError):
    """Somebody called `interrupt()`: the drawing ended between two steps. The pipeline can be called again."""


@dataclass
class Preview:
    """Estimate of a stage's result after a step.

    stage: "inversion", "prior", "decoder" or "upsampler". step: from 1 to steps. estimate: the clean sample: z_i of
    unit length, (N, D); latents, (N, C, h, w), of the inversion as noisy as they are by then; or pictures,
    (N, 3, H, W) in [-1, 1]. images(): N pictures of it, made when they are asked for: of latents as the autoencoder
    decodes them, of z_i as the decoder draws them in a few steps.
    """

    stage: str
    step: int
    steps: int
    estimate: Tensor
    images: Callable[[], list[Image.Image]]
