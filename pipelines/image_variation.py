"""A picture in, pictures of the same out (DALL-E 2, section 3.1)."""

import logging
from typing import Any

import torch
from t2i.pipelines.base import MAX_IMAGES, UnCLIPPipelineOutput
from t2i.pipelines.inputs import ImageInputs
from t2i.pipelines.inversion import (
    BipartiteLatent,
    InvertingPipeline,
    build_inversion_options,
    check_inversion_guidance,
)
from t2i.pipelines.memory_needed import check_batch_fits
from t2i.pipelines.options import PriorOptions, ResolvedOptions, build_options
from torch import Generator

from t2i.checks import check_integer, check_range
from t2i.sampling.sample import split_generators

logger = logging.getLogger(__name__)


class ImageVariationPipeline(InvertingPipeline):
    """Picture -> z_i -> (decoder) -> latents -> (autoencoder) -> picture. The prior is not used."""

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInputs | BipartiteLatent,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> UnCLIPPipelineOutput | tuple:
        """Draw `num_images_per_prompt` pictures for each picture: N in all, those of one in a row.

        Those from new noise share with the picture what CLIP sees in it. Those from its own noise, by DDIM inversion,
        are the picture itself for eta 0, and roam further the larger eta is.

        Args:
            image: see `t2i.pipelines.inputs.read_images`; resized and cropped to the size that the decoder draws.
                Or what `invert` has made of pictures.
            prompt: what caption-reading decoders read, one for all or one a picture; None is nothing.
            eta: None starts from new noise. From 0 to 1, starts from the picture's own, and this is how much of the
                noise of ancestral sampling is added in each step. Then the default options are 50 steps and no
                guidance, for the picture to come back; the inversion uses the same.
            generator: one for all, or one a drawn picture. A picture depends on its own seed alone, not on the batch.
            return_dict: False returns the tuple (images, image_embeds).
            options: those of `t2i.pipelines.options.DecoderOptions`.

        Raises:
            InputError: for a value that is not allowed, before any work starts.
        """
        self.interrupted = False
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        _, decoder = self.resolve_options(**options, eta=eta)
        given, count = self.read_image_or_latent(image)
        if eta is not None and not isinstance(given, BipartiteLatent):
            check_inversion_guidance(decoder)
        prompts = self.check_prompts("prompt", prompt, count)
        each = num_images_per_prompt
        _, generators = split_generators(generator, count * each)
        self.check_stage_inputs(None, decoder, len(generators), any_size=eta is None)
        check_batch_fits(self, None, decoder, len(generators))
        if eta == 0 and each > 1:
            logger.warning("num_images_per_prompt is %d, but with eta 0 they are all the same", each)

        text = self.encode_decoder_prompt(prompts) if prompts else None
        many = None if text is None else text.repeat(each)
        if eta is not None:
            z_i, noise = (one.repeat_interleave(each, dim=0) for one in self.ensure_inverted(given, text, decoder))
            images = self.redraw_images(BipartiteLatent(z_i, noise), many, decoder, generators)
        else:
            z_i = given.image_embeds if isinstance(given, BipartiteLatent) else self.encode_image(given)
            z_i = z_i.repeat_interleave(each, dim=0)
            images = self.draw_images(z_i, many, decoder, generators)
        return self.build_output(images, z_i, return_dict)

    @classmethod
    def build_options(cls, options: dict[str, Any], defaults: dict[str, Any] | None = None) -> ResolvedOptions:
        """Check the options; those of the inversion if `eta` is among them."""
        if (eta := options.get("eta")) is None:
            return build_options(options, defaults, uses_prior=False)
        check_range("eta", eta, 0, 1)
        options = {name: value for name, value in options.items() if name != "eta"}
        return PriorOptions(), build_inversion_options(options, eta)
