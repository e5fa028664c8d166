"""Base of all drawing pipelines: each stage as a method."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from PIL import Image
from t2i.pipelines.options import DecoderOptions, PriorOptions
from t2i.pipelines.stages import StagedPipeline
from t2i.pipelines.watched import check_finite_values
from torch import Generator, Tensor

from t2i.diffusion.condition import ImageCondition, TextEncoding, TokenStates
from t2i.diffusion.denoiser import PredictTransform, StepCallback
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.inpainting import build_blend_callback, build_canvas_windows, concat_masked_latents
from t2i.diffusion.samplers import resolve_sampler
from t2i.diffusion.sampling_loop import Sampling, generate_noise
from t2i.errors import InputError
from t2i.sampling.embeddings import sample_image_embeds, select_nearest_candidates
from t2i.sampling.sample import build_decoder_condition, sample_decoder
from t2i.sampling.steering import build_steering_transform
from t2i.sampling.upsampling import derive_stage_generators

logger = logging.getLogger(__name__)

MAX_IMAGES = 1024
PREVIEW_STEPS = 4  # of the decoder, for a preview of the prior
# Stages of `derive_stage_generators`; those of the upsampler count from 1.
SUPER_RESOLUTION_STREAM, EMBEDS_NOISE_STREAM = -1, -2


@dataclass
class Canvas:
    """Given images that the decoder starts from, or paints in.

    latents: (N, C, h, w), of the images; None: there are none.
    mask: (N, 1, h, w), 1 where there is to be painted; None: nothing of the images has to stay.
    strength: fraction of the steps that are taken, in (0, 1].
    to_images: makes previews of latents; None decodes them.
    """

    latents: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 1.0
    to_images: Callable[[Tensor], list[Image.Image]] | None = None

    @property
    def original(self) -> Tensor | None:
        """The latents to start from; None: noise alone, as for a mask under which nothing of the images stays."""
        return None if self.mask is not None and self.strength == 1 else self.latents

    def build_masked_latents(self, noise: Tensor) -> Tensor:
        """Return (N, C + 1, h, w), for decoders that read masks; without a mask everything is to be painted."""
        if self.latents is None or self.mask is None:
            return concat_masked_latents(torch.zeros_like(noise), torch.ones_like(noise[:, :1]))
        return concat_masked_latents(self.latents, self.mask)


@dataclass
class UnCLIPPipelineOutput(BaseOutput):
    """Result of a pipeline.

    images: PIL images; or, by `output_type`, (N, H, W, 3) numpy or (N, 3, H, W) torch in [0, 1], or latents.
    image_embeds: (N, D): the z_i of the images, of unit length if the CLIP's `unit_length`.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    image_embeds: Tensor


