"""Images as bipartite latents (DALL-E 2, section 3): z_i, what CLIP sees in them, and x_T, the noise with the rest."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from t2i.pipelines.argument_checks import adopt_latent_sides, check_stage_inputs, check_tensor, list_prompts
from t2i.pipelines.base import UnCLIPPipeline
from t2i.pipelines.calls.arguments import check_argument_order
from t2i.pipelines.calls.progress import show_steps
from t2i.pipelines.inputs import GivenImages, ImageInputs, read_given_images
from t2i.pipelines.options import DECODER_OPTION_NAMES, OPTION_NAMES, DecoderOptions, ResolvedOptions, build_options
from t2i.pipelines.stages import build_control, build_preview_hooks, finish_images, run_decoder_stage
from torch import Generator, Tensor

from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.ddim import invert_sample
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.samplers import resolve_sampler
from t2i.errors import InputError
from t2i.sampling.sample import build_decoder_condition, build_decoder_predict

INVERSION_DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 1.0}  # defaults where images are to come back
# An inversion is guided away from nothing but the null, and takes the scheduler's own timesteps
REDRAWING_OPTIONS = OPTION_NAMES - {"negative_image_embeds", "timesteps", "sigmas"}
DECODER_REDRAWING_OPTIONS = REDRAWING_OPTIONS & DECODER_OPTION_NAMES


class BipartiteLatent(NamedTuple):
    """Images as the decoder has them."""

    image_embeds: Tensor  # (N, D), unit length: z_i
    latents: Tensor  # (N, C, h, w), about unit variance: x_T


class InvertingPipeline(UnCLIPPipeline):
    """Base of variations, interpolations and edits of given images."""

    @torch.no_grad()
    def invert(
        self,
        image: ImageInputs,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = INVERSION_DEFAULTS["num_inference_steps"],  # type: ignore[assignment]
        guidance_scale: float | Guidance = INVERSION_DEFAULTS["guidance_scale"],
        control_image: ImageInputs | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> BipartiteLatent:
        """Invert N images: (z_i, x_T), from which DDIM draws them again, up to what the autoencoder loses.

        Args:
            image: resized and cropped to `height` and `width`.
            prompt: caption that caption-reading decoders read meanwhile, one for all or one an image; None is nothing.
            num_inference_steps, guidance_scale, control_image: the same as for drawing them again. Guidance makes it
                less exact.
            height, width: in pixels; None is the decoder's size.

        Raises InputError for a value that is not allowed, before any work starts.
        """
        # Check the arguments
        check_argument_order({"prompt": prompt})
        options = DecoderOptions(
            num_inference_steps,
            Guidance.from_value(guidance_scale),
            sampler="ddim",
            height=height,
            width=width,
            control_image=control_image,
        )
        check_inversion_guidance(options)
        images = read_given_images(image, self.compute_image_shape(options), self.clip)
        check_stage_inputs(self, None, options, len(images.pixels))
        prompts = list_prompts("prompt", prompt, len(images.pixels))
        # Encode and invert
        with self.track_call():
            text = self.encode_decoder_prompt(prompts) if prompts else None
            return self.invert_images(images, text, options)

    def read_image_or_latent(
        self, image: ImageInputs | BipartiteLatent, options: DecoderOptions, is_redrawn: bool = True
    ) -> tuple[GivenImages | BipartiteLatent, int, DecoderOptions]:
        """Return N images, or checked latents of images, on the device; N; and the options for images of their size.

        is_redrawn: False if the latents are not drawn again, so that the options alone say the size.
        """
        if not isinstance(image, BipartiteLatent):
            images = read_given_images(image, self.compute_image_shape(options), self.clip)
            return images, len(images.pixels), options
        count = len(image.image_embeds)
        check_tensor("image_embeds", image.image_embeds, (count, self.clip.embed_dim))
        check_tensor("latents", image.latents, (count, self.latent_shape[0], "h", "w"))
        if is_redrawn:
            options = adopt_latent_sides(self, options, image.latents)
        return BipartiteLatent(*(tensor.to(self._execution_device).float() for tensor in image)), count, options

    @torch.no_grad()
    def invert_images(
        self, given: GivenImages | BipartiteLatent, text: TextEncoding | None, options: DecoderOptions
    ) -> BipartiteLatent:
        """Invert images. Images that are inverted already are returned as they are."""
        if isinstance(given, BipartiteLatent):
            return given
        z_i, scheduler = self.encode_image(given.seen), resolve_sampler("ddim", self.decoder_scheduler, self.decoder)
        latents = self.encode_latents(given.pixels)
        self.offload_all_but("decoder")
        # Without noise on z_i, and by DDIM, whose steps can be undone
        control = build_control(self.decoder, options, len(z_i), (latents.shape[2], latents.shape[3]))
        condition = build_decoder_condition(self.decoder, z_i, text, control=control)
        predict = build_decoder_predict(self.decoder, scheduler, condition, options.guidance_scale)
        steps = options.num_inference_steps
        _, on_step = build_preview_hooks(self, "inversion", scheduler, steps, options, lambda x: x, self.decode)
        progress = show_steps(self, "inversion")
        noise = invert_sample(predict, scheduler, latents, steps, progress=progress, on_step=on_step)
        return BipartiteLatent(z_i, noise)

    def redraw_images(
        self,
        latent: BipartiteLatent,
        text: TextEncoding | None,
        options: DecoderOptions,
        generators: list[Generator],
    ) -> Any:
        """Draw images from (z_i, x_T), in the form of `output_type`: by DDIM, for those to come back."""
        # The inversion does not noise z_i, so that a decoder that does must not noise it here either
        noise = torch.zeros_like(latent.image_embeds) if options.noise_level == 0 else None
        options = replace(options, latents=latent.latents, image_embeds_noise=noise)
        latents = run_decoder_stage(self, latent.image_embeds, text, options, generators)
        return finish_images(self, latents, latent.image_embeds, options, generators)


def build_inversion_options(
    options: dict[str, Any],
    defaults: dict[str, Any] | None = None,
    eta: float = 0.0,
    allowed: frozenset[str] = DECODER_REDRAWING_OPTIONS,
) -> ResolvedOptions:
    """Build the options for drawing from the noise of given images: DDIM with this eta.

    defaults: a model's own, of which those of the inversion replace the decoder's. allowed: see `build_options`.
    """
    prior, decoder = build_options(options, (defaults or {}) | INVERSION_DEFAULTS, allowed)
    if decoder.latents is not None:
        raise InputError("latents is not allowed here: the noise comes from the image")
    return ResolvedOptions(prior, resolve_ddim_options(decoder, eta))


def resolve_ddim_options(options: DecoderOptions, eta: float = 0.0) -> DecoderOptions:
    """Set the sampler to DDIM, which draws inverted images again. Raises InputError for another sampler or eta."""
    if options.sampler not in (None, "ddim"):
        raise InputError(f"sampler must be ddim for inverted images, got {options.sampler}")
    if options.eta is not None and options.eta != eta:
        raise InputError(f"eta must be {eta:g} for inverted images, got {options.eta:g}")
    if options.noise_level or options.image_embeds_noise is not None:
        raise InputError("noise_level must be 0 for inverted images, without image_embeds_noise")
    return replace(options, sampler="ddim", eta=eta)


def check_inversion_guidance(options: DecoderOptions) -> None:
    """Refuse guidance that remembers its steps: an inversion evaluates the model several times in each."""
    guidance = options.guidance_scale
    if guidance.momentum and not guidance.is_off:
        raise InputError(f"guidance_scale.momentum must be 0 for inverted images, got {guidance.momentum:g}")
