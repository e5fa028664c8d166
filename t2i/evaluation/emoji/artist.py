"""Batches of drawings for the judges, and the contact sheets that show them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Generator, Tensor

from t2i.evaluation.emoji.real_emoji import EMOJI_SIZE
from t2i.progress import Progress, follow_batch


class Artist:
    """A pipeline that draws batch by batch; image i of a list has seed i."""

    def __init__(self, pipeline: Any, batch_size: int, settings: dict[str, Any]):
        self.pipeline, self.batch_size, self.settings = pipeline, batch_size, settings
        pipeline.set_progress_bar_config(disable=True)

    def draw(self, prompts: list[str], real: Tensor | None = None) -> Tensor:
        """Return drawings, (N, 3, H, W) in [-1, 1].

        real: images whose z_i are drawn, instead of the prior's, as CLIP sees them, (N, 3, s, s).
        """
        seeds = [Generator().manual_seed(i) for i in range(len(prompts))]

        def draw_batch(part: slice) -> Tensor:
            inputs: dict[str, Any] = {"prompt": prompts[part]}
            if real is not None:
                clip = self.pipeline.clip
                inputs["image_embeds"] = clip.encode_image(real[part].to(self.pipeline.device, clip.dtype))
            images = self.pipeline(**inputs, generator=seeds[part], output_type="pt", **self.settings).images
            return images.float().cpu() * 2 - 1

        return self.run_batches(draw_batch, len(prompts), "drawing emoji")

    def reconstruct(self, real: Tensor) -> Tensor:
        """Return what the autoencoder makes of real images, (N, 3, H, W) in [-1, 1]."""
        autoencoder = self.pipeline.autoencoder

        def reconstruct_batch(part: slice) -> Tensor:
            latents = autoencoder.encode(real[part].to(self.pipeline.device, autoencoder.dtype))
            return autoencoder.decode(latents).float().cpu().clamp(-1, 1)

        return self.run_batches(reconstruct_batch, len(real), "reconstructing emoji")

    @torch.no_grad()
    def run_batches(self, run: Callable[[slice], Tensor], count: int, what: str) -> Tensor:
        """Return the images of all batches at the size of the real ones. what: name of the work, for the progress."""
        drawn = []
        with Progress(what, count):
            for part in self.iterate_batches(count):
                with follow_batch(part.stop - part.start):
                    drawn.append(run(part))
        images = torch.cat(drawn)
        if images.shape[-1] == EMOJI_SIZE:
            return images
        return F.interpolate(images, (EMOJI_SIZE, EMOJI_SIZE), mode="bicubic", antialias=True).clamp(-1, 1)

    def iterate_batches(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.batch_size):
            yield slice(start, min(start + self.batch_size, count))


def save_sheet(sheet: Image, file: Path) -> None:
    sheet.quantize(256).save(file, optimize=True)  # a fifth of the size, without a visible change
