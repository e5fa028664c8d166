"""Checks of a call's arguments: what these models and schedulers can draw. All raise InputError, before any work.

`pipeline` is the `UnCLIPPipeline` that draws.
"""

import copy
import logging
from dataclasses import replace
from typing import Any

from diffusers import SchedulerMixin
from t2i.pipelines.folder import check_prior_scheduler
from t2i.pipelines.inputs import read_control_images
from t2i.pipelines.options import DecoderOptions, PriorOptions
from torch import Tensor

from t2i.checks import check_integer, check_multiple_of, check_range, check_texts
from t2i.diffusion.samplers import check_prediction_type, find_training_scheduler, resolve_sampler
from t2i.diffusion.sampling_loop import Sampling, build_step_arguments, set_timesteps
from t2i.errors import InputError
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.sampling.embeddings import check_scale_only
from t2i.sampling.steering import check_steering
from t2i.sampling.upsampling import check_upsampled_size
from t2i.texts import wrap_text

logger = logging.getLogger(__name__)

MAX_PIXEL_VALUE = 2.0  # images span [-1, 1]; what an autoencoder or a resizing made leaves that a little


def list_prompts(name: str, prompt: str | list[str] | None, count: int | None = None, empty: bool = True) -> list[str]:
    """Return texts as a list, one text repeated `count` times. empty: True to allow texts without words."""
    prompts = [] if prompt is None else wrap_text(prompt)
    check_texts(name, prompts, empty=empty)
    if count is None or not prompts:
        return list(prompts)
    if isinstance(prompt, list) and len(prompts) != count:
        raise InputError(f"{name} has {len(prompts)} texts for {count} prompts")
    return list(prompts) if isinstance(prompt, list) else prompts * count


def check_tensor(name: str, value: Tensor | None, shape: tuple[int | str, ...]) -> None:
    """Refuse a tensor of another shape, and values that are not finite. None passes.

    shape: a side that may be any number, but not 0, has a letter.
    """
    if value is None:
        return
    sides = value.shape if isinstance(value, Tensor) else ()
    fits = len(sides) == len(shape) and all(
        side > 0 if isinstance(expected, str) else side == expected for side, expected in zip(sides, shape)
    )
    if not fits or not isinstance(value, Tensor):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        expected = ", ".join(map(str, shape))
        raise InputError(f"{name} must be a tensor of shape ({expected}), got {got}")
    if not value.isfinite().all():
        raise InputError(f"{name} must be finite, got NaN or infinity")


def check_images(images: Any) -> None:
    """Refuse what is no tensor of images, (N, 3, H, W) in about [-1, 1], such as pixels from 0 to 255."""
    check_tensor("images", images, ("N", 3, "H", "W"))
    if not images.is_floating_point() or images.abs().max() > MAX_PIXEL_VALUE:
        got = f"{images.dtype} from {images.min():g} to {images.max():g}"
        raise InputError(f"images must be floats in [-1, 1], got {got}; t2i.pipelines.inputs.read_images makes them")


def repeat_image_embeds(pipeline: Any, image_embeds: Tensor, inputs: int, images_per_prompt: int) -> Tensor:
    """Return given z_i of all images, (N, D), as the decoder reads them, on the device.

    image_embeds: (N, D), or a row for each of the `inputs`, prompts or given images; 0 is any number of rows.
    images_per_prompt: images drawn for one. Raises InputError for another shape.
    """
    check_tensor("image_embeds", image_embeds, ("N", pipeline.clip.embed_dim))
    count = len(image_embeds)
    images = inputs * images_per_prompt
    if inputs and count not in (inputs, images):
        raise InputError(f"image_embeds has {count} rows for {images} images")
    rows = image_embeds if count == images else image_embeds.repeat_interleave(images_per_prompt, dim=0)
    return pipeline.normalize_embeds(rows.to(pipeline._execution_device).float())


def warn_of_missing_caption(pipeline: Any, texts: Any, image_embeds: Tensor | None) -> None:
    """Log that a decoder that reads captions has none beside z_i, without which it draws other images.

    Kandinsky 2.1 of diffusers refuses that; its users give "" for no caption. A z_i of zeros is no image's.
    """
    if image_embeds is None or len(texts) or pipeline.decoder.config.text_width is None:
        return
    if image_embeds.any():
        logger.warning('prompt is missing: this decoder reads captions beside image_embeds; give it, or "" for none')


