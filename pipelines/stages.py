"""The sampling of each stage: prior, decoder, super-resolution and upsampler, with previews.

`pipeline` is the `UnCLIPPipeline` whose components sample; `upsample_images` also takes an `UpsamplePipeline`.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from diffusers import SchedulerMixin
from PIL import Image
from t2i.pipelines.calls.callbacks import PRIOR_CALLBACK_TENSORS, ConditionCallback, watch_interruption
from t2i.pipelines.calls.progress import Interrupted, Preview, show_steps
from t2i.pipelines.inputs import fit_control_images, read_control_images
from t2i.pipelines.options import DecoderOptions, PriorOptions
from torch import Generator, Tensor

from t2i.diffusion.condition import ImageCondition, TextEncoding, TokenStates
from t2i.diffusion.denoiser import Predict, PredictTransform, StepCallback
from t2i.diffusion.guidance import Guidance, build_guided_predict
from t2i.diffusion.inpainting import build_blend_callback, concat_masked_latents
from t2i.diffusion.process import predict_x0
from t2i.diffusion.samplers import count_model_evaluations, resolve_sampler
from t2i.diffusion.sampling_loop import Sampling, count_steps_left, generate_noise
from t2i.diffusion.windows import Window, build_canvas_windows
from t2i.sampling import embeddings, sample
from t2i.sampling.steering import build_steering_transform
from t2i.sampling.upsampling import DEFAULT_TILE_SIZE, derive_stage_generators, sample_upsampler

logger = logging.getLogger(__name__)

PREVIEW_STEPS = 4  # of the decoder, for a preview of the prior
# Stages of `derive_stage_generators`; those of the upsampler count from 1.
SUPER_RESOLUTION_STREAM, EMBEDS_NOISE_STREAM = -1, -2


@dataclass(frozen=True)
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


def run_prior_stage(
    pipeline: Any,
    text: TextEncoding,
    negative: TextEncoding | None,
    options: PriorOptions,
    generators: list[Generator],
    decoding: DecoderOptions,
) -> Tensor:
    """Sample z_i for captions, (N, D), fp32. decoding: options with the callback of previews.

    Without a prior, return the captions' own z_t, as a baseline for priors.
    """
    prior, scheduler, steps = pipeline.prior, pipeline.prior_scheduler, options.prior_num_inference_steps
    pipeline.offload_all_but("prior")
    text = text.to(pipeline._execution_device, pipeline.clip.dtype if prior is None else prior.dtype)
    if prior is None:
        logger.warning("this pipeline has no prior: the decoder gets the embedding of the text")
    else:
        steps = prior.count_steps(steps)
        scheduler = None if scheduler is None else resolve_sampler(options.prior_sampler, scheduler, prior)

    def estimate_image_embeds(x: Tensor) -> Tensor:
        z_i = prior.unscale_image_embeds(x) if prior.needs_scheduler else x
        return embeddings.select_nearest_candidates(z_i.float(), text.expand().embedding)

    def draw_preview_images(z_i: Tensor) -> list[Image.Image]:
        fresh = [Generator().manual_seed(0) for _ in z_i]
        # Always the same noise, so that previews show how z_i changes and nothing else
        unguided, control = Guidance(1.0), decoding.control_image
        quick = DecoderOptions(num_inference_steps=PREVIEW_STEPS, guidance_scale=unguided, control_image=control)
        return pipeline.decode(run_decoder_stage(pipeline, z_i, text, quick, fresh, is_preview=True))

    watch, report_step = build_preview_hooks(
        pipeline, "prior", scheduler, steps, decoding, estimate_image_embeds, draw_preview_images
    )
    callback = build_prior_callback(pipeline, scheduler, text, negative, options)
    transforms, callbacks = ([callback.transform], [callback.on_step]) if callback is not None else ([], [])
    counts_steps, progress = prior is not None and prior.needs_scheduler, show_steps(pipeline, "prior")
    sampling = Sampling(
        steps=options.prior_num_inference_steps,
        generators=generators,
        guidance=options.prior_guidance_scale,
        noise=options.prior_latents,
        progress=watch_interruption(pipeline, progress) if counts_steps else progress,
        on_step=chain_callbacks([*callbacks, report_step]),
        transform=chain_transforms([*transforms, watch]),
    )
    candidates, temperature = options.prior_candidates, options.prior_temperature
    z_i = embeddings.sample_image_embeds(prior, scheduler, text, negative, sampling, candidates, temperature)
    return check_finite_values("prior", z_i if prior is not None else pipeline.normalize_embeds(z_i))


def build_prior_callback(
    pipeline: Any, scheduler: Any, text: TextEncoding, negative: TextEncoding | None, options: PriorOptions
) -> ConditionCallback | None:
    """Return the user's callback after each step of a diffusion prior, which may change the guidance scale."""
    prior, callback = pipeline.prior, options.prior_callback_on_step_end
    if callback is None:
        return None
    candidates = embeddings.count_candidates(prior, options.prior_candidates, options.prior_latents)
    captions = text.repeat(candidates)
    negative = prior.null(len(captions)) if negative is None else negative.repeat(candidates)
    negative = negative.to(text.device, prior.dtype)

    def build_predict(condition: TextEncoding, negative: TextEncoding, guidance: Guidance) -> Predict:
        timesteps = scheduler.timesteps if prior.prepares_timesteps else None
        return build_guided_predict(prior, condition, negative, guidance, scheduler, timesteps)

    names = options.prior_callback_on_step_end_tensor_inputs
    guidance, conditions = options.prior_guidance_scale, (captions, negative)
    return ConditionCallback(pipeline, callback, names, guidance, conditions, build_predict, PRIOR_CALLBACK_TENSORS)


