"""What all pipelines share: each stage as a method."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from t2i.pipelines.options import DecoderOptions, PriorOptions
from t2i.pipelines.stages import StagedPipeline
from t2i.pipelines.watched import check_finite_values
from torch import Generator, Tensor

from t2i.diffusion.condition import ImageCondition, TextEncoding
from t2i.diffusion.denoiser import Predict, StepCallback, count_steps_left, generate_noise, sample_from_noise
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.inpainting import concat_masked_latents
from t2i.diffusion.samplers import resolve_sampler
from t2i.errors import InputError
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.sampling.embeddings import PRIORS_WITHOUT_SCHEDULER, sample_image_embeds, select_nearest_candidates
from t2i.sampling.sample import build_decoder_predict, noise_image_embeds
from t2i.sampling.steering import build_steering_transform
from t2i.sampling.upsampling import derive_stage_generators

logger = logging.getLogger(__name__)

MAX_IMAGES = 1024
PREVIEW_STEPS = 4  # of the decoder, for a preview of the prior
SUPER_RESOLUTION_STREAM, EMBEDS_NOISE_STREAM = (
    -1,
    -2,
)  # numbers of their streams of noise; those of the upsampler count from 1


@dataclass
class UnCLIPPipelineOutput(BaseOutput):
    """What a pipeline returns.

    images: PIL pictures; or, by `output_type`, (N, H, W, 3) numpy or (N, 3, H, W) torch in [0, 1], or latents.
    image_embeds: (N, D): the z_i that were drawn, of unit length if the CLIP's `unit_length`.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    image_embeds: Tensor