def check_stage_inputs(
    pipeline: Any,
    prior: PriorOptions | None,
    decoder: DecoderOptions,
    count: int,
    canvas: tuple[int, int] | None = None,
    images_per_prompt: int = 1,
) -> None:
    """Refuse options that these stages do not take, to draw `count` images.

    prior: None if the prior is not used. canvas: height and width of given images that are painted in.
    images_per_prompt: number for each prompt or given image.
    """
    if canvas is not None and pipeline.decoder.control_factor is not None:
        raise InputError("this decoder is a ControlNet, which does not inpaint; use another decoder")
    check_stage_options(pipeline, prior, decoder)
    check_image_sides(pipeline, decoder, canvas)
    # The options' sides are checked before, against the trained size; noise has the canvas' size
    if canvas is not None:
        decoder = replace(decoder, height=canvas[0], width=canvas[1])
    # Tensors of the caller have the shapes of what is drawn
    channels, *latent_sides = pipeline.compute_latent_shape(decoder)
    if decoder.steering is not None:
        check_steering(decoder.steering, pipeline.clip, pipeline.autoencoder, count, min(latent_sides))
    height, width = (side * pipeline.autoencoder.factor for side in latent_sides)
    embeds_shape = (count, pipeline.clip.embed_dim)
    if prior is not None:
        check_tensor("prior_latents", prior.prior_latents, embeds_shape)
    check_tensor("latents", decoder.latents, (count, channels, *latent_sides))
    check_tensor("image_embeds_noise", decoder.image_embeds_noise, embeds_shape)
    check_negative_embeds(decoder.negative_image_embeds, count, images_per_prompt, pipeline.clip.embed_dim)
    if decoder.control_image is not None:
        given, needed = len(read_control_images(decoder.control_image).pixels), count // images_per_prompt
        if given not in (1, needed):
            raise InputError(f"control_image has {given} images for {needed} prompts or images; give 1 or {needed}")
    check_super_resolution(pipeline, decoder, (count, 3, height, width))
    check_upsampling(pipeline, decoder, height, width)


