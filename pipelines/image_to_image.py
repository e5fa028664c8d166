"""An image in, images like it out: the decoder starts from its latents instead of noise."""

from dataclasses import dataclass
from typing import Any, Unpack

from t2i.pipelines.argument_checks import (
    adopt_latent_sides,
    check_stage_inputs,
    check_tensor,
    repeat_image_embeds,
    warn_of_missing_caption,
)
from t2i.pipelines.base import MAX_IMAGES, UnCLIPPipeline, UnCLIPPipelineOutput
from t2i.pipelines.calls.call_keywords import DrawingKeywords
from t2i.pipelines.calls.effects import UNGUIDED_PRIOR, UNREAD_PROMPT
from t2i.pipelines.calls.signature import declare_pipeline_call
from t2i.pipelines.calls.texts import PromptEmbeds, Texts, choose_text_pair
from t2i.pipelines.inputs import ImageInputs, read_images
from t2i.pipelines.memory_needed import check_batch_fits
from t2i.pipelines.options import DecoderOptions, PriorOptions, ResolvedOptions
from t2i.pipelines.stages import Canvas, finish_images, run_decoder_stage, run_prior_stage
from torch import Generator, Tensor

from t2i.checks import check_integer, check_range
from t2i.data.pictures import Resizing
from t2i.diffusion.condition import TextEncoding
from t2i.sampling.sample import split_generators

IDLE_TEXTS = {  # texts of calls that draw from images
    "prompt": (UNREAD_PROMPT,),
    "prompt_embeds": (UNREAD_PROMPT,),
    "negative_prompt": (UNGUIDED_PRIOR,),
    "negative_prompt_embeds": (UNGUIDED_PRIOR,),
}


@dataclass(frozen=True)
class Redrawing:
    """Checked arguments of a call that draws from P given images.

    prompts, negatives: P texts each, or none. images_per_prompt: number for each prompt or given image. prior: None
    where it is not used. generators: one for each drawn image, as prior_generators. image_embeds: (N, D), given z_i of
    all of them.
    """

    prompts: Texts
    negatives: Texts
    images_per_prompt: int
    prior: PriorOptions | None
    decoder: DecoderOptions
    prior_generators: list[Generator]
    generators: list[Generator]
    image_embeds: Tensor | None = None

    @property
    def reads_images(self) -> bool:
        """True if z_i is that of the images."""
        return self.prior is None and self.image_embeds is None


class ImageToImagePipeline(UnCLIPPipeline):
    """Image -> latents -> noised to `strength` -> (decoder) -> latents -> (autoencoder) -> image."""

    @declare_pipeline_call(idle=IDLE_TEXTS)
    def __call__(
        self,
        image: ImageInputs,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        strength: float = 0.6,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
        image_embeds: Tensor | None = None,
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt_embeds: PromptEmbeds | None = None,
        **options: Unpack[DrawingKeywords],
    ) -> UnCLIPPipelineOutput | tuple:
        """Draw `num_images_per_prompt` images for each image. See `UnCLIPPipeline` for other arguments.

        Args:
            image: resized and cropped to `height` and `width`. Or latents, (P, C, h, w), as `output_type="latent"`
                gives them, whose size is kept.
            prompt: None is what the images show.
            strength: fraction of the steps that are taken, in (0, 1]: 1 leaves nothing of an image but what it shows.
        """
        # Check the arguments
        check_strength(strength)
        prior, decoder = self.resolve_options(**options)
        latents = read_latents(self, image)
        if latents is not None:
            decoder = adopt_latent_sides(self, decoder, latents)
        given = read_images(image, self.compute_image_shape(decoder)) if latents is None else latents
        count = len(given)
        texts = choose_text_pair(
            self, count, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, image_embeds is not None
        )
        resolved = ResolvedOptions(prior, decoder)
        redrawing = plan_redrawing(self, count, texts, num_images_per_prompt, generator, resolved, image_embeds)
        count = len(redrawing.generators)
        images_per_prompt = redrawing.images_per_prompt
        check_stage_inputs(self, redrawing.prior, decoder, count, images_per_prompt=images_per_prompt)
        check_batch_fits(self, redrawing.prior, decoder, count)

        # Draw
        # A CLIP without an image encoder will do where prompts say what to draw
        seen = None
        if redrawing.reads_images:
            shown = image if latents is None else self.decode(latents, "pt")
            seen = read_images(shown, Resizing.for_clip(self.clip))
        z_i, text = compute_image_embeds(self, seen, redrawing)
        latents = self.encode_latents(given) if latents is None else latents
        canvas = Canvas(latents.repeat_interleave(images_per_prompt, dim=0), strength=strength)
        latents = run_decoder_stage(self, z_i, text, decoder, redrawing.generators, canvas=canvas)
        return self.build_output(finish_images(self, latents, z_i, decoder, redrawing.generators), z_i, return_dict)


