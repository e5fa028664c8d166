"""Images between images and texts (DALL-E 2, section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, Unpack

import numpy as np
import torch
from PIL import Image
from t2i.pipelines.argument_checks import check_stage_inputs, check_stage_options, check_tensor
from t2i.pipelines.base import MAX_IMAGES, UnCLIPPipelineOutput
from t2i.pipelines.calls.call_keywords import InterpolationKeywords
from t2i.pipelines.calls.effects import NO_IMAGES, exclude_argument
from t2i.pipelines.calls.signature import declare_pipeline_call
from t2i.pipelines.inputs import GivenImages, ImageInput, read_control_images, read_given_images, split_images
from t2i.pipelines.inversion import (
    INVERSION_DEFAULTS,
    REDRAWING_OPTIONS,
    BipartiteLatent,
    InvertingPipeline,
    check_inversion_guidance,
    resolve_ddim_options,
)
from t2i.pipelines.memory_needed import check_batch_fits
from t2i.pipelines.options import DecoderOptions, PriorOptions, ResolvedOptions, build_options
from t2i.pipelines.stages import run_prior_stage
from torch import Generator, Tensor

from t2i.checks import check_integer, check_texts
from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.diffusion.geometry import compute_spherical_mean, normalize_weights
from t2i.diffusion.sampling_loop import generate_noise
from t2i.errors import InputError
from t2i.progress import follow_batch
from t2i.sampling.sample import split_generators
from t2i.sampling.steering import GOALS, Steering

FRAMES_PER_BATCH = 16  # frames that are drawn at a time
MAX_ANCHORS = 64

Anchor: TypeAlias = ImageInput | str  # a str is a text, a Path an image


@dataclass
class AnchorLatents:
    """Latents of the K anchors that are mixed, for each of S generators."""

    image_embeds: Tensor  # (S, K, D), unit length
    latents: Tensor  # (S, K, C, h, w)
    text: TextEncoding | None  # S * K that the decoder reads, nothing for images; None if it reads no captions
    seeds: list[int]  # S, of the noise that a sampler adds


class InterpolationPipeline(InvertingPipeline):
    """Images and texts -> their (z_i, x_T) -> those in between, on great circles -> images."""

    @declare_pipeline_call({"frames": (exclude_argument("weights"),), "inverted": (NO_IMAGES,)})
    def __call__(
        self,
        anchors: Sequence[Anchor],
        weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
        frames: int = 8,
        inverted: bool = True,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
        **options: Unpack[InterpolationKeywords],
    ) -> UnCLIPPipelineOutput | tuple:
        """Draw frames from each anchor to the next, or the mixes that `weights` ask for.

        Both z_i and x_T are interpolated: between two by slerp, between more by the weighted spherical mean. See
        `UnCLIPPipeline` for other arguments.

        Args:
            anchors: texts (str), which pass through the prior if there is one, and images: paths (Path), PIL images,
                arrays (H, W, 3), tensors (3, H, W).
            weights: (K,), one an anchor, for one mix; or (N, K), a row for each of N mixes. None is the whole way.
            frames: images from each anchor to the next, both included: (K - 1) (frames - 1) + 1 in all.
            inverted: start from the images' own noise, so that the way begins and ends with them; else all start from
                one new noise, as texts do in any case.
            generator: source of the noise of texts, of the prior, and of what a sampler or the upsampler adds. From a
                list of them, one mix is drawn for each, as each alone draws it.
            options: if images are inverted, 50 steps and no guidance of the decoder are the default, the inversion uses
                the same, and the sampler is ddim; else that is the default. A goal of steering may be one for each
                image. `negative_image_embeds` is not allowed.

        A decoder that reads captions gets that of the anchor with the largest weight, or nothing if it is an image.
        """
        # Check the arguments
        checked = list_anchors(anchors)
        rows = build_mixing_weights(len(checked), weights, frames)
        streams = list_streams(generator, len(rows))
        # The generator of each image
        places = list(range(len(streams))) if len(streams) > 1 else [0] * len(rows)
        rows = rows.expand(len(places), -1)
        texts = [anchor for anchor in checked if isinstance(anchor, str)]
        image_anchors = [anchor for anchor in checked if not isinstance(anchor, str)]
        inverted = inverted and bool(image_anchors)
        prior, decoder = self.resolve_options(**options, inverted=inverted)
        if inverted:
            check_inversion_guidance(decoder)
        check_tensor("prior_latents", prior.prior_latents, (len(streams) * len(texts), self.clip.embed_dim))
        check_stage_options(self, prior if texts else None, decoder)
        check_stage_inputs(self, None, decoder, len(rows))
        check_batch_fits(self, None, decoder, min(len(rows), FRAMES_PER_BATCH))
        size = self.compute_image_shape(decoder)
        images = read_given_images(image_anchors, size, self.clip, "anchors") if image_anchors else None
        ends = self.encode_anchors(checked, images, inverted, prior, decoder, streams)

        drawn, z_i = self.draw_mixes(ends, rows, places, decoder)
        return self.build_output(drawn, z_i, return_dict)

    def draw_mixes(
        self, ends: AnchorLatents, rows: Tensor, places: list[int], decoder: DecoderOptions
    ) -> tuple[Any, Tensor]:
        """Draw N mixes in batches: images in the form of `output_type`, and their z_i, (N, D).

        rows: (N, K), how much of each anchor is in each. places: of the generators of each, among `ends`.
        """
        z_i, x_T = (
            torch.stack([compute_spherical_mean(latents[place], row) for place, row in zip(places, rows)])
            for latents in (ends.image_embeds, ends.latents.flatten(2))
        )
        x_T = x_T.unflatten(1, ends.latents.shape[2:])
        nearest = rows.argmax(dim=1) + ends.latents.shape[1] * torch.tensor(places)
        drawn = []
        for start in range(0, len(rows), FRAMES_PER_BATCH):
            part = slice(start, start + FRAMES_PER_BATCH)
            text = None if ends.text is None else ends.text.take_rows(nearest[part])
            # The noise that a sampler adds is the same for all of a generator, or the frames would flicker
            generators = [Generator().manual_seed(ends.seeds[place]) for place in places[part]]
            part_options = replace(decoder, steering=slice_steering(decoder.steering, part))
            with follow_batch(len(generators)):
                drawn.append(self.redraw_images(BipartiteLatent(z_i[part], x_T[part]), text, part_options, generators))
        return concatenate_images(drawn), z_i

    @classmethod
    def build_options(cls, options: dict[str, Any], defaults: dict[str, Any] | None = None) -> ResolvedOptions:
        """Check the options, with `inverted` among them: then the defaults of the inversion stand for the model's."""
        inverted = options.get("inverted", False)
        options = {name: value for name, value in options.items() if name != "inverted"}
        defaults = (defaults or {}) | (INVERSION_DEFAULTS if inverted else {})
        prior, decoder = build_options(options, defaults, REDRAWING_OPTIONS)
        if decoder.latents is not None:
            raise InputError("latents is not allowed in an interpolation; give a generator")
        if decoder.image_embeds_noise is not None:
            raise InputError("image_embeds_noise is not allowed in an interpolation; give a generator")
        control = decoder.control_image
        if control is not None and len(read_control_images(control).pixels) != 1:
            raise InputError("control_image must be one image in an interpolation, for all frames")
        if inverted:
            return ResolvedOptions(prior, resolve_ddim_options(decoder))
        return ResolvedOptions(prior, replace(decoder, sampler=decoder.sampler or "ddim"))

    def encode_anchors(
        self,
        anchors: list[Anchor],
        images: GivenImages | None,
        inverted: bool,
        prior: PriorOptions,
        decoder: DecoderOptions,
        streams: list[Generator],
    ) -> AnchorLatents:
        """Compute z_i and x_T of each anchor for each generator, which gives one noise to all but inverted images."""
        count, device = len(streams), self._execution_device
        is_text = torch.tensor([isinstance(anchor, str) for anchor in anchors])
        split = [split_generators(stream, 1) for stream in streams]
        noise_generators = [generator for _, (generator,) in split]
        noise = generate_noise(self.compute_latent_shape(decoder), noise_generators, device)
        # Drawn after the noise, so that the noise is that of the generator's first numbers
        seeds = [int(torch.randint(2**62, (1,), generator=generator)) for generator in noise_generators]
        latents = noise[:, None].repeat(1, len(anchors), 1, 1, 1)
        z_i = latents.new_empty(count, len(anchors), self.clip.embed_dim)
        # Images have no caption: the null's stands for it
        captions = self.decoder.null(count * len(anchors)).text
        if is_text.any():
            texts = [anchor for anchor in anchors if isinstance(anchor, str)]
            text = self.encode_prompt(texts)
            text = text if count == 1 else text.take_rows(torch.arange(len(texts)).repeat(count))
            generators = [one for (first,), _ in split for one in split_generators(first, len(texts))[1]]
            z_i[:, is_text] = run_prior_stage(self, text, None, prior, generators, decoder).unflatten(0, (count, -1))
            places = is_text.repeat(count).nonzero()[:, 0]
            captions = None if captions is None else place_captions(text, places, captions)
        if images is not None and inverted:
            # Nothing of them is drawn by chance: they are the same for all
            z_i[:, ~is_text], latents[:, ~is_text] = self.invert_images(images, None, decoder)
        elif images is not None:
            z_i[:, ~is_text] = self.encode_image(images.seen)
        return AnchorLatents(z_i, latents, captions, seeds)


