"""An image in, images like it out: the decoder starts from its latents instead of noise."""

from dataclasses import dataclass
from typing import Any

from t2i.pipelines.argument_checks import check_prompts, check_stage_inputs
from t2i.pipelines.base import MAX_IMAGES, UnCLIPPipeline, UnCLIPPipelineOutput
from t2i.pipelines.calls.signature import pipeline_call
from t2i.pipelines.inputs import ImageInputs, read_given_images, read_images
from t2i.pipelines.memory_needed import check_batch_fits
from t2i.pipelines.options import DecoderOptions, PriorOptions, ResolvedOptions
from t2i.pipelines.stages import Canvas, finish_images, sample_decoder, sample_image_embeds
from torch import Generator, Tensor

from t2i.checks import check_integer, check_range
from t2i.diffusion.condition import TextEncoding
from t2i.sampling.sample import split_generators


@dataclass(frozen=True)
class Redrawing:
    """Checked arguments of a call that draws from P given images.

    prompts, negatives: P texts each, or none. each: images drawn from one. prior: None without prompts. generators: one
    for each drawn image, as prior_generators.
    """

    prompts: list[str]
    negatives: list[str]
    each: int
    prior: PriorOptions | None
    decoder: DecoderOptions
    prior_generators: list[Generator]
    generators: list[Generator]


class ImageToImagePipeline(UnCLIPPipeline):
    """Image -> latents -> noised to `strength` -> (decoder) -> latents -> (autoencoder) -> image."""

    @pipeline_call()
    def __call__(
        self,
        image: ImageInputs,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        strength: float = 0.6,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> UnCLIPPipelineOutput | tuple:
        """Draw `num_images_per_prompt` images for each image. See `UnCLIPPipeline` for other arguments.

        Args:
            image: resized and cropped to the size that the decoder draws.
            prompt: None is what the images show.
            strength: fraction of the steps that are taken, in (0, 1]: 1 leaves nothing of an image but what it shows.
        """
        # Check the arguments
        check_strength(strength)
        resolved = self.resolve_options(**options)
        images = read_images(image, self.image_size)
        work = check_redrawing(len(images), prompt, negative_prompt, num_images_per_prompt, generator, resolved)
        count = len(work.generators)
        check_stage_inputs(self, work.prior, work.decoder, count, each=work.each)
        check_batch_fits(self, work.prior, work.decoder, count)

        # Draw
        # A CLIP without an image encoder will do where prompts say what to draw
        seen = images if work.prompts else read_given_images(image, self.image_size, self.clip).seen
        z_i, text = compute_image_embeds(self, seen, work)
        canvas = Canvas(self.encode_latents(images).repeat_interleave(work.each, dim=0), strength=strength)
        latents = sample_decoder(self, z_i, text, work.decoder, work.generators, canvas=canvas)
        return self.build_output(finish_images(self, latents, z_i, work.decoder, work.generators), z_i, return_dict)


def check_redrawing(
    count: int,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    each: int,
    generator: Generator | list[Generator] | None,
    resolved: ResolvedOptions,
) -> Redrawing:
    """Check the arguments of a call that draws from `count` images, `each` for one. Raises InputError."""
    check_integer("num_images_per_prompt", each, 1, MAX_IMAGES)
    wanted = check_prompts("prompt", prompt, count, empty=False)
    negatives = check_prompts("negative_prompt", negative_prompt, count)
    prior, decoder = resolved
    streams = split_generators(generator, count * each)
    return Redrawing(wanted, negatives, each, prior if wanted else None, decoder, *streams)


def compute_image_embeds(
    pipeline: UnCLIPPipeline, images: Tensor, work: Redrawing
) -> tuple[Tensor, TextEncoding | None]:
    """Sample z_i for the prompts, and return both; without prompts, encode the images, (P, 3, H, W) in [-1, 1]."""
    if work.prior is None:
        return pipeline.encode_image(images).repeat_interleave(work.each, dim=0), None
    text = pipeline.encode_prompt(work.prompts).repeat(work.each)
    negative = pipeline.encode_prompt(work.negatives).repeat(work.each) if work.negatives else None
    return sample_image_embeds(pipeline, text, negative, work.prior, work.prior_generators, work.decoder), text


def check_strength(strength: float) -> None:
    check_range("strength", strength, 0.001, 1)