def plan_redrawing(
    pipeline: UnCLIPPipeline,
    count: int,
    texts: tuple[Texts, Texts],
    images_per_prompt: int,
    generator: Generator | list[Generator] | None,
    resolved: ResolvedOptions,
    image_embeds: Tensor | None = None,
) -> Redrawing:
    """Check the arguments of a call that draws from `count` images, `images_per_prompt` from each. Raises InputError.

    texts: result of `choose_text_pair`.
    """
    check_integer("num_images_per_prompt", images_per_prompt, 1, MAX_IMAGES)
    prior, decoder = resolved
    prior_generators, generators = split_generators(generator, count * images_per_prompt)
    if image_embeds is not None:
        image_embeds = repeat_image_embeds(pipeline, image_embeds, count, images_per_prompt)
    warn_of_missing_caption(pipeline, texts[0], image_embeds)
    uses_prior = image_embeds is None and len(texts[0]) > 0
    prompts, negatives = texts
    used = prior if uses_prior else None
    return Redrawing(prompts, negatives, images_per_prompt, used, decoder, prior_generators, generators, image_embeds)


def compute_image_embeds(
    pipeline: UnCLIPPipeline, images: Tensor | None, redrawing: Redrawing
) -> tuple[Tensor, TextEncoding | None]:
    """Return z_i and the captions that the decoder reads: those given, or z_i sampled for the prompts.

    Without either, encode the images, (P, 3, H, W) in [-1, 1], which may be None otherwise.
    """
    prompts, negatives, images_per_prompt = redrawing.prompts, redrawing.negatives, redrawing.images_per_prompt
    if redrawing.reads_images:
        assert images is not None, "the caller reads them"
        return pipeline.encode_image(images).repeat_interleave(images_per_prompt, dim=0), None
    if redrawing.image_embeds is not None:
        text = pipeline.encode_decoder_prompt(prompts).repeat(images_per_prompt) if len(prompts) else None
        return redrawing.image_embeds, text
    assert redrawing.prior is not None, "there are prompts"
    text = pipeline.encode_prompt(prompts).repeat(images_per_prompt)
    negative = pipeline.encode_prompt(negatives).repeat(images_per_prompt) if len(negatives) else None
    z_i = run_prior_stage(pipeline, text, negative, redrawing.prior, redrawing.prior_generators, redrawing.decoder)
    return z_i, text


def read_latents(pipeline: UnCLIPPipeline, image: Any) -> Tensor | None:
    """Return given images that are latents, (P, C, h, w), fp32, on the device; None for pixels.

    Latents have the decoder's number of channels, unless that is 3, as of pixels. Raises InputError for bad values.
    """
    channels = pipeline.latent_shape[0]
    if channels == 3 or not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != channels:
        return None
    check_tensor("image (latents)", image, ("N", channels, "h", "w"))
    return image.to(pipeline._execution_device).float()


def check_strength(strength: float) -> None:
    check_range("strength", strength, 0.001, 1)
