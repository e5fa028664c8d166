"""A picture in, pictures like it out: the decoder starts from its latents instead of noise."""

from typing import Any

import torch
from t2i.pipelines.base import MAX_IMAGES, Canvas, UnCLIPPipeline, UnCLIPPipelineOutput
from t2i.pipelines.inputs import ImageInputs, read_images
from t2i.pipelines.memory_needed import check_batch_fits
from torch import Generator, Tensor

from t2i.checks import check_integer, check_range, check_texts
from t2i.sampling.sample import split_generators


class ImageToImagePipeline(UnCLIPPipeline):
    """Picture -> latents -> noised as far as `strength` says -> (decoder, told what to show) -> picture."""

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInputs,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        strength: float = 0.6,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        negative_image_embeds: Tensor | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> UnCLIPPipelineOutput | tuple:
        """Draw `num_images_per_prompt` pictures for each picture: those of one in a row.

        Args:
            image: pictures, see `t2i.pipelines.inputs.read_images`; resized and cropped to the size that the decoder
                draws.
            prompt: what they are to show; one for all or one a picture. None is what the pictures show.
            negative_prompt: what the prior is guided away from.
            strength: share of the steps that are taken, in (0, 1]: 1 leaves nothing of the picture but what it shows.
            generator: one for all, or one a drawn picture.
            negative_image_embeds: (N, D), z_i that the decoder is guided away from, such as those drawn for what is not
                wanted; None is the decoder's null.
            return_dict: False returns the tuple (images, image_embeds).
            options: those of `t2i.pipelines.options.PriorOptions` and `DecoderOptions`.

        Raises:
            InputError: for a value that is not allowed, before any work starts.
        """
        self.interrupted = False
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        check_strength(strength)
        prior, decoder = self.resolve_options(**options)
        pictures = read_images(image, self.image_size)
        prompts = self.check_prompts("prompt", prompt, len(pictures))
        check_texts("prompt", prompts, empty=False)
        negatives = self.check_prompts("negative_prompt", negative_prompt, len(pictures))
        count = len(pictures) * num_images_per_prompt
        prior_generators, generators = split_generators(generator, count)
        self.check_stage_inputs(prior if prompts else None, decoder, count)
        away = self.build_negative_condition(negative_image_embeds, count)
        check_batch_fits(self, prior if prompts else None, decoder, count)

        z_i, text = self.compute_image_embeds(
            prompts, negatives, pictures, num_images_per_prompt, prior, prior_generators, decoder
        )
        latents = self.encode_latents(pictures).repeat_interleave(num_images_per_prompt, dim=0)
        images = self.draw_images(z_i, text, decoder, generators, away, Canvas(latents, strength=strength))
        return self.build_output(images, z_i, return_dict)


def check_strength(strength: float) -> None:
    check_range("strength", strength, 0.001, 1)
