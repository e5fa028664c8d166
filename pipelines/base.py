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
from t2i.pipelines.watched import check_finite
from torch import Generator, Tensor

from t2i.diffusion.condition import ImageCondition, TextEncoding
from t2i.diffusion.denoiser import OnStep, Predict, draw_noise, sample, steps_left
from t2i.diffusion.inpainting import known_latents
from t2i.diffusion.samplers import chosen
from t2i.errors import InputError
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.sampling.embeddings import UNSCHEDULED, draw_embeddings, nearest
from t2i.sampling.sample import decoder_predict, told
from t2i.sampling.steering import steering_wrap
from t2i.sampling.upsampling import derived_generators

logger = logging.getLogger(__name__)

MAX_IMAGES = 1024
PREVIEW_STEPS = 4  # of the decoder, for a preview of the prior
SUPER_RESOLUTION, NOISING = -1, -2  # numbers of their streams of noise; those of the upsampler count from 1


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
            if cut := self.clip.tokenizer.cut(prompt):
                longest = self.clip.context_length - 2
                logger.warning("a prompt is longer than %d tokens; this was cut: %r", longest, cut)
            if self.text_encoder is not None and (cut := self.text_encoder.cut(prompt)):
                longest = self.text_encoder.config.context_length
                logger.warning("a prompt has more than the text encoder's %d tokens; this was cut: %r", longest, cut)
        self.offload_all_but("clip")
        different, rows = each_once(prompts)
        text = self.clip.encode_tokens(self.clip.tokenizer(different).to(self._execution_device))
        if self.text_encoder is not None:
            text = replace(text, decoder_tokens=self.text_encoder.encode(different, self._execution_device))
        return text.take(rows) if len(different) < len(prompts) else text

    def read_prompt(self, prompts: list[str]) -> Any:
        """What the decoder reads of captions: a text encoder of its own does without CLIP's, which may be missing."""
        if self.clip.reads_captions or self.text_encoder is None:
            return self.encode_prompt(prompts)
        self.offload_all_but("text_encoder")
        different, rows = each_once(prompts)
        return self.text_encoder.encode(different, self._execution_device).take(rows)

    @torch.no_grad()
    def encode_image(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> z_i, (N, D), fp32."""
        self.offload_all_but("clip")
        z_i = self.clip.encode_image(pictures.to(self._execution_device, self.clip.dtype))
        return self.sized(check_finite("CLIP", z_i.float()))

    def sized(self, z_i: Tensor) -> Tensor:
        """(N, D), of the length that the models know: unit length, or as it is."""
        return F.normalize(z_i, dim=-1) if self.clip.unit_length else z_i

    @torch.no_grad()
    def encode_latents(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> latents of unit variance, (N, C, h, w), fp32."""
        self.offload_all_but("autoencoder")
        latents = self.autoencoder.encode(pictures.to(self._execution_device, self.autoencoder.dtype))
        return check_finite("autoencoder", latents.float())

    def draw_embeddings(
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
            steps = prior.length

        scheduler = self.prior_scheduler
        if scheduler is not None and prior is not None and not isinstance(prior, UNSCHEDULED):
            scheduler = chosen(options.prior_sampler, scheduler, prior)

        def estimate(x: Tensor) -> Tensor:
            z_i = x if isinstance(prior, UNSCHEDULED) else prior.unscale(x)
            return nearest(z_i.float(), text.embedding)

        def pictures(z_i: Tensor) -> list[Image.Image]:
            fresh = [Generator().manual_seed(0) for _ in z_i]
            quick = DecoderOptions(num_inference_steps=PREVIEW_STEPS, guidance_scale=1.0)
            return self.decode(self.sample_decoder(z_i, text, quick, fresh))

        wrap, on_step = self.watched("prior", scheduler, steps, decoding, estimate, pictures)
        z_i = draw_embeddings(
            prior,
            scheduler,
            text,
            negative,
            steps,
            self.prior_guidance(options),
            generators,
            options.prior_candidates,
            options.prior_latents,
            options.prior_temperature,
            self.progress_bar,
            on_step,
            wrap,
        )
        return check_finite("prior", z_i if prior is not None else self.sized(z_i))

    def sample_decoder(
        self,
        z_i: Tensor,
        text: TextEncoding | None,
        options: DecoderOptions,
        generators: list[Generator],
        negative: ImageCondition | None = None,
        predict: Predict | None = None,
        on_step: OnStep | None = None,
        original: Tensor | None = None,
        strength: float = 1.0,
        scheduler: SchedulerMixin | None = None,
        to_images: Callable[[Tensor], list[Image.Image]] | None = None,
    ) -> Tensor:
        """Latents of unit variance, (N, C, h, w), fp32, that show z_i, (N, D).

        negative: what is guided away from; None is the decoder's null. predict: instead of the decoder's own of z_i.
        on_step: runs before those of who watches. original, strength: latents to start from; see `sample`. scheduler:
        the one that the options choose, for who has chosen it already. to_images: of latents, for previews; None
        decodes them.
        """
        z_i = z_i.to(self._execution_device)
        self.offload_all_but("decoder")
        if scheduler is None:
            scheduler = chosen(options.sampler, self.decoder_scheduler, self.decoder)
        noise = options.latents
        if noise is None:
            noise = draw_noise(self.shape_of(options), generators, z_i.device)
        noise = noise.to(z_i.device).float()
        if predict is None:
            if negative is not None:
                away = self.told(negative.embedding.to(z_i), options, generators)
                negative = replace(negative, embedding=away)
            settings = (text, options.guidance_scale, negative, nothing_known(noise))
            predict = decoder_predict(self.decoder, scheduler, self.told(z_i, options, generators), *settings)
        if options.steering is not None:
            steer = steering_wrap(options.steering, scheduler, self.clip, self.autoencoder, len(z_i), z_i.device)
            predict = steer(predict)
        steps = options.num_inference_steps
        left = steps if original is None else steps_left(steps, strength)
        watch, report = self.watched("decoder", scheduler, left, options, lambda x: x, to_images or self.decode)

        def stepped(step: int, t: Tensor, x: Tensor) -> Tensor:
            x = x if on_step is None else on_step(step, t, x)
            if options.callback_on_step_end is not None:
                x = options.callback_on_step_end(self, step, t, {"latents": x}).pop("latents", x)
            return report(step, t, x)

        start = {"eta": options.eta, "original": original, "strength": strength}
        x = sample(watch(predict), scheduler, noise, steps, generators, self.progress_bar, stepped, **start)
        return check_finite("decoder", x)

    def away_from(self, z_i: Tensor | None, count: int) -> ImageCondition | None:
        """What the decoder is guided away from, for given z_i, (N, D). Raises InputError for another shape."""
        self.check_tensor("negative_image_embeds", z_i, (count, self.clip.embed_dim))
        return None if z_i is None else ImageCondition(self.sized(z_i.to(self._execution_device).float()))

    def told(self, z_i: Tensor, options: DecoderOptions, generators: list[Generator]) -> Tensor:
        """What the decoder is told of z_i, (N, D): Stable unCLIP's noises it, each picture's by a stream of its own."""
        if not hasattr(self.decoder, "noised"):
            return z_i
        noise = options.image_embeds_noise
        if noise is None:
            noise = draw_noise(z_i.shape[1:], derived_generators(generators, NOISING), z_i.device)
        return told(self.decoder, z_i, noise, options.noise_level)

    def embed(
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
        return self.draw_embeddings(text, negative, prior, generators, decoder), text

    def draw(
        self, z_i: Tensor, text: TextEncoding | None, options: DecoderOptions, generators: list[Generator], **more: Any
    ) -> Any:
        """Pictures that show z_i, (N, D), as `output_type` says; `more` goes to `sample_decoder`."""
        self.check_upsampling(options)
        latents = self.sample_decoder(z_i, text, options, generators, **more)
        if not options.upsample:
            return self.decode(latents, options.output_type, options, generators)
        pictures = 2 * self.decode(latents, "pt", options, generators) - 1
        return self.image_processor.postprocess(self.upsample(pictures, z_i, options, generators), options.output_type)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        output_type: str = "pil",
        options: DecoderOptions | None = None,
        generators: list[Generator] | None = None,
    ) -> Any:
        """Pictures of latents, as `output_type` says; the rest is for `decode_pictures`."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_pictures(latents, options, generators), output_type)

    @torch.no_grad()
    def decode_pictures(
        self, latents: Tensor, options: DecoderOptions | None = None, generators: list[Generator] | None = None
    ) -> Tensor:
        """(N, 3, H, W), fp32, about in [-1, 1]. Where decoding is a diffusion (Karlo's), it is one with options and
        generators of the decoder; without, as for previews, the latents are only enlarged."""
        latents = latents.to(self._execution_device, self.autoencoder.dtype)
        if options is not None:  # the last stage, not a preview
            self.offload_all_but("autoencoder")
        if options is None or generators is None or not self.is_cascade:
            return check_finite("autoencoder", self.autoencoder.decode(latents).float())
        steps, scheduler = options.super_res_num_inference_steps, self.autoencoder.scheduler
        shown = self.image_processor.postprocess
        wrap, on_step = self.watched("super_resolution", scheduler, steps, options, lambda x: x.clamp(-1, 1), shown)
        own, noise = derived_generators(generators, SUPER_RESOLUTION), options.super_res_latents
        images = self.autoencoder.draw(latents, own, steps, noise, self.progress_bar, on_step, wrap)
        return check_finite("super-resolution", images.float())

    def finish(self, images: Any, z_i: Tensor, return_dict: bool) -> UnCLIPPipelineOutput | tuple:
        self.maybe_free_model_hooks()
        return UnCLIPPipelineOutput(images, z_i) if return_dict else (images, z_i)


def nothing_known(noise: Tensor) -> Tensor:
    """What a decoder that reads masks reads where all is to be painted, for noise (N, C, h, w)."""
    return known_latents(torch.zeros_like(noise), torch.ones_like(noise[:, :1]))


def each_once(prompts: list[str]) -> tuple[list[str], Tensor]:
    """The different prompts, and which of them each is, (N,)."""
    different = list(dict.fromkeys(prompts))
    return different, torch.tensor([different.index(prompt) for prompt in prompts])