class UnCLIPPipeline(StagedPipeline):
    """Each stage as a method. Each subclass is a `__call__`; by `from_pipe` they share their stages without copies."""

    # The stages

    def encode_prompt(self, prompts: list[str]) -> TextEncoding:
        """What CLIP says, for the prior, and the decoder's text encoder, if it has one of its own.

        Each different prompt is encoded once. Says in the log what of a prompt does not fit. Raises InputError for a
        CLIP without a text tower.
        """
        if not self.clip.reads_captions:
            lacks = "no text encoder of its CLIP" if self.prior else "no prior and no text encoder of its CLIP"
            raise InputError(f"this model has {lacks}: it draws from pictures or image_embeds, not from texts")
        for prompt in dict.fromkeys(prompts):
            if cut := self.clip.tokenizer.find_truncated_text(prompt):
                longest = self.clip.context_length - 2
                logger.warning("a prompt is longer than %d tokens; this was cut: %r", longest, cut)
            if self.text_encoder is not None and (cut := self.text_encoder.find_truncated_text(prompt)):
                longest = self.text_encoder.config.context_length
                logger.warning("a prompt has more than the text encoder's %d tokens; this was cut: %r", longest, cut)
        self.offload_all_but("clip")
        different, rows = find_unique_prompts(prompts)
        text = self.clip.encode_tokens(self.clip.tokenizer(different).to(self._execution_device))
        if self.text_encoder is not None:
            text = replace(text, decoder_tokens=self.text_encoder.encode(different, self._execution_device))
        return text.take_rows(rows) if len(different) < len(prompts) else text

    def encode_decoder_prompt(self, prompts: list[str]) -> Any:
        """What the decoder reads of captions: a text encoder of its own does without CLIP's, which may be missing."""
        if self.clip.reads_captions or self.text_encoder is None:
            return self.encode_prompt(prompts)
        self.offload_all_but("text_encoder")
        different, rows = find_unique_prompts(prompts)
        return self.text_encoder.encode(different, self._execution_device).take_rows(rows)

    @torch.no_grad()
    def encode_image(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> z_i, (N, D), fp32."""
        self.offload_all_but("clip")
        z_i = self.clip.encode_image(pictures.to(self._execution_device, self.clip.dtype))
        return self.normalize_embeds(check_finite_values("CLIP", z_i.float()))

    def normalize_embeds(self, z_i: Tensor) -> Tensor:
        """(N, D), of the length that the models know: unit length, or as it is."""
        return F.normalize(z_i, dim=-1) if self.clip.unit_length else z_i

    @torch.no_grad()
    def encode_latents(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> latents of unit variance, (N, C, h, w), fp32."""
        self.offload_all_but("autoencoder")
        latents = self.autoencoder.encode(pictures.to(self._execution_device, self.autoencoder.dtype))
        return check_finite_values("autoencoder", latents.float())

    def sample_image_embeds(
        self,
        text: TextEncoding,
        negative: TextEncoding | None,
        options: PriorOptions,
        generators: list[Generator],
        decoding: DecoderOptions,
    ) -> Tensor:
        """z_i for captions, (N, D), fp32; `decoding` says who watches.

        Without a prior the decoder gets the captions' own z_t, which is there to compare priors with.
        """
        prior, steps = self.prior, options.prior_num_inference_steps
        self.offload_all_but("prior")
        text = text.to(self._execution_device, self.clip.dtype if prior is None else prior.dtype)
        if prior is None:
            logger.warning("this pipeline has no prior: the decoder gets the embedding of the text")
        elif isinstance(prior, AutoregressivePrior):
            steps = prior.codes_per_embedding

        scheduler = self.prior_scheduler
        if scheduler is not None and prior is not None and not isinstance(prior, PRIORS_WITHOUT_SCHEDULER):
            scheduler = resolve_sampler(options.prior_sampler, scheduler, prior)

        def estimate_image_embeds(x: Tensor) -> Tensor:
            z_i = x if isinstance(prior, PRIORS_WITHOUT_SCHEDULER) else prior.unscale_image_embeds(x)
            return select_nearest_candidates(z_i.float(), text.embedding)

        def draw_preview_images(z_i: Tensor) -> list[Image.Image]:
            fresh = [Generator().manual_seed(0) for _ in z_i]
            quick = DecoderOptions(num_inference_steps=PREVIEW_STEPS, guidance_scale=Guidance(1.0))
            return self.decode(self.sample_decoder(z_i, text, quick, fresh))

        wrap, on_step = self.build_preview_hooks(
            "prior", scheduler, steps, decoding, estimate_image_embeds, draw_preview_images
        )
        z_i = sample_image_embeds(
            prior,
            scheduler,
            text,
            negative,
            steps,
            options.prior_guidance_scale,
            generators,
            options.prior_candidates,
            options.prior_latents,
            options.prior_temperature,
            self.progress_bar,
            on_step,
            wrap,
        )
        return check_finite_values("prior", z_i if prior is not None else self.normalize_embeds(z_i))

    def sample_decoder(
        self,
        z_i: Tensor,
        text: TextEncoding | None,
        options: DecoderOptions,
        generators: list[Generator],
        negative: ImageCondition | None = None,
        predict: Predict | None = None,
        on_step: StepCallback | None = None,
        original: Tensor | None = None,
        strength: float = 1.0,
        scheduler: SchedulerMixin | None = None,
        to_images: Callable[[Tensor], list[Image.Image]] | None = None,
    ) -> Tensor:
        """Latents of unit variance, (N, C, h, w), fp32, that show z_i, (N, D).

        negative: what is guided away from; None is the decoder's null. predict: instead of the decoder's own of z_i.
        on_step: runs before those of who watches. original, strength: latents to start from; see
        `sample_from_noise`. scheduler:
        the one that the options choose, for who has chosen it already. to_images: of latents, for previews; None
        decodes them.
        """
        z_i = z_i.to(self._execution_device)
        self.offload_all_but("decoder")
        if scheduler is None:
            scheduler = resolve_sampler(options.sampler, self.decoder_scheduler, self.decoder)
        noise = options.latents
        if noise is None:
            noise = generate_noise(self.compute_latent_shape(options), generators, z_i.device)
        noise = noise.to(z_i.device).float()
        if predict is None:
            if negative is not None:
                away = self.noise_image_embeds(negative.embedding.to(z_i), options, generators)
                negative = replace(negative, embedding=away)
            settings = (text, options.guidance_scale, negative, build_full_mask_condition(noise))
            predict = build_decoder_predict(
                self.decoder, scheduler, self.noise_image_embeds(z_i, options, generators), *settings
            )
        if options.steering is not None:
            steer = build_steering_transform(
                options.steering, scheduler, self.clip, self.autoencoder, len(z_i), z_i.device
            )
            predict = steer(predict)
        steps = options.num_inference_steps
        left = steps if original is None else count_steps_left(steps, strength)
        watch, report = self.build_preview_hooks(
            "decoder", scheduler, left, options, lambda x: x, to_images or self.decode
        )

        def finish_step(step: int, t: Tensor, x: Tensor) -> Tensor:
            x = x if on_step is None else on_step(step, t, x)
            if options.callback_on_step_end is not None:
                x = options.callback_on_step_end(self, step, t, {"latents": x}).pop("latents", x)
            return report(step, t, x)

        start = {"eta": options.eta, "original": original, "strength": strength}
        x = sample_from_noise(
            watch(predict), scheduler, noise, steps, generators, self.progress_bar, finish_step, **start
        )
        return check_finite_values("decoder", x)

    def build_negative_condition(self, z_i: Tensor | None, count: int) -> ImageCondition | None:
        """What the decoder is guided away from, for given z_i, (N, D). Raises InputError for another shape."""
        self.check_tensor("negative_image_embeds", z_i, (count, self.clip.embed_dim))
        return None if z_i is None else ImageCondition(self.normalize_embeds(z_i.to(self._execution_device).float()))

    def noise_image_embeds(self, z_i: Tensor, options: DecoderOptions, generators: list[Generator]) -> Tensor:
        """What the decoder is told of z_i, (N, D): Stable unCLIP's noises it, each picture's by a stream of its own."""
        if not hasattr(self.decoder, "noise_image_embeds"):
            return z_i
        noise = options.image_embeds_noise
        if noise is None:
            noise = generate_noise(z_i.shape[1:], derive_stage_generators(generators, EMBEDS_NOISE_STREAM), z_i.device)
        return noise_image_embeds(self.decoder, z_i, noise, options.noise_level)

    def compute_image_embeds(
        self,
        prompts: list[str],
        negatives: list[str],
        pictures: Tensor,
        each: int,
        prior: PriorOptions,
        generators: list[Generator],
        decoder: DecoderOptions,
    ) -> tuple[Tensor, TextEncoding | None]:
        """z_i as the prior draws them of captions, with these; or, where there are none, those of the pictures.

        `each` of every caption or picture, (P, 3, H, W) in [-1, 1].
        """
        if not prompts:
            return self.encode_image(pictures).repeat_interleave(each, dim=0), None
        text = self.encode_prompt(prompts).repeat(each)
        negative = self.encode_prompt(negatives).repeat(each) if negatives else None
        return self.sample_image_embeds(text, negative, prior, generators, decoder), text

    def draw_images(
        self, z_i: Tensor, text: TextEncoding | None, options: DecoderOptions, generators: list[Generator], **more: Any
    ) -> Any:
        """Pictures that show z_i, (N, D), as `output_type` says; `more` goes to `sample_decoder`."""
        latents = self.sample_decoder(z_i, text, options, generators, **more)
        if not options.upsample:
            return self.decode(latents, options.output_type, options, generators)
        pictures = 2 * self.decode(latents, "pt", options, generators) - 1
        return self.image_processor.postprocess(
            self.upsample_images(pictures, z_i, options, generators), options.output_type
        )

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        output_type: str = "pil",
        options: DecoderOptions | None = None,
        generators: list[Generator] | None = None,
    ) -> Any:
        """Pictures of latents, as `output_type` says; the rest is for `decode_images`."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_images(latents, options, generators), output_type)

    @torch.no_grad()
    def decode_images(
        self, latents: Tensor, options: DecoderOptions | None = None, generators: list[Generator] | None = None
    ) -> Tensor:
        """(N, 3, H, W), fp32, about in [-1, 1]. Where decoding is a diffusion (Karlo's), it is one with options and
        generators of the decoder; without, as for previews, the latents are only enlarged."""
        latents = latents.to(self._execution_device, self.autoencoder.dtype)
        if options is not None:  # the last stage, not a preview
            self.offload_all_but("autoencoder")
        if options is None or generators is None or not self.is_cascade:
            return check_finite_values("autoencoder", self.autoencoder.decode(latents).float())
        steps, scheduler = options.super_res_num_inference_steps, self.autoencoder.scheduler
        shown = self.image_processor.postprocess
        wrap, on_step = self.build_preview_hooks(
            "super_resolution", scheduler, steps, options, lambda x: x.clamp(-1, 1), shown
        )
        own, noise = derive_stage_generators(generators, SUPER_RESOLUTION_STREAM), options.super_res_latents
        images = self.autoencoder.draw_images(latents, own, steps, noise, self.progress_bar, on_step, wrap)
        return check_finite_values("super-resolution", images.float())

    def build_output(self, images: Any, z_i: Tensor, return_dict: bool) -> UnCLIPPipelineOutput | tuple:
        self.maybe_free_model_hooks()
        return UnCLIPPipelineOutput(images, z_i) if return_dict else (images, z_i)


def build_full_mask_condition(noise: Tensor) -> Tensor:
    """What a decoder that reads masks reads where all is to be painted, for noise (N, C, h, w)."""
    return concat_masked_latents(torch.zeros_like(noise), torch.ones_like(noise[:, :1]))


def find_unique_prompts(prompts: list[str]) -> tuple[list[str], Tensor]:
    """The different prompts, and which of them each is, (N,)."""
    different = list(dict.fromkeys(prompts))
    return different, torch.tensor([different.index(prompt) for prompt in prompts])