def run_decoder_stage(
    pipeline: Any,
    z_i: Tensor,
    text: TextEncoding | TokenStates | None,
    options: DecoderOptions,
    generators: list[Generator],
    negative: ImageCondition | None = None,
    canvas: Canvas | None = None,
    is_preview: bool = False,
) -> Tensor:
    """Sample latents of unit variance, (N, C, h, w), fp32, that show z_i, (N, D).

    negative: z_i and captions to guide away from; None: those of the options, or the decoder's null. is_preview: of the
    prior, whose `CallbackState` stays as it is.
    """
    decoder, device = pipeline.decoder, pipeline._execution_device
    z_i, canvas = z_i.to(device), canvas or Canvas()
    pipeline.offload_all_but("decoder")
    scheduler = resolve_sampler(options.sampler, pipeline.decoder_scheduler, decoder)
    # Given images decide the size
    shape = pipeline.compute_latent_shape(options) if canvas.latents is None else tuple(canvas.latents.shape[1:])
    noise = generate_noise(shape, generators, device) if options.latents is None else options.latents.to(device).float()

    # The conditions
    masked_latents = canvas.build_masked_latents(noise)
    embeds_noise = get_embeds_noise(decoder, options, z_i, generators)
    control = build_control(decoder, options, len(z_i), (shape[1], shape[2]))

    def build_condition(embeds: Tensor, read: TextEncoding | TokenStates | None) -> ImageCondition:
        level = options.noise_level
        return sample.build_decoder_condition(decoder, embeds, read, masked_latents, embeds_noise, level, control)

    if negative is None and options.negative_image_embeds is not None:
        negative = ImageCondition(repeat_negative_embeds(pipeline, options.negative_image_embeds, len(z_i)))
    if negative is not None:
        negative = build_condition(negative.embedding.to(z_i), negative.text)

    # The sampling, in windows if images are painted in
    windows = [] if canvas.mask is None else build_canvas_windows(shape[1], shape[2], pipeline.latent_shape[-1])
    condition = build_condition(z_i, text)
    callback = build_decoder_callback(pipeline, scheduler, options, condition, negative, windows)
    transform, on_step = build_decoder_hooks(pipeline, scheduler, options, canvas, noise, callback)
    progress = show_steps(pipeline, "decoder")
    sampling = Sampling(
        steps=options.num_inference_steps,
        generators=generators,
        guidance=options.guidance_scale,
        noise=noise,
        progress=progress if is_preview else watch_interruption(pipeline, progress),
        on_step=on_step,
        transform=transform,
        **options.scheduler_settings,
        original=canvas.original,
        strength=canvas.strength,
    )
    return check_finite_values(
        "decoder", sample.sample_decoder(decoder, scheduler, condition, sampling, negative, windows)
    )


