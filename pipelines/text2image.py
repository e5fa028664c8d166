"""A caption in, pictures out."""

import logging
from dataclasses import replace
from typing import Any

import torch
from t2i.pipelines.base import MAX_IMAGES, UnCLIPPipeline, UnCLIPPipelineOutput
from t2i.pipelines.memory_needed import check_batch_fits
from t2i.pipelines.options import DecoderOptions, PriorOptions
from torch import Generator, Tensor

from t2i.checks import check_integer, check_texts
from t2i.diffusion.condition import ImageCondition
from t2i.errors import InputError
from t2i.sampling.sample import split_generators

logger = logging.getLogger(__name__)


class Text2ImagePipeline(UnCLIPPipeline):
    """Caption -> z_t -> (prior) -> z_i -> (decoder) -> latents -> (autoencoder) -> picture."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        image_embeds: Tensor | None = None,
        negative_image_embeds: Tensor | None = None,
        decoder_negative_prompt: str | list[str] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> UnCLIPPipelineOutput | tuple:
        """Draw `num_images_per_prompt` pictures for each prompt: N in all, those of one prompt in a row.

        Args:
            prompt: a text or a list; may be left out if `image_embeds` is given.
            negative_prompt: what the prior is guided away from; one for all or one a prompt (or a row of `image_embeds`
                where there are no prompts).
            generator: one for all, or one a picture. A picture depends on its own seed alone, not on the batch.
            image_embeds: (N, D), z_i to draw instead of the prior's; normalised if the CLIP's `unit_length`.
            negative_image_embeds: (N, D), z_i that the decoder is guided away from, instead of its null.
            decoder_negative_prompt: what the decoder is guided away from, as the prior imagines it from the same noise;
                one for all or one a prompt, as `negative_prompt`.
            return_dict: False returns the tuple (images, image_embeds).
            options: those of `t2i.pipelines.options.PriorOptions` and `DecoderOptions`.

        Raises:
            InputError: for a value that is not allowed, before any work starts.
        """
        self.interrupted = False
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        prior, decoder = self.resolve_options(**options)
        if image_embeds is None and (prompt is None or prompt == []):
            raise InputError("prompt is missing; give a text, a list of texts, or image_embeds")
        prompts = self.check_prompts("prompt", prompt)
        check_texts("prompt", prompts, empty=False)
        count, each = len(prompts) * num_images_per_prompt, num_images_per_prompt if prompts else 1
        if image_embeds is not None:
            count = self.check_image_embeds(image_embeds, count)
        negatives = self.check_prompts("negative_prompt", negative_prompt, count // each)
        decoder_negatives = self.check_prompts("decoder_negative_prompt", decoder_negative_prompt, count // each)
        self.check_tensor("negative_image_embeds", negative_image_embeds, (count, self.clip.embed_dim))
        prior_generators, decoder_generators = split_generators(generator, count)
        self.check_stage_inputs(
            prior if image_embeds is None or decoder_negatives else None, decoder, count, any_size=True
        )
        check_batch_fits(self, prior if image_embeds is None else None, decoder, count)
        if negatives and (prior.prior_guidance_scale.is_off or image_embeds is not None):
            logger.warning("negative_prompt has no effect: it guides the prior, which is not guided or not used here")
        if decoder_negatives and decoder.guidance_scale.is_off:
            logger.warning("decoder_negative_prompt has no effect: the decoder is not guided")
            decoder_negatives = []

        same_noise = [one.clone_state() for one in prior_generators]
        read = self.encode_prompt if image_embeds is None else self.encode_decoder_prompt
        text = read(prompts).repeat(each) if prompts else None
        if image_embeds is None:
            assert text is not None, "there are prompts or embeddings"
            negative = self.encode_prompt(negatives).repeat(each) if negatives else None
            z_i = self.sample_image_embeds(text, negative, prior, prior_generators, decoder)
        else:
            z_i = self.normalize_embeds(image_embeds.to(self._execution_device).float())
        away = self.encode_negative_condition(
            negative_image_embeds, decoder_negatives, each, prior, same_noise, decoder
        )
        return self.build_output(
            self.draw_images(z_i, text, decoder, decoder_generators, negative=away), z_i, return_dict
        )

    def encode_negative_condition(
        self,
        z_i: Tensor | None,
        negatives: list[str],
        each: int,
        prior: PriorOptions,
        generators: list[Generator],
        decoder: DecoderOptions,
    ) -> ImageCondition | None:
        """Encode the decoder's negative condition from given z_i, (N, D), and texts; None is its null."""
        read = self.encode_prompt if z_i is None else self.encode_decoder_prompt
        said = read(negatives).repeat(each) if negatives else None
        if z_i is not None:
            return ImageCondition(self.normalize_embeds(z_i.to(self._execution_device).float()), said)
        if said is None:
            return None
        unseen = replace(decoder, on_preview=None)  # previews are of what is wanted
        return ImageCondition(self.sample_image_embeds(said, None, prior, generators, unseen), said)

    def check_image_embeds(self, image_embeds: Tensor, asked: int) -> int:
        """Check z_i and return their number; `asked` is the number of pictures for the prompts, 0 for no prompts."""
        if not isinstance(image_embeds, Tensor) or image_embeds.ndim != 2 or not len(image_embeds):
            raise InputError(f"image_embeds must be a tensor (N, {self.clip.embed_dim}), got {image_embeds!r:.80}")
        self.check_tensor("image_embeds", image_embeds, (len(image_embeds), self.clip.embed_dim))
        if asked and asked != len(image_embeds):
            raise InputError(f"image_embeds has {len(image_embeds)} rows, the prompts ask for {asked} pictures")
        return len(image_embeds)
