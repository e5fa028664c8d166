"""A caption in, images out."""

from dataclasses import replace
from typing import Unpack

from t2i.pipelines.argument_checks import check_stage_inputs, list_prompts, repeat_image_embeds, warn_of_missing_caption
from t2i.pipelines.base import MAX_IMAGES, UnCLIPPipeline, UnCLIPPipelineOutput
from t2i.pipelines.calls.call_keywords import DrawingKeywords
from t2i.pipelines.calls.effects import UNGUIDED_DECODER, UNGUIDED_PRIOR, UNREAD_NEGATIVE, UNREAD_PROMPT
from t2i.pipelines.calls.signature import declare_pipeline_call
from t2i.pipelines.calls.texts import PromptEmbeds, choose_texts
from t2i.pipelines.memory_needed import check_batch_fits
from t2i.pipelines.options import DecoderOptions, PriorOptions
from t2i.pipelines.stages import finish_images, repeat_negative_embeds, run_decoder_stage, run_prior_stage
from torch import Generator, Tensor

from t2i.checks import check_integer
from t2i.diffusion.condition import ImageCondition
from t2i.errors import InputError
from t2i.sampling.sample import split_generators


class Text2ImagePipeline(UnCLIPPipeline):
    """Caption -> z_t -> (prior) -> z_i -> (decoder) -> latents -> (autoencoder) -> image."""

    @declare_pipeline_call(
        idle={
            "prompt": (UNREAD_PROMPT,),
            "prompt_embeds": (UNREAD_PROMPT,),
            "negative_prompt": (UNGUIDED_PRIOR,),
            "negative_prompt_embeds": (UNGUIDED_PRIOR,),
            "decoder_negative_prompt": (UNGUIDED_DECODER, UNREAD_NEGATIVE),
        }
    )
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        image_embeds: Tensor | None = None,
        decoder_negative_prompt: str | list[str] | None = None,
        return_dict: bool = True,
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt_embeds: PromptEmbeds | None = None,
        **options: Unpack[DrawingKeywords],
    ) -> UnCLIPPipelineOutput | tuple:
        """Draw `num_images_per_prompt` images for each prompt: N in all. See `UnCLIPPipeline` for other arguments.

        Args:
            prompt: a text or a list; may be left out if `image_embeds` is given. Decoders that read captions read it
                beside them.
            image_embeds: z_i to draw instead of the prior's; normalized if the CLIP's `unit_length`. (N, D), or (P, D)
                for P prompts; without prompts `num_images_per_prompt` images are drawn for each.
            decoder_negative_prompt: text that the decoder is guided away from, as the prior imagines it from the same
                noise; one for all or one a prompt. With `negative_image_embeds`, their captions.
        """
        # Check the arguments
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        prior, decoder = self.resolve_options(**options)
        if image_embeds is None and prompt_embeds is None and (prompt is None or prompt == []):
            raise InputError("prompt is missing; give a text, a list of texts, or image_embeds")
        prompts = choose_texts(self, "prompt", prompt, prompt_embeds, empty=image_embeds is not None)
        count = len(prompts) * num_images_per_prompt
        if image_embeds is not None:
            image_embeds = repeat_image_embeds(self, image_embeds, len(prompts), num_images_per_prompt)
            count = len(image_embeds)
        inputs = count // num_images_per_prompt
        negatives = choose_texts(self, "negative_prompt", negative_prompt, negative_prompt_embeds, inputs)
        decoder_negatives = list_prompts("decoder_negative_prompt", decoder_negative_prompt, inputs)
        prior_generators, generators = split_generators(generator, count)
        uses_prior = image_embeds is None or decoder_negatives
        used_prior = prior if uses_prior else None
        check_stage_inputs(self, used_prior, decoder, count, images_per_prompt=num_images_per_prompt)
        check_batch_fits(self, prior if image_embeds is None else None, decoder, count)
        warn_of_missing_caption(self, prompts, image_embeds)
        if decoder.guidance_scale.is_off:
            decoder_negatives = []

        # Draw. The prior starts from the same noise for the prompt and for the decoder's negative prompt.
        same_noise = [stream.clone_state() for stream in prior_generators]
        encode = self.encode_prompt if image_embeds is None else self.encode_decoder_prompt
        text = encode(prompts).repeat(num_images_per_prompt) if prompts else None
        if image_embeds is None:
            assert text is not None, "there are prompts or embeddings"
            negative = self.encode_prompt(negatives).repeat(num_images_per_prompt) if negatives else None
            z_i = run_prior_stage(self, text, negative, prior, prior_generators, decoder)
        else:
            z_i = image_embeds
        decoder_negative = self.encode_decoder_negatives(
            decoder_negatives, num_images_per_prompt, prior, same_noise, decoder
        )
        latents = run_decoder_stage(self, z_i, text, decoder, generators, decoder_negative)
        return self.build_output(finish_images(self, latents, z_i, decoder, generators), z_i, return_dict)

    def encode_decoder_negatives(
        self,
        negatives: list[str],
        images_per_prompt: int,
        prior: PriorOptions,
        generators: list[Generator],
        decoder: DecoderOptions,
    ) -> ImageCondition | None:
        """Encode texts that the decoder is guided away from, with the given z_i or the prior's; None for no texts."""
        if not negatives:
            return None
        given = decoder.negative_image_embeds
        encode = self.encode_prompt if given is None else self.encode_decoder_prompt
        text = encode(negatives).repeat(images_per_prompt)
        if given is not None:
            return ImageCondition(repeat_negative_embeds(self, given, len(text)), text)
        # Previews and callbacks are of the prompt alone
        unseen, uncalled = replace(decoder, on_preview=None), replace(prior, prior_callback_on_step_end=None)
        return ImageCondition(run_prior_stage(self, text, None, uncalled, generators, unseen), text)