def list_streams(generator: Any, count: int) -> list[Any]:
    """Return the generators of the noise: one for `count` images, or several for one mix. Raises InputError."""
    if not isinstance(generator, list):
        return [generator]
    if not generator or (len(generator) > 1 and count > 1):
        raise InputError(f"generator has {len(generator)} generators for {count} mixes; give one, or one mix")
    return generator


def list_anchors(anchors: Any) -> list[Anchor]:
    """Return the anchors as a list. Raises InputError for none, for too many, and for texts without words."""
    if isinstance(anchors, str | Path | Image.Image):
        anchors = [anchors]
    if not isinstance(anchors, Sequence | np.ndarray | Tensor):
        raise InputError(f"anchors must be a list of texts and images, got {type(anchors).__name__}")
    if not len(anchors):
        raise InputError("anchors is empty; give at least two texts or images")
    if len(anchors) > MAX_ANCHORS:
        raise InputError(f"anchors has {len(anchors)} entries; at most {MAX_ANCHORS} are allowed")
    check_texts("anchors", [anchor for anchor in anchors if isinstance(anchor, str)], empty=False)
    for i, anchor in enumerate(anchors):
        images = len(split_images(anchor, f"anchors {i + 1}"))
        if images != 1:
            raise InputError(f"anchors {i + 1} must be a text or one image, got {images} images in one")
    return list(anchors)


