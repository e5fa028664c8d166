"""An image in, images of the same out (DALL-E 2, section 3.1)."""

import logging
from dataclasses import replace
from typing import Any, Unpack

from t2i.pipelines.argument_checks import check_stage_inputs, list_prompts
from t2i.pipelines.base import MAX_IMAGES, UnCLIPPipeline, UnCLIPPipelineOutput
from t2i.pipelines.calls.call_keywords import VariationKeywords
from t2i.pipelines.calls.effects import NO_CAPTIONS, UNGUIDED_DECODER
from t2i.pipelines.calls.signature import declare_pipeline_call
from t2i.pipelines.inputs import ImageInputs
from t2i.pipelines.inversion import (
    DECODER_REDRAWING_OPTIONS,
    BipartiteLatent,
    InvertingPipeline,
    build_inversion_options,
    check_inversion_guidance,
)
from t2i.pipelines.memory_needed import check_batch_fits
from t2i.pipelines.options import DecoderOptions, PriorOptions, ResolvedOptions, build_options
from t2i.pipelines.stages import finish_images, run_decoder_stage, run_prior_stage
from torch import Generator

from t2i.checks import check_integer, check_range
from t2i.diffusion.condition import ImageCondition
from t2i.errors import InputError
from t2i.sampling.sample import split_generators

logger = logging.getLogger(__name__)


class ImageVariationPipeline(InvertingPipeline):
    """Image -> z_i -> (decoder) -> latents -> (autoencoder) -> image. The prior is not used."""

    @declare_pipeline_call({"prompt": (NO_CAPTIONS,), "negative_prompt": (UNGUIDED_DECODER,)})
    def __call__(
        self,
        image: ImageInputs | BipartiteLatent,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
        negative_prompt: str | list[str] | None = None,
        **options: Unpack[VariationKeywords],
    ) -> UnCLIPPipelineOutput | tuple:
        """Draw `num_images_per_prompt` images for each image. See `UnCLIPPipeline` for other arguments.

        Those from new noise share with the image what CLIP sees in it. Those from its own noise, by DDIM inversion, are
        the image itself for eta 0, and differ more the larger eta is.

        Args:
            image: resized and cropped to `height` and `width`. Or what `invert` returned for images.
            prompt: caption that caption-reading decoders read; None is nothing.
            eta: None starts from new noise. From 0 to 1, starts from the image's own, and this is how much of the
                noise of ancestral sampling is added in each step. Then the default options are 50 steps and no
                guidance, for the image to come back; the inversion uses the same.
            negative_prompt: text that the decoder is guided away from; one for all or one an image. Decoders that read
                captions read it; for others the prior imagines it. Not with `eta`.
            options: those of the decoder alone, without `negative_image_embeds`.
        """
        # Check the arguments
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        prior, decoder = self.resolve_options(**options, eta=eta)
        given, count, decoder = self.read_image_or_latent(image, decoder, eta is not None)
        if eta is not None and not isinstance(given, BipartiteLatent):
            check_inversion_guidance(decoder)
        prompts = list_prompts("prompt", prompt, count)
        prior_generators, generators = split_generators(generator, count * num_images_per_prompt)
        negatives = list_prompts("negative_prompt", negative_prompt, count)
        if negatives and eta is not None:
            raise InputError("negative_prompt is for images from new noise; leave out one of both")
        imagines = bool(negatives) and check_negative_prompt(self)
        count, used_prior = len(generators), prior if imagines else None
        check_stage_inputs(self, used_prior, decoder, count, images_per_prompt=num_images_per_prompt)
        check_batch_fits(self, None, decoder, count)
        if eta == 0 and num_images_per_prompt > 1:
            logger.warning("num_images_per_prompt is %d, but with eta 0 they are all the same", num_images_per_prompt)

        # Draw
        text = self.encode_decoder_prompt(prompts) if prompts else None
        repeated_text = None if text is None else text.repeat(num_images_per_prompt)
        if eta is not None:
            inverted = self.invert_images(given, text, decoder)
            inverted = BipartiteLatent(*(tensor.repeat_interleave(num_images_per_prompt, dim=0) for tensor in inverted))
            z_i, images = inverted.image_embeds, self.redraw_images(inverted, repeated_text, decoder, generators)
        else:
            z_i = given.image_embeds if isinstance(given, BipartiteLatent) else self.encode_image(given.seen)
            z_i = z_i.repeat_interleave(num_images_per_prompt, dim=0)
            negative = encode_negative_texts(self, negatives, num_images_per_prompt, prior, prior_generators, decoder)
            latents = run_decoder_stage(self, z_i, repeated_text, decoder, generators, negative)
            images = finish_images(self, latents, z_i, decoder, generators)
        return self.build_output(images, z_i, return_dict)

    @classmethod
    def build_options(cls, options: dict[str, Any], defaults: dict[str, Any] | None = None) -> ResolvedOptions:
        """Check the options; those of the inversion if `eta` is among them."""
        if (eta := options.get("eta")) is None:
            return build_options(options, defaults, DECODER_REDRAWING_OPTIONS)
        check_range("eta", eta, 0, 1)
        # The call's `eta` also decides whether to invert: the decoder's own option must not contradict it
        options = {name: value for name, value in options.items() if name != "eta"}
        return build_inversion_options(options, eta=eta)


def check_negative_prompt(pipeline: UnCLIPPipeline) -> bool:
    """Return whether the prior imagines a negative prompt: for decoders that read no captions. Raises InputError."""
    imagines = pipeline.decoder.null(1).text is None
    if imagines and pipeline.prior is None:
        raise InputError("negative_prompt needs a prior here, for this decoder reads no captions; load one")
    return imagines


def encode_negative_texts(
    pipeline: UnCLIPPipeline,
    texts: list[str],
    images_per_prompt: int,
    prior: PriorOptions,
    generators: list[Generator],
    decoder: DecoderOptions,
) -> ImageCondition | None:
    """Encode texts to guide the decoder away from: captions without an image, or the prior's z_i; None for no texts."""
    if not texts:
        return None
    null = pipeline.decoder.null(len(texts) * images_per_prompt).expand()
    if null.text is None:
        text = pipeline.encode_prompt(texts).repeat(images_per_prompt)
        unseen = replace(decoder, on_preview=None)  # previews are of the image alone
        return ImageCondition(run_prior_stage(pipeline, text, None, prior, generators, unseen), text)
    # The null of decoders that noise z_i is wider than z_i, and zero is their null too
    width = pipeline.clip.embed_dim
    nothing = null.embedding if null.embedding.shape[1] == width else null.embedding.new_zeros(len(null), width)
    return ImageCondition(nothing, pipeline.encode_decoder_prompt(texts).repeat(images_per_prompt))
