"""A picture, changed by the direction from one caption to another (DALL-E 2, section 3.3)."""

from typing import Any

import torch
import torch.nn.functional as F
from t2i.pipelines.base import UnCLIPPipelineOutput
from t2i.pipelines.inputs import ImageInputs
from t2i.pipelines.inversion import (
    BipartiteLatent,
    InvertingPipeline,
    build_inversion_options,
    check_inversion_guidance,
)
from t2i.pipelines.memory_needed import check_batch_fits
from t2i.pipelines.options import PriorOptions, ResolvedOptions
from torch import Generator, Tensor

from t2i.checks import check_range, check_texts
from t2i.diffusion.geometry import slerp
from t2i.errors import InputError
from t2i.sampling.sample import split_generators

DEFAULT_THETA = 0.35
MIN_CAPTION_DISTANCE = 1e-3  # captions whose embeddings are no further apart say the same to this CLIP


class TextDiffPipeline(InvertingPipeline):
    """Picture -> (z_i, x_T); z_i turned towards z_t(target) - z_t(source); both -> picture. The prior is not used."""

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInputs | BipartiteLatent,
        source: str | list[str],
        target: str | list[str],
        theta: float = DEFAULT_THETA,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> UnCLIPPipelineOutput | tuple:
        """Change each picture from what `source` says to what `target` says: N pictures for N.

        The drawing starts from the picture's own noise, so that what the captions do not speak of tends to stay.

        Args:
            image: see `t2i.pipelines.inputs.read_images`; resized and cropped to the size that the decoder draws.
                Or what `invert` has made of pictures.
            source: what the picture shows, one for all or one a picture.
            target: what it is to show.
            theta: how far to turn: a share of the angle between z_i and the direction, 0 to 1. 0 gives the picture
                back; the paper goes up to 0.25 to 0.5, the default is what does best with the emoji.
            generator: decides nothing, for nothing is drawn by chance here; taken as other pipelines take it.
            return_dict: False returns the tuple (images, image_embeds).
            options: those of `t2i.pipelines.options.DecoderOptions`; 50 steps and no guidance if left out. The
            inversion
                uses the same. The captions act through z_i alone: a decoder that reads captions reads nothing here,
                or it would draw another picture for theta 0 already.

        Raises:
            InputError: for a value that is not allowed, before any work starts.
        """
        self.interrupted = False
        check_range("theta", theta, 0, 1)
        _, decoder = self.resolve_options(**options)
        given, count = self.read_image_or_latent(image)
        if not isinstance(given, BipartiteLatent):
            check_inversion_guidance(decoder)
        sources, targets = (
            self.check_captions(name, value, count) for name, value in (("source", source), ("target", target))
        )
        for one, other in zip(sources, targets):
            check_caption_pair(one, other)
        _, generators = split_generators(generator, count)
        self.check_stage_inputs(None, decoder, count)
        check_batch_fits(self, None, decoder, count)
        direction = self.compute_text_direction(sources, targets)

        z_i, noise = self.ensure_inverted(given, None, decoder)
        z_i = slerp(z_i, direction.to(z_i) * z_i.norm(dim=-1, keepdim=True), theta)
        images = self.redraw_images(BipartiteLatent(z_i, noise), None, decoder, generators)
        return self.build_output(images, z_i, return_dict)

    @classmethod
    def build_options(cls, options: dict[str, Any], defaults: dict[str, Any] | None = None) -> ResolvedOptions:
        """Check the options; the defaults of the inversion stand for the model's."""
        return PriorOptions(), build_inversion_options(options)

    def check_captions(self, name: str, value: str | list[str], count: int) -> list[str]:
        captions = self.check_prompts(name, value, count)
        if not captions:
            raise InputError(f"{name} is missing; give a text, or one for each picture")
        return captions

    def compute_text_direction(self, sources: list[str], targets: list[str]) -> Tensor:
        """norm(z_t(target) - z_t(source)), (N, D), fp32. Raises InputError where there is none."""
        before, after = (self.encode_prompt(texts).expand().embedding.float() for texts in (sources, targets))
        difference = after - before
        for one, other, size in zip(sources, targets, difference.norm(dim=-1).tolist()):
            if size < MIN_CAPTION_DISTANCE:
                raise InputError(f"source {one!r:.80} and target {other!r:.80} say the same to this CLIP; differ more")
        return F.normalize(difference, dim=-1)


def check_caption_pair(source: str, target: str) -> None:
    check_texts("source", [source], empty=False)
    check_texts("target", [target], empty=False)
    if source.strip() == target.strip():
        raise InputError(f"source and target are the same, {source!r:.80}; there is no direction from a text to itself")