def build_mixing_weights(count: int, weights: Any, frames: int) -> Tensor:
    """Return how much of each anchor is in each image, (N, count), fp64, each row with sum 1. Raises InputError."""
    if weights is not None:
        try:
            given = torch.as_tensor(weights, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"weights must be numbers, one for each anchor, got {weights!r:.80}") from error
        rows = given[None] if given.ndim == 1 else given
        if rows.ndim != 2 or not 1 <= len(rows) <= MAX_IMAGES:
            raise InputError(f"weights have the shape {tuple(given.shape)}; they are ({count},), or (N, {count})")
        return torch.stack([normalize_weights(row, count) for row in rows])
    check_integer("frames", frames, 2, MAX_IMAGES)
    if count < 2:
        raise InputError("anchors has one entry; give two or more, or weights")
    total = (count - 1) * (frames - 1) + 1
    if total > MAX_IMAGES:
        raise InputError(
            f"frames {frames} between {count} anchors makes {total} images; at most {MAX_IMAGES} are allowed"
        )
    # A frame at position p, in anchors, has the weights 1 - |p - k|: only its two neighbours have any
    positions = torch.linspace(0, count - 1, total, dtype=torch.float64)
    return (1 - (positions[:, None] - torch.arange(count)).abs()).clamp(min=0)


def place_captions(text: TextEncoding, places: Tensor, nothing: TokenStates) -> TokenStates:
    """Return what a decoder reads of K anchors: the captions of `text` in these places, else nothing."""
    order = torch.zeros(len(nothing), dtype=torch.long)
    order[places] = torch.arange(len(places))
    keep = torch.zeros(len(nothing), dtype=torch.bool).index_fill(0, places, True)
    return text.token_states.take_rows(order).where(keep.to(nothing.mask.device), nothing)


def slice_steering(steering: Steering | None, part: slice) -> Steering | None:
    """Return the steering of a part of the images, with their own goals where each image has one."""

    def slice_value(value: Any) -> Any:
        return value[part] if isinstance(value, list | Tensor) and len(value) > 1 else value

    if steering is None:
        return None
    goals = {name: slice_value(getattr(steering, name)) for name in GOALS}
    return replace(steering, **goals)


def concatenate_images(parts: list[Any]) -> Any:
    """Join batches of images, of any output type."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [image for part in parts for image in part]