def check_negative_embeds(given: Tensor | None, count: int, images_per_prompt: int, width: int) -> None:
    """Refuse z_i to guide away from, unless there is a row for each of `count` images, or for each prompt."""
    check_tensor("negative_image_embeds", given, ("N", width))
    if given is not None and len(given) not in (count, count // images_per_prompt):
        raise InputError(f"negative_image_embeds has {len(given)} rows for {count} images")


def check_stage_options(pipeline: Any, prior: PriorOptions | None, decoder: DecoderOptions) -> None:
    """Refuse what these models and schedulers cannot do. prior: None if the prior is not used."""
    if prior is not None:
        check_prior_options(pipeline, prior)

    # The decoder
    levels = pipeline.decoder.noise_levels
    if levels is not None:
        check_integer("noise_level", decoder.noise_level, 0, levels - 1)
    elif decoder.noise_level or decoder.image_embeds_noise is not None:
        name = "noise_level" if decoder.noise_level else "image_embeds_noise"
        raise InputError(f"{name} needs a decoder that adds noise to image_embeds (Stable unCLIP's); this one does not")
    if pipeline.decoder.control_factor is not None and decoder.control_image is None:
        raise InputError(
            "control_image is missing; this decoder is a ControlNet, which draws by one, such as a depth map"
        )
    if pipeline.decoder.control_factor is None and decoder.control_image is not None:
        raise InputError(
            "control_image needs a ControlNet decoder (Kandinsky 2.2's), which this one is not; leave it out"
        )
    # Its scheduler, which must take the timesteps or the number of steps
    check_scheduler_of("decoder", pipeline)
    scheduler = resolve_sampler(decoder.sampler, pipeline.decoder_scheduler, pipeline.decoder)
    sampling = Sampling(decoder.num_inference_steps, **decoder.scheduler_settings)
    build_step_arguments(scheduler, sampling)
    if decoder.timesteps is None and decoder.sigmas is None:
        check_step_count("num_inference_steps", decoder.num_inference_steps, scheduler)
    else:
        set_timesteps(copy.deepcopy(scheduler), sampling)


def check_prior_options(pipeline: Any, prior: PriorOptions) -> None:
    """Refuse what this prior, or none, and its scheduler cannot do."""
    if pipeline.prior is None and pipeline.clip.reads_captions and not pipeline.clip.unit_length:
        raise InputError("this model has no prior; give prior=..., the folder of one, or image_embeds")
    check_prior_scheduler(pipeline.prior, pipeline.prior_scheduler)  # two parts can be assigned one by one
    check_scheduler_of("prior", pipeline)
    if pipeline.prior_scheduler is not None:
        scheduler = resolve_sampler(prior.prior_sampler, pipeline.prior_scheduler, pipeline.prior)
        check_step_count("prior_num_inference_steps", prior.prior_num_inference_steps, scheduler)
    elif prior.prior_sampler is not None:
        raise InputError(f"prior_sampler needs a diffusion prior, which this is not; got {prior.prior_sampler!r}")
    if prior.prior_callback_on_step_end is not None and not (pipeline.prior and pipeline.prior.needs_scheduler):
        raise InputError("prior_callback_on_step_end needs a diffusion prior, whose steps it sees; this is not one")
    if isinstance(pipeline.prior, AutoregressivePrior):
        check_scale_only(prior.prior_guidance_scale)


def check_scheduler_of(model: str, pipeline: Any) -> None:
    """Refuse a scheduler that reads other predictions than its model makes: two parts can be assigned one by one."""
    scheduler, trained = (getattr(pipeline, f"{model}_scheduler"), find_training_scheduler(getattr(pipeline, model)))
    if scheduler is not None and trained is not None:
        check_prediction_type(f"{model}_scheduler", scheduler, trained)


def check_step_count(name: str, steps: int, scheduler: SchedulerMixin) -> None:
    """Refuse more steps than a scheduler takes: most take at most as many as the training had."""
    # A scheduler has no check of its own: only setting the steps, here of a copy, refuses them
    try:
        copy.deepcopy(scheduler).set_timesteps(steps)
    except ValueError as error:
        raise InputError(f"{name} is {steps}, which {type(scheduler).__name__} refuses: {error}") from error


def adopt_latent_sides(pipeline: Any, options: DecoderOptions, latents: Tensor) -> DecoderOptions:
    """Return options that draw the size of given latents, (N, C, h, w). Raises InputError if they ask for another."""
    height, width = (side * pipeline.autoencoder.factor for side in latents.shape[-2:])
    for name, asked, side in (("height", options.height, height), ("width", options.width, width)):
        if asked not in (None, side):
            raise InputError(f"{name} is {asked}, but the given latents are those of {side} pixels; leave it out")
    return replace(options, height=height, width=width)


def check_image_sides(pipeline: Any, options: DecoderOptions, canvas: tuple[int, int] | None = None) -> None:
    """Refuse a height or width that cannot be drawn, or that is not the canvas'."""
    trained_side = pipeline.image_size
    for name, side, own in zip(("height", "width"), (options.height, options.width), canvas or [trained_side] * 2):
        if side in (None, own):
            continue
        if canvas is not None:
            raise InputError(f"{name} is {side}, but images that are painted in keep their size; leave it out")
        check_multiple_of(name, side, pipeline.autoencoder.factor * pipeline.decoder.latent_multiple)


def check_super_resolution(pipeline: Any, options: DecoderOptions, shape: tuple[int, ...]) -> None:
    """Refuse super_res_latents of another shape, and super_res options without a cascade."""
    changed = [] if options.super_res_latents is None else ["super_res_latents"]
    if options.super_res_num_inference_steps != DecoderOptions.super_res_num_inference_steps:
        changed.append("super_res_num_inference_steps")
    if changed and not pipeline.autoencoder.is_cascade:
        raise InputError(
            f"{changed[0]} needs a cascade, which ends with a super-resolution (Karlo); this model does not"
        )
    check_tensor("super_res_latents", options.super_res_latents, shape)


def check_upsampling(pipeline: Any, options: DecoderOptions, height: int, width: int) -> None:
    """Refuse to upsample images of this size as the options ask for."""
    if not options.upsample:
        return
    if pipeline.upsampler is None or pipeline.upsampler_scheduler is None:
        raise InputError(f"upsample is {options.upsample}, but this pipeline has no upsampler; load one")
    check_range("upsample_level", options.upsample_level, 0, pipeline.upsampler.config.max_level)
    check_upsampled_size(pipeline.upsampler, width, height, options.upsample)
    check_scheduler_of("upsampler", pipeline)
    check_step_count("upsample_steps", options.upsample_steps, pipeline.upsampler_scheduler)
