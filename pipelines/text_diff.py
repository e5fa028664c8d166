"""An image, changed by the direction from one caption to another (DALL-E 2, section 3.3)."""

from dataclasses import replace
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from t2i.pipelines.argument_checks import check_stage_inputs, list_prompts
from t2i.pipelines.base import UnCLIPPipelineOutput
from t2i.pipelines.calls.call_keywords import InterpolationKeywords
from t2i.pipelines.calls.signature import declare_pipeline_call
from t2i.pipelines.inputs import ImageInputs
from t2i.pipelines.inversion import (
    REDRAWING_OPTIONS,
    BipartiteLatent,
    InvertingPipeline,
    build_inversion_options,
    check_inversion_guidance,
)
from t2i.pipelines.memory_needed import check_batch_fits
from t2i.pipelines.options import DecoderOptions, PriorOptions, ResolvedOptions
from t2i.pipelines.stages import run_prior_stage
from torch import Generator, Tensor

from t2i.checks import check_choice, check_range, check_texts
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.geometry import slerp
from t2i.errors import InputError
from t2i.sampling.embeddings import build_candidate_generators, count_candidates
from t2i.sampling.sample import split_generators
from t2i.texts import normalize_text

DEFAULT_THETAS = {"text": 0.35, "prior": 1.0}  # by direction
DIRECTIONS = tuple(DEFAULT_THETAS)
DEFAULT_CANDIDATES = 16  # a caption such as "woman" can mean many images, of which one is to be like the given one
MIN_CAPTION_DISTANCE = 1e-3  # captions whose embeddings are no further apart are the same to a CLIP


class TextDiffPipeline(InvertingPipeline):
    """Image -> (z_i, x_T); z_i turned as source turns into target; both -> image.

    z_i moves on a great circle, through itself and the difference d of the two captions. `direction` says what d is and
    where the way ends, at `theta` 1:

        text: d = norm(z_t(target) - z_t(source)). The way ends at d, with nothing of the image left (DALL-E 2).
        prior: d = z_i(target) - z_i(source), as the prior draws both from one noise. The way ends at z_i + d.

    From a unit vector a the way to norm(b - a) passes b, at the angle phi from a, for theta = phi / (pi / 2 + phi / 2).
    Beyond it are no embeddings of images. With "text" that theta differs from pair to pair. With "prior" the way ends
    there, whatever the captions: z_i(source) becomes z_i(target) at theta 1. And where a CLIP embeds captions far from
    images, the difference of two captions leads away from all images, that of two image embeddings does not.
    """

    @declare_pipeline_call()
    def __call__(
        self,
        image: ImageInputs | BipartiteLatent,
        source: str | list[str],
        target: str | list[str],
        theta: float | list[float] | None = None,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
        direction: str = "text",
        **options: Unpack[InterpolationKeywords],
    ) -> UnCLIPPipelineOutput | tuple:
        """Change each image by the direction from caption `source` to caption `target`: N images for N.

        With T values of `theta`, N T images, those of an image in a row, from one inversion and one noise of the prior.

        The drawing starts from the image's own noise, so that what the captions do not mention tends to stay. See
        `UnCLIPPipeline` for other arguments.

        Args:
            image: resized and cropped to `height` and `width`. Or what `invert` returned for images.
            source: caption of the image, one for all or one an image.
            target: caption of the result.
            theta: fraction of the way, as an angle, 0 to 1, or several for each image. 0 gives the image back. None is
                1 for the prior, 0.35 for texts, where the paper goes up to 0.25 to 0.5.
            generator: source of the noise of the prior, without which nothing is drawn by chance.
            direction: "text" or, for models with a prior, "prior".
            options: without `negative_image_embeds`; 50 steps of the decoder and no guidance if left out, also of the
                inversion. Captions act through z_i alone: decoders that read some read nothing, for theta 0 to be the
                image. Of the `prior_candidates`, each a noise, that with the z_i(source) nearest to the image counts.
        """
        # Check the arguments
        thetas = list_thetas(theta, direction)
        check_direction(direction, self.prior)
        prior, decoder = self.resolve_options(**options)
        given, count, decoder = self.read_image_or_latent(image, decoder)
        if not isinstance(given, BipartiteLatent):
            check_inversion_guidance(decoder)
        sources, targets = list_caption_pairs(source, target, count)
        total, repeats = count * len(thetas), len(thetas)
        prior_generators, generators = split_generators(generator, total)
        used_prior = prior if direction == "prior" else None
        check_stage_inputs(self, used_prior, decoder, total, images_per_prompt=repeats)
        check_batch_fits(self, used_prior, decoder, total)
        before, after = self.encode_captions(sources, targets)

        # Draw
        z_i, noise = self.invert_images(given, None, decoder)
        if used_prior is None:
            ends = find_text_ends(z_i, before, after)
        else:
            change = self.draw_change(z_i, before, after, used_prior, prior_generators, decoder)
            ends = self.normalize_embeds(z_i + change)
        z_i, ends, noise = (tensor.repeat_interleave(repeats, dim=0) for tensor in (z_i, ends, noise))
        z_i = slerp(z_i, ends, torch.tensor(thetas * count, dtype=torch.float64))
        images = self.redraw_images(BipartiteLatent(z_i, noise), None, decoder, generators)
        return self.build_output(images, z_i, return_dict)

    @classmethod
    def build_options(cls, options: dict[str, Any], defaults: dict[str, Any] | None = None) -> ResolvedOptions:
        """Check the options; the defaults of the inversion stand for the decoder's."""
        defaults = (defaults or {}) | {"prior_candidates": DEFAULT_CANDIDATES}
        return build_inversion_options(options, defaults, allowed=REDRAWING_OPTIONS)

    def encode_captions(self, sources: list[str], targets: list[str]) -> tuple[TextEncoding, TextEncoding]:
        """Encode both captions of N images. Raises InputError where this CLIP does not tell them apart."""
        before, after = self.encode_prompt(sources), self.encode_prompt(targets)
        distances = subtract_texts(after, before).norm(dim=-1).tolist()
        for source, target, distance in zip(sources, targets, distances):
            if distance < MIN_CAPTION_DISTANCE:
                captions = f"source {source!r:.80} and target {target!r:.80}"
                raise InputError(f"this CLIP embeds {captions} identically; give captions that differ more")
        return before, after

    def draw_change(
        self,
        z_i: Tensor,
        before: TextEncoding,
        after: TextEncoding,
        options: PriorOptions,
        generators: list[Generator],
        decoder: DecoderOptions,
    ) -> Tensor:
        """Return z_i(target) - z_i(source), both drawn by the prior from the same noise, for N images, (N, D), fp32.

        Of several candidates, which are noises here, that one is taken whose z_i(source) is nearest to the image: what
        a caption leaves open is as in the image then.

        generators: one a result, of which each image takes that of its first one, as of `prior_latents`.
        """
        repeats, latents = len(generators) // len(z_i), options.prior_latents
        candidates = count_candidates(self.prior, options.prior_candidates, latents)
        streams = [new for given in generators[::repeats] for new in build_candidate_generators(given, candidates)]
        streams += [stream.clone_state() for stream in streams]
        noise = None if latents is None else latents[::repeats].repeat(2, 1)
        # All candidates are wanted, so that each is the one of a caption of its own
        options = replace(options, prior_candidates=1, prior_latents=noise)
        texts = before.repeat(candidates).cat(after.repeat(candidates))
        drawn = run_prior_stage(self, texts, None, options, streams, decoder).to(z_i)
        sources, targets = (part.view(len(z_i), candidates, -1) for part in drawn.chunk(2))
        nearest = F.cosine_similarity(sources, z_i[:, None], dim=-1).argmax(dim=1)
        return (targets - sources)[torch.arange(len(z_i), device=z_i.device), nearest]


