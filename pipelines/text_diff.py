"""An image, changed by the direction from one caption to another (DALL-E 2, section 3.3)."""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from t2i.pipelines.argument_checks import check_stage_inputs, list_prompts
from t2i.pipelines.base import UnCLIPPipelineOutput
from t2i.pipelines.calls.call_keywords import RedrawingKeywords
from t2i.pipelines.calls.signature import declare_pipeline_call
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
from t2i.texts import normalize_text

DEFAULT_THETA = 0.35
MIN_CAPTION_DISTANCE = 1e-3  # captions whose embeddings are no further apart are the same to a CLIP


class TextDiffPipeline(InvertingPipeline):
    """Image -> (z_i, x_T); z_i turned towards z_t(target) - z_t(source); both -> image. The prior is not used."""

    @declare_pipeline_call()
    def __call__(
        self,
        image: ImageInputs | BipartiteLatent,
        source: str | list[str],
        target: str | list[str],
        theta: float | list[float] = DEFAULT_THETA,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
        **options: Unpack[RedrawingKeywords],
    ) -> UnCLIPPipelineOutput | tuple:
        """Change each image by the direction from caption `source` to caption `target`: N images for N.

        With T values of `theta`, N T images, those of an image in a row, from one inversion.

        The drawing starts from the image's own noise, so that what the captions do not mention tends to stay. See
        `UnCLIPPipeline` for other arguments.

        Args:
            image: resized and cropped to `height` and `width`. Or what `invert` returned for images.
            source: caption of the image, one for all or one an image.
            target: caption of the result.
            theta: fraction to turn of the angle between z_i and the direction, 0 to 1, or several for each image. 0
                gives the image back; the paper goes up to 0.25 to 0.5, the default did best with the emoji.
            generator: has no effect, for nothing is drawn by chance here; taken as other pipelines take it.
            options: those of the decoder alone, without `negative_image_embeds`; 50 steps and no guidance if left out.
                The inversion uses the same. The captions act through z_i alone: a decoder that reads captions reads
                nothing here, or it would draw another image for theta 0 already.
        """
        # Check the arguments
        thetas = list_thetas(theta)
        _, decoder = self.resolve_options(**options)
        given, count, decoder = self.read_image_or_latent(image, decoder)
        if not isinstance(given, BipartiteLatent):
            check_inversion_guidance(decoder)
        sources, targets = list_captions("source", source, count), list_captions("target", target, count)
        for before, after in zip(sources, targets):
            check_caption_pair(before, after)
        total, repeats = count * len(thetas), len(thetas)
        _, generators = split_generators(generator, total)
        check_stage_inputs(self, None, decoder, total, images_per_prompt=repeats)
        check_batch_fits(self, None, decoder, total)
        direction = self.compute_text_direction(sources, targets)

        # Draw. The direction gets the length of z_i, which is not 1 with all CLIPs.
        z_i, noise = self.invert_images(given, None, decoder)
        ends = direction.to(z_i) * z_i.norm(dim=-1, keepdim=True)
        z_i, ends, noise = (tensor.repeat_interleave(repeats, dim=0) for tensor in (z_i, ends, noise))
        z_i = slerp(z_i, ends, torch.tensor(thetas * count, dtype=torch.float64))
        images = self.redraw_images(BipartiteLatent(z_i, noise), None, decoder, generators)
        return self.build_output(images, z_i, return_dict)

    @classmethod
    def build_options(cls, options: dict[str, Any], defaults: dict[str, Any] | None = None) -> ResolvedOptions:
        """Check the options; the defaults of the inversion stand for the model's."""
        return ResolvedOptions(PriorOptions(), build_inversion_options(options))

    def compute_text_direction(self, sources: list[str], targets: list[str]) -> Tensor:
        """Return norm(z_t(target) - z_t(source)), (N, D), fp32. Raises InputError where both are the same."""
        before, after = (self.encode_prompt(texts).expand().embedding.float() for texts in (sources, targets))
        difference = after - before
        for source, target, distance in zip(sources, targets, difference.norm(dim=-1).tolist()):
            if distance < MIN_CAPTION_DISTANCE:
                captions = f"source {source!r:.80} and target {target!r:.80}"
                raise InputError(f"this CLIP embeds {captions} identically; give captions that differ more")
        return F.normalize(difference, dim=-1)


def list_thetas(theta: Any) -> list[float]:
    """Return the values of theta as a list. Raises InputError for none, and for values out of range."""
    thetas = list(theta) if isinstance(theta, list | tuple) else [theta]
    if not thetas:
        raise InputError("theta is empty; give a number, or several")
    for value in thetas:
        check_range("theta", value, 0, 1)
    return thetas


def list_captions(name: str, value: str | list[str], count: int) -> list[str]:
    """Return `count` captions. Raises InputError if there are none, or another number."""
    captions = list_prompts(name, value, count)
    if not captions:
        raise InputError(f"{name} is missing; give a text, or one for each image")
    return captions


def check_caption_pair(source: str, target: str) -> None:
    """Refuse captions without words, and two captions that are the same."""
    check_texts("source", [source], empty=False)
    check_texts("target", [target], empty=False)
    if normalize_text(source) == normalize_text(target):
        raise InputError(f"source and target are the same, {source!r:.80}; there is no direction from a text to itself")
