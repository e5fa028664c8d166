"""Previews, progress and interruption of a drawing: what callbacks get and raise, and what shows the steps."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from t2i.pipelines.calls.callbacks import CallbackState
from torch import Tensor

from t2i.progress import follow_steps


class Interrupted(RuntimeError):
    """End of a drawing between two steps, after `interrupt()`. The pipeline can be called again."""


class Interruptible(CallbackState):
    """Base of all pipelines: the flag that `t2i.pipelines.stages.build_preview_hooks` reads after each step."""

    @property
    def interrupted(self) -> bool:
        """True for the call of this thread if it ends after this step."""
        return self.call_state.interrupted

    def interrupt(self) -> None:
        """End running calls by `Interrupted` at their next step: from a callback its own, else all of the pipeline."""
        self.set_call_state(interrupted=True)


@dataclass
class Preview:
    """Estimate of a stage's result after a step.

    stage: "inversion", "prior", "decoder", "super_resolution" or "upsampler".
    step: number from 1 to steps.
    estimate: the clean sample: z_i of unit length, (N, D); latents, (N, C, h, w), which are still noisy in an
        inversion; or images, (N, 3, H, W) in [-1, 1].
    images: `images()` makes N PIL images of the estimate: latents are decoded, z_i is drawn by the decoder in a few
        steps.
    """

    stage: str
    step: int
    steps: int
    estimate: Tensor
    images: Callable[[], list[Image.Image]]


def show_steps(pipeline: Any, stage: str) -> Callable[[Iterable], Iterable]:
    """Return what shows the steps of a stage while they are taken: the pipeline's bar, and a command's progress."""
    return lambda steps: follow_steps(stage, pipeline.progress_bar(steps))