def subtract_texts(text: TextEncoding, other: TextEncoding) -> Tensor:
    """Return the difference of the z_t of two batches of captions, (N, D), fp32."""
    return text.expand().embedding.float() - other.expand().embedding.float()


def find_text_ends(z_i: Tensor, before: TextEncoding, after: TextEncoding) -> Tensor:
    """Return the direction of two captions, (N, D), with the length of z_i, which is not 1 with all CLIPs."""
    direction = F.normalize(subtract_texts(after, before), dim=-1)
    return direction.to(z_i) * z_i.norm(dim=-1, keepdim=True)


def check_direction(direction: str, prior: Any) -> None:
    """Refuse the direction of a prior for a model without one."""
    if direction == "prior" and prior is None:
        raise InputError("direction is 'prior', but this model has no prior; give it one, or the direction 'text'")


def list_thetas(theta: Any, direction: str) -> list[float]:
    """Return the values of theta as a list; None is the direction's default.

    Raises InputError for none, for values out of range, and for an unknown direction.
    """
    check_choice("direction", direction, DIRECTIONS)
    theta = DEFAULT_THETAS[direction] if theta is None else theta
    thetas = list(theta) if isinstance(theta, list | tuple) else [theta]
    if not thetas:
        raise InputError("theta is empty; give a number, or several")
    for value in thetas:
        check_range("theta", value, 0, 1)
    return thetas


def list_caption_pairs(source: str | list[str], target: str | list[str], count: int) -> tuple[list[str], list[str]]:
    """Return `count` captions of images, and those of their results. Raises InputError for any that do not go."""
    sources, targets = list_captions("source", source, count), list_captions("target", target, count)
    for before, after in zip(sources, targets):
        check_caption_pair(before, after)
    return sources, targets


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