def repeat_negative_embeds(pipeline: Any, given: Tensor, count: int) -> Tensor:
    """Return given z_i to guide away from, (count, D), as the decoder reads them. given: a row for each, or fewer."""
    rows = given.repeat_interleave(count // len(given), dim=0)
    return pipeline.normalize_embeds(rows.to(pipeline._execution_device).float())


def get_embeds_noise(decoder: Any, options: DecoderOptions, z_i: Tensor, generators: list[Generator]) -> Tensor | None:
    """Return the noise of z_i, (N, D), given or drawn; None for decoders that do not noise it."""
    if options.image_embeds_noise is not None or decoder.noise_levels is None:
        return options.image_embeds_noise
    return generate_noise(z_i.shape[1:], derive_stage_generators(generators, EMBEDS_NOISE_STREAM), z_i.device)


def build_control(decoder: Any, options: DecoderOptions, count: int, sides: tuple[int, int]) -> Tensor | None:
    """Return control images, (count, 3, H, W) in [0, 1], for latents with these sides; None without any."""
    if options.control_image is None:
        return None
    height, width = (decoder.control_factor * side for side in sides)
    return fit_control_images(read_control_images(options.control_image), count, (height, width))


def build_decoder_callback(
    pipeline: Any,
    scheduler: SchedulerMixin,
    options: DecoderOptions,
    condition: ImageCondition,
    negative: ImageCondition | None,
    windows: list[Window],
) -> ConditionCallback | None:
    """Return the user's callback after each step, which may change the guidance scale and the condition."""
    decoder, callback = pipeline.decoder, options.callback_on_step_end
    if callback is None:
        return None

    def build_predict(condition: ImageCondition, negative: ImageCondition, guidance: Guidance) -> Predict:
        return sample.build_decoder_predict(decoder, scheduler, condition, guidance, negative, windows)

    conditions = (condition, decoder.null(len(condition)) if negative is None else negative)
    names = options.callback_on_step_end_tensor_inputs
    return ConditionCallback(pipeline, callback, names, options.guidance_scale, conditions, build_predict)


def build_decoder_hooks(
    pipeline: Any,
    scheduler: SchedulerMixin,
    options: DecoderOptions,
    canvas: Canvas,
    noise: Tensor,
    callback: ConditionCallback | None = None,
) -> tuple[PredictTransform, StepCallback]:
    """Return what runs around each step of the decoder: steering, given images, the user's callback, and previews."""
    transforms: list[PredictTransform] = [] if callback is None else [callback.transform]
    callbacks: list[StepCallback] = []
    if options.steering is not None:
        clip, autoencoder = pipeline.clip, pipeline.autoencoder
        transforms.append(
            build_steering_transform(options.steering, scheduler, clip, autoencoder, len(noise), noise.device)
        )
    if canvas.mask is not None:
        callbacks.append(build_blend_callback(scheduler, canvas.latents, canvas.mask, noise))
    if callback is not None:
        callbacks.append(callback.on_step)
    # Previews come last, so that they show what the others made of the step
    steps = options.num_inference_steps
    steps_left = steps if canvas.original is None else count_steps_left(steps, canvas.strength)
    watch, report_step = build_preview_hooks(
        pipeline, "decoder", scheduler, steps_left, options, lambda x: x, canvas.to_images or pipeline.decode
    )
    return chain_transforms([*transforms, watch]), chain_callbacks([*callbacks, report_step])


def finish_images(
    pipeline: Any, latents: Tensor, z_i: Tensor, options: DecoderOptions, generators: list[Generator]
) -> Any:
    """Decode latents and upsample the images, as the options ask for, in the form of `output_type`."""
    if not options.upsample:
        return pipeline.decode(latents, options.output_type, options, generators)
    images = 2 * pipeline.decode(latents, "pt", options, generators) - 1
    images = upsample_images(pipeline, images, z_i, options, generators)
    return pipeline.image_processor.postprocess(images, options.output_type)


def sample_super_resolution(
    pipeline: Any, latents: Tensor, options: DecoderOptions, generators: list[Generator]
) -> Tensor:
    """Sample the images of a cascade (Karlo), (N, 3, H, W), fp32, from its latents, which are smaller images."""
    steps, scheduler = options.super_res_num_inference_steps, pipeline.autoencoder.scheduler
    to_images = pipeline.image_processor.postprocess
    transform, on_step = build_preview_hooks(
        pipeline, "super_resolution", scheduler, steps, options, lambda x: x.clamp(-1, 1), to_images
    )
    sampling = Sampling(
        steps,
        derive_stage_generators(generators, SUPER_RESOLUTION_STREAM),
        noise=options.super_res_latents,
        progress=show_steps(pipeline, "super_resolution"),
        on_step=on_step,
        transform=transform,
    )
    return check_finite_values("super-resolution", pipeline.autoencoder.draw_images(latents, sampling).float())


def upsample_images(
    pipeline: Any,
    images: Tensor,
    z_i: Tensor | None,
    options: DecoderOptions,
    generators: list[Generator],
    tile: int = DEFAULT_TILE_SIZE,
) -> Tensor:
    """Enlarge images, (N, 3, H, W) in [-1, 1], `options.upsample` times; fp32. generators: the decoder's."""
    # A copy, which sampling changes: calls in several threads may share the pipeline's
    upsampler, scheduler = pipeline.upsampler, copy.deepcopy(pipeline.upsampler_scheduler)
    steps, level = options.upsample_steps, options.upsample_level
    for stage in range(1, options.upsample + 1):
        height, width = (upsampler.config.factor * side for side in images.shape[-2:])

        # The network's sides are multiples of its patches; the defaults are the sides of this enlargement
        def crop_estimate(x: Tensor, height: int = height, width: int = width) -> Tensor:
            return x[..., :height, :width].clamp(-1, 1)

        transform, on_step = build_preview_hooks(
            pipeline, "upsampler", scheduler, steps, options, crop_estimate, pipeline.image_processor.postprocess
        )
        own = derive_stage_generators(generators, stage)
        progress = show_steps(pipeline, "upsampler")
        sampling = Sampling(steps, own, progress=progress, on_step=on_step, transform=transform)
        images = sample_upsampler(upsampler, scheduler, images, sampling, z_i, level, tile)
        images = check_finite_values("upsampler", images)
    return images


def build_preview_hooks(
    pipeline: Any,
    stage: str,
    scheduler: SchedulerMixin,
    steps: int,
    options: DecoderOptions,
    to_estimate: Callable[[Tensor], Tensor],
    to_images: Callable[[Tensor], list[Image.Image]],
) -> tuple[PredictTransform, StepCallback]:
    """Return the transform and the callback of a stage's sampling that make previews and `interrupt` work.

    to_estimate: function from x to the estimate of a `Preview`. to_images: function from the estimate to images.
    """
    last_x0: dict[str, Tensor] = {}
    steps = count_model_evaluations(scheduler, steps)

    def record_predictions(predict: Predict) -> Predict:
        def predict_and_record(x: Tensor, t: Tensor) -> Tensor:
            prediction = predict(x, t)
            last_x0["x0"] = predict_x0(scheduler, prediction, x, t)
            return prediction

        return predict if options.on_preview is None else predict_and_record

    def report_step(step: int, t: Tensor, x: Tensor) -> Tensor:
        if options.on_preview is not None and ((step + 1) % options.preview_every == 0 or step + 1 == steps):
            # Priors without a scheduler call no `Predict`: their x is an estimate already
            estimate = to_estimate(x if step + 1 == steps else last_x0.get("x0", x))
            options.on_preview(Preview(stage, step + 1, steps, estimate, lambda: to_images(estimate)))
        if pipeline.interrupted:
            pipeline.set_call_state(interrupted=False)
            raise Interrupted(f"interrupted after step {step + 1} of {steps} of the {stage}")
        return x

    return record_predictions, report_step


def chain_transforms(transforms: list[PredictTransform]) -> PredictTransform:
    """Return a transform that applies others one after the other."""
    return lambda predict: reduce(lambda inner, transform: transform(inner), transforms, predict)


def chain_callbacks(callbacks: list[StepCallback]) -> StepCallback:
    """Return a callback that runs others one after the other."""
    return lambda step, t, x: reduce(lambda inner, callback: callback(step, t, inner), callbacks, x)


def check_finite_values(stage: str, x: Tensor) -> Tensor:
    """Return x. Raises ValueError for NaN or infinity."""
    if not x.isfinite().all():
        raise ValueError(f"the {stage} returned values that are not finite; its weights or the precision are at fault")
    return x