class UnCLIPPipeline(StagedPipeline):
    """Base with each stage as a method. A subclass adds a `__call__`; `from_pipe` shares the stages without copies."""

    # The stages

    def encode_prompt(self, prompts: list[str]) -> TextEncoding:
        """Encode prompts by CLIP, for the prior, and by the decoder's own text encoder, if it has one.

        Each different prompt is encoded once; `expand` of the result has a row for each prompt. Logs what of a prompt
        does not fit. Raises InputError for a CLIP without a text tower.
        """
        if not self.clip.reads_captions:
            lacks = "no text encoder of its CLIP" if self.prior else "no prior and no text encoder of its CLIP"
            raise InputError(f"this model has {lacks}: it draws from images or image_embeds, not from texts")
        different, rows = find_unique_prompts(prompts)
        for prompt in different:
            if cut := self.clip.tokenizer.find_truncated_text(prompt):
                longest = self.clip.context_length - 2
                logger.warning("a prompt is longer than %d tokens; this was cut: %r", longest, cut)
            if self.text_encoder is not None and (cut := self.text_encoder.find_truncated_text(prompt)):
                longest = self.text_encoder.config.context_length
                logger.warning("a prompt has more than the text encoder's %d tokens; this was cut: %r", longest, cut)
        self.offload_all_but("clip")
        text = self.clip.encode_tokens(self.clip.tokenizer(different).to(self._execution_device))
        if self.text_encoder is not None:
            text = replace(text, decoder_tokens=self.text_encoder.encode(different, self._execution_device))
        return text if rows is None else text.take_rows(rows)

    def encode_decoder_prompt(self, prompts: list[str]) -> Any:
        """Encode captions for the decoder. If it has its own text encoder, a CLIP without a text tower will do."""
        if self.clip.reads_captions or self.text_encoder is None:
            return self.encode_prompt(prompts)
        self.offload_all_but("text_encoder")
        different, rows = find_unique_prompts(prompts)
        tokens = self.text_encoder.encode(different, self._execution_device)
        return tokens if rows is None else tokens.take_rows(rows)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images, (N, 3, H, W) in [-1, 1], by CLIP as z_i, (N, D), fp32."""
        self.offload_all_but("clip")
        z_i = self.clip.encode_image(images.to(self._execution_device, self.clip.dtype))
        return self.normalize_embeds(check_finite_values("CLIP", z_i.float()))

    def normalize_embeds(self, z_i: Tensor) -> Tensor:
        """Normalize z_i, (N, D), if the models were trained on embeddings of unit length."""
        return F.normalize(z_i, dim=-1) if self.clip.unit_length else z_i

    @torch.no_grad()
    def encode_latents(self, images: Tensor) -> Tensor:
        """Encode images, (N, 3, H, W) in [-1, 1], as latents of unit variance, (N, C, h, w), fp32."""
        self.offload_all_but("autoencoder")
        latents = self.autoencoder.encode(images.to(self._execution_device, self.autoencoder.dtype))
        return check_finite_values("autoencoder", latents.float())

    def sample_image_embeds(
        self,
        text: TextEncoding,
        negative: TextEncoding | None,
        options: PriorOptions,
        generators: list[Generator],
        decoding: DecoderOptions,
    ) -> Tensor:
        """Sample z_i for captions, (N, D), fp32. decoding: options with the callback of previews.

        Without a prior, return the captions' own z_t, as a baseline for priors.
        """
        prior, scheduler, steps = self.prior, self.prior_scheduler, options.prior_num_inference_steps
        self.offload_all_but("prior")
        text = text.to(self._execution_device, self.clip.dtype if prior is None else prior.dtype)
        if prior is None:
            logger.warning("this pipeline has no prior: the decoder gets the embedding of the text")
        else:
            steps = prior.count_steps(steps)
            scheduler = None if scheduler is None else resolve_sampler(options.prior_sampler, scheduler, prior)

        def estimate_image_embeds(x: Tensor) -> Tensor:
            z_i = prior.unscale_image_embeds(x) if prior.needs_scheduler else x
            return select_nearest_candidates(z_i.float(), text.expand().embedding)

        def draw_preview_images(z_i: Tensor) -> list[Image.Image]:
            fresh = [Generator().manual_seed(0) for _ in z_i]
            quick = DecoderOptions(num_inference_steps=PREVIEW_STEPS, guidance_scale=Guidance(1.0))
            return self.decode(self.sample_decoder(z_i, text, quick, fresh))

        transform, on_step = self.build_preview_hooks(
            "prior", scheduler, steps, decoding, estimate_image_embeds, draw_preview_images
        )
        sampling = Sampling(
            options.prior_num_inference_steps,
            generators,
            options.prior_guidance_scale,
            options.prior_latents,
            self.progress_bar,
            on_step,
            transform,
        )
        candidates, temperature = options.prior_candidates, options.prior_temperature
        z_i = sample_image_embeds(prior, scheduler, text, negative, sampling, candidates, temperature)
        return check_finite_values("prior", z_i if prior is not None else self.normalize_embeds(z_i))

    def sample_decoder(
        self,
        z_i: Tensor,
        text: TextEncoding | TokenStates | None,
        options: DecoderOptions,
        generators: list[Generator],
        negative: ImageCondition | None = None,
        canvas: Canvas | None = None,
    ) -> Tensor:
        """Sample latents of unit variance, (N, C, h, w), fp32, that show z_i, (N, D).

        negative: z_i and captions to guide away from; None is the decoder's null. canvas: given images to start from.
        """
        z_i, canvas = z_i.to(self._execution_device), canvas or Canvas()
        self.offload_all_but("decoder")
        scheduler = resolve_sampler(options.sampler, self.decoder_scheduler, self.decoder)
        shape = self.compute_latent_shape(options) if canvas.latents is None else tuple(canvas.latents.shape[1:])
        noise = Sampling(1, generators, noise=options.latents).get_noise(shape, z_i.device)

        # The conditions
        masked_latents = canvas.build_masked_latents(noise)
        condition = self.build_decoder_condition(z_i, text, masked_latents, options, generators)
        if negative is not None:
            negative = self.build_decoder_condition(
                negative.embedding.to(z_i), negative.text, masked_latents, options, generators
            )

        # What runs around each step: steering and previews; the given images, the user's callback and previews
        transforms: list[PredictTransform] = []
        callbacks: list[StepCallback] = []
        if options.steering is not None:
            parts = (scheduler, self.clip, self.autoencoder, len(z_i), z_i.device)
            transforms.append(build_steering_transform(options.steering, *parts))
        if canvas.mask is not None:
            callbacks.append(build_blend_callback(scheduler, canvas.latents, canvas.mask, noise))
        if options.callback_on_step_end is not None:
            callbacks.append(build_step_callback(self, options))
        sampling = Sampling(
            options.num_inference_steps,
            generators,
            options.guidance_scale,
            noise,
            self.progress_bar,
            eta=options.eta,
            original=canvas.original,
            strength=canvas.strength,
        )
        watch, report_step = self.build_preview_hooks(
            "decoder", scheduler, sampling.steps_left, options, lambda x: x, canvas.to_images or self.decode
        )
        transform, on_step = chain_transforms([*transforms, watch]), chain_callbacks([*callbacks, report_step])
        sampling = replace(sampling, transform=transform, on_step=on_step)
        windows = [] if canvas.mask is None else build_canvas_windows(shape[1], shape[2], self.latent_shape[-1])
        x = sample_decoder(self.decoder, scheduler, condition, sampling, negative, windows)
        return check_finite_values("decoder", x)

    def build_decoder_condition(
        self,
        z_i: Tensor,
        text: TextEncoding | TokenStates | None,
        masked_latents: Tensor,
        options: DecoderOptions,
        generators: list[Generator],
    ) -> ImageCondition:
        """Build the decoder's condition for z_i, (N, D); a decoder that noises z_i does so from a stream an image."""
        noise = options.image_embeds_noise
        if noise is None and self.decoder.noise_levels is not None:
            noise = generate_noise(z_i.shape[1:], derive_stage_generators(generators, EMBEDS_NOISE_STREAM), z_i.device)
        return build_decoder_condition(self.decoder, z_i, text, masked_latents, noise, options.noise_level)

    def build_negative_condition(self, z_i: Tensor | None, count: int) -> ImageCondition | None:
        """Return given z_i, (N, D), to guide away from, as a condition. Raises InputError for another shape."""
        self.check_tensor("negative_image_embeds", z_i, (count, self.clip.embed_dim))
        return None if z_i is None else ImageCondition(self.normalize_embeds(z_i.to(self._execution_device).float()))

    def compute_image_embeds(
        self,
        prompts: list[str],
        negatives: list[str],
        images: Tensor,
        each: int,
        prior: PriorOptions,
        generators: list[Generator],
        decoder: DecoderOptions,
    ) -> tuple[Tensor, TextEncoding | None]:
        """Sample z_i for captions, and return both; without captions, encode the images, (P, 3, H, W) in [-1, 1].

        each: number of z_i for every caption or image.
        """
        if not prompts:
            return self.encode_image(images).repeat_interleave(each, dim=0), None
        text = self.encode_prompt(prompts).repeat(each)
        negative = self.encode_prompt(negatives).repeat(each) if negatives else None
        return self.sample_image_embeds(text, negative, prior, generators, decoder), text

    def draw_images(
        self,
        z_i: Tensor,
        text: TextEncoding | TokenStates | None,
        options: DecoderOptions,
        generators: list[Generator],
        negative: ImageCondition | None = None,
        canvas: Canvas | None = None,
    ) -> Any:
        """Draw images that show z_i, (N, D), in the form of `output_type`. negative, canvas: see `sample_decoder`."""
        latents = self.sample_decoder(z_i, text, options, generators, negative, canvas)
        if not options.upsample:
            return self.decode(latents, options.output_type, options, generators)
        images = 2 * self.decode(latents, "pt", options, generators) - 1
        images = self.upsample_images(images, z_i, options, generators)
        return self.image_processor.postprocess(images, options.output_type)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        output_type: str = "pil",
        options: DecoderOptions | None = None,
        generators: list[Generator] | None = None,
    ) -> Any:
        """Decode latents into images in the form of `output_type`. options, generators: see `decode_images`."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_images(latents, options, generators), output_type)

    @torch.no_grad()
    def decode_images(
        self, latents: Tensor, options: DecoderOptions | None = None, generators: list[Generator] | None = None
    ) -> Tensor:
        """Decode latents into images, (N, 3, H, W), fp32, about in [-1, 1].

        The decoding of a cascade (Karlo) is a diffusion, which needs the options and generators of the decoder. Without
        them, as for previews, a cascade only enlarges the latents.
        """
        latents = latents.to(self._execution_device, self.autoencoder.dtype)
        if options is not None:  # the last stage, not a preview
            self.offload_all_but("autoencoder")
        if options is None or generators is None or not self.is_cascade:
            return check_finite_values("autoencoder", self.autoencoder.decode(latents).float())
        steps, scheduler = options.super_res_num_inference_steps, self.autoencoder.scheduler
        shown = self.image_processor.postprocess
        transform, on_step = self.build_preview_hooks(
            "super_resolution", scheduler, steps, options, lambda x: x.clamp(-1, 1), shown
        )
        sampling = Sampling(
            steps,
            derive_stage_generators(generators, SUPER_RESOLUTION_STREAM),
            noise=options.super_res_latents,
            progress=self.progress_bar,
            on_step=on_step,
            transform=transform,
        )
        images = self.autoencoder.draw_images(latents, sampling)
        return check_finite_values("super-resolution", images.float())

    def build_output(self, images: Any, z_i: Tensor, return_dict: bool) -> UnCLIPPipelineOutput | tuple:
        """Return the result of a call, and release the device from offloaded models."""
        self.maybe_free_model_hooks()
        return UnCLIPPipelineOutput(images, z_i) if return_dict else (images, z_i)


def build_step_callback(pipeline: UnCLIPPipeline, options: DecoderOptions) -> StepCallback:
    """Return the user's `callback_on_step_end` as a callback of the sampling loop."""
    callback = options.callback_on_step_end
    assert callback is not None
    return lambda step, t, x: callback(pipeline, step, t, {"latents": x}).pop("latents", x)


def chain_transforms(transforms: list[PredictTransform]) -> PredictTransform:
    """Return a transform that applies others one after the other."""
    return lambda predict: reduce(lambda inner, transform: transform(inner), transforms, predict)


def chain_callbacks(callbacks: list[StepCallback]) -> StepCallback:
    """Return a callback that runs others one after the other."""

    def run_callbacks(step: int, t: Tensor, x: Tensor) -> Tensor:
        for callback in callbacks:
            x = callback(step, t, x)
        return x

    return run_callbacks


def find_unique_prompts(prompts: list[str]) -> tuple[list[str], Tensor | None]:
    """Return the different prompts, and the number among them of each, (N,); None if all are different."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    rows = None if len(numbers) == len(prompts) else torch.tensor([numbers[prompt] for prompt in prompts])
    return list(numbers), rows
