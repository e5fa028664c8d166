"""Keyword arguments that all drawing pipelines take, as two dataclasses: one for the prior, one for the decoder.

`UnCLIPPipeline.resolve_options` builds both, with the model's own defaults for what is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from t2i.pipelines.calls.callbacks import CALLBACK_TENSORS, PRIOR_CALLBACK_TENSORS, UserCallback, check_callback
from t2i.pipelines.calls.effects import (
    NO_CLIPPING,
    NO_PRIOR,
    ONE_ANSWER,
    ONE_PASS,
    PRIOR_SCALE_OFF,
    SCALE_OFF,
    UNFINISHED,
    UNGUIDED_DECODER,
    Idle,
    exclude_argument,
    list_named_tensors,
    require_argument,
)
from t2i.pipelines.calls.progress import Preview
from t2i.pipelines.inputs import ImageInputs, read_control_images
from torch import Tensor

from t2i.checks import check_choice, check_integer, check_range
from t2i.diffusion.guidance import Guidance, parse_guidance_value
from t2i.diffusion.samplers import SAMPLERS
from t2i.diffusion.sampling_loop import MAX_STEPS
from t2i.errors import InputError
from t2i.files.untrusted import MAX_TIMESTEPS
from t2i.sampling.embeddings import MAX_CANDIDATES, AnyPrior, get_default_guidance_scale, get_default_steps
from t2i.sampling.steering import Steering
from t2i.sampling.upsampling import MAX_ENLARGEMENTS

MAX_IMAGE_SIDE = 4096  # pixels
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def declare_option(default: Any, *idle: Idle) -> Any:
    """Return the field of an option. idle: the cases in which it has no effect, which a call warns of."""
    return field(default=default, metadata={"idle": idle})


# Both are frozen: the check of a batch's memory, the record in a PNG file and the call share one object.


@dataclass(frozen=True)
class PriorOptions:
    """Options of the prior, which samples z_i for captions.

    Args:
        prior_num_inference_steps: denoising steps of a diffusion prior, 1 to 1000. Pipelines take the prior's
            `default_steps` if left out.
        prior_guidance_scale: a number, where 1 is off, or a `Guidance`; stored as a `Guidance`. Pipelines take the
            prior's `default_guidance_scale` if left out.
        prior_latents: (N, D), the noise that a diffusion prior starts from. It allows one candidate only.
        prior_candidates: z_i sampled for each caption, 1 to 64. The one nearest to z_t is used. If left out 2, for text
            diffs 16.
        prior_temperature: temperature of an autoregressive prior, 0 to 10. 0 takes the most likely code, None the
            model's own temperature.
        prior_sampler: a name of `t2i.diffusion.samplers.SAMPLERS`; None is the model's own scheduler.
        prior_callback_on_step_end: as `callback_on_step_end`, after each step of a diffusion prior. Its latents are
            (N * candidates, D), those of one caption in a row.
        prior_callback_on_step_end_tensor_inputs: "latents" alone.

    Raises:
        InputError: for a value out of range.
    """

    prior_num_inference_steps: int = declare_option(25, *NO_PRIOR, ONE_PASS)
    prior_guidance_scale: Guidance = declare_option(Guidance(2.0), *NO_PRIOR, PRIOR_SCALE_OFF)
    prior_latents: Tensor | None = declare_option(None, *NO_PRIOR)
    prior_candidates: int = declare_option(2, *NO_PRIOR, exclude_argument("prior_latents"), ONE_ANSWER)
    prior_temperature: float | None = declare_option(None, *NO_PRIOR)
    prior_sampler: str | None = declare_option(None, *NO_PRIOR)
    # Not called for what an image is guided away from
    prior_callback_on_step_end: UserCallback | None = declare_option(None, exclude_argument("image_embeds"), *NO_PRIOR)
    prior_callback_on_step_end_tensor_inputs: list[str] | None = declare_option(
        None, *NO_PRIOR, *list_named_tensors("prior_callback_on_step_end")
    )

    def __post_init__(self) -> None:
        check_integer("prior_num_inference_steps", self.prior_num_inference_steps, 1, MAX_STEPS)
        guidance = parse_guidance_value("prior_guidance_scale", self.prior_guidance_scale)
        object.__setattr__(self, "prior_guidance_scale", guidance)
        check_integer("prior_candidates", self.prior_candidates, 1, MAX_CANDIDATES)
        if self.prior_temperature is not None:
            check_range("prior_temperature", self.prior_temperature, 0, 10)
        if self.prior_sampler is not None:
            check_choice("prior_sampler", self.prior_sampler, tuple(SAMPLERS))
        name = "prior_callback_on_step_end"
        callback, tensors = self.prior_callback_on_step_end, self.prior_callback_on_step_end_tensor_inputs
        check_callback(name, callback, tensors, PRIOR_CALLBACK_TENSORS)


@dataclass(frozen=True)
class DecoderOptions:
    """Options of the decoder and the stages after it, which draw images for z_i.

    Args:
        num_inference_steps: denoising steps, 1 to 1000. Pipelines take the decoder's `default_steps` if left out.
        guidance_scale: a number, where 1 is off, or a `Guidance`; stored as a `Guidance`. Pipelines take the decoder's
            `default_guidance_scale` if left out.
        guidance_rescale: `Guidance.rescale`, by diffusers' name, 0 to 1; None leaves it to `guidance_scale`.
        latents: (N, C, h, w), the noise that the decoder starts from.
        steering: a `Steering` towards a class, a text or an image, in addition to guidance.
        output_type: "pil", "np", "pt" or "latent".
        sampler: a name of `t2i.diffusion.samplers.SAMPLERS`; None is the model's own scheduler.
        eta: noise that the sampler ddim adds: 0 is none, 1 is as much as ancestral sampling.
        use_clipped_model_output: ddim with a scheduler that clips takes the noise that fits the clipped clean sample.
        timesteps, sigmas: noise levels of the steps, falling, in place of the scheduler's own, one of both. They decide
            the number of steps. Not for pipelines that invert images.
        upsample: number of times the images pass through the upsampler, 0 to 8.
        upsample_steps: denoising steps of each upsampling.
        upsample_level: noise added to the images before upsampling, 0 to 1. More noise redraws more of them.
        height, width: size of the images in pixels; None is the size that the decoder was trained on.
        noise_level: noise added to z_i by decoders that do so (Stable unCLIP), 0 to 999. More noise gives more variety.
        image_embeds_noise: (N, D), that noise.
        negative_image_embeds: (N, D), or a row for each prompt or given image, z_i that the decoder is guided away
            from, such as those drawn for what is not wanted; None is the decoder's null. Not for pipelines that invert
            images.
        control_image: image that a ControlNet decoder (Kandinsky 2.2's) draws by, such as a depth map: one image for
            all, or one for each prompt or given image; see `t2i.pipelines.inputs.fit_control_images`. Not for
            inpainting. Stored as `ControlImages`.
        super_res_num_inference_steps: steps of the super-resolution that a cascade (Karlo) always ends with. Other
            models refuse a value other than the default.
        super_res_latents: (N, 3, H, W), the noise that the super-resolution starts from.
        callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after each decoder step. The
            tensors that it returns replace the present ones; None changes nothing. It may set the pipeline's
            `_guidance_scale`, and `_interrupt` to end the steps. diffusers' callbacks for guidance work.
        callback_on_step_end_tensor_inputs: names of the tensors that the callback gets; None is "latents" alone. Others
            are the decoder's condition, with a row for each image: "image_embeds", z_i as the decoder reads it;
            "prompt_embeds", its token states, without columns if it reads no captions; and both with "negative_".
        on_preview, preview_every: called with a `Preview` after every `preview_every` steps of each stage.

    Raises:
        InputError: for a value out of range, and for two values that exclude each other.
    """

    num_inference_steps: int = declare_option(25, exclude_argument("timesteps"), exclude_argument("sigmas"))
    guidance_scale: Guidance = declare_option(Guidance(1.5), SCALE_OFF)
    guidance_rescale: float | None = declare_option(None, UNGUIDED_DECODER)
    latents: Tensor | None = None
    steering: Steering | None = None
    output_type: str = "pil"
    sampler: str | None = None
    eta: float | None = None
    use_clipped_model_output: bool = declare_option(False, NO_CLIPPING)
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    upsample: int = 0
    upsample_steps: int = declare_option(4, require_argument("upsample"))
    upsample_level: float = declare_option(0.0, require_argument("upsample"))
    height: int | None = None
    width: int | None = None
    noise_level: int = 0
    image_embeds_noise: Tensor | None = None
    negative_image_embeds: Tensor | None = declare_option(None, UNGUIDED_DECODER)
    control_image: ImageInputs | None = None
    super_res_num_inference_steps: int = declare_option(7, UNFINISHED)
    super_res_latents: Tensor | None = declare_option(None, UNFINISHED)
    callback_on_step_end: UserCallback | None = None
    callback_on_step_end_tensor_inputs: list[str] | None = declare_option(
        None, *list_named_tensors("callback_on_step_end")
    )
    on_preview: Callable[[Preview], None] | None = None
    preview_every: int = declare_option(1, require_argument("on_preview"))

    def __post_init__(self) -> None:
        # Denoising
        self.resolve_noise_levels()
        check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        object.__setattr__(self, "guidance_scale", parse_guidance_value("guidance_scale", self.guidance_scale))
        if self.guidance_rescale is not None:
            check_range("guidance_rescale", self.guidance_rescale, 0, 1)
            guidance = replace(self.guidance_scale, rescale=float(self.guidance_rescale))
            object.__setattr__(self, "guidance_scale", guidance)
        if self.sampler is not None:
            check_choice("sampler", self.sampler, tuple(SAMPLERS))
        if self.eta is not None:
            check_range("eta", self.eta, 0, 1)
            if self.sampler not in (None, "ddim"):
                raise InputError(f"eta needs the sampler ddim, got eta={self.eta:g} with the sampler {self.sampler}")
        check_integer("noise_level", self.noise_level, 0, MAX_TIMESTEPS)

        # Images
        if self.control_image is not None:  # read once, here
            object.__setattr__(self, "control_image", read_control_images(self.control_image))
        check_choice("output_type", self.output_type, OUTPUT_TYPES)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1, MAX_IMAGE_SIDE)
        check_integer("upsample", self.upsample, 0, MAX_ENLARGEMENTS)
        check_integer("upsample_steps", self.upsample_steps, 1, MAX_STEPS)
        check_range("upsample_level", self.upsample_level, 0, 1)
        if self.upsample and self.output_type == "latent":
            raise InputError("upsample needs images, but output_type is 'latent'; choose another output_type")
        check_integer("super_res_num_inference_steps", self.super_res_num_inference_steps, 1, MAX_STEPS)

        # Callbacks
        check_integer("preview_every", self.preview_every, 1, MAX_STEPS)
        callback, tensors = self.callback_on_step_end, self.callback_on_step_end_tensor_inputs
        check_callback("callback_on_step_end", callback, tensors, CALLBACK_TENSORS)

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """Fields of `Sampling` that only some schedulers take."""
        return {name: getattr(self, name) for name in ("eta", "use_clipped_model_output", "timesteps", "sigmas")}

    def resolve_noise_levels(self) -> None:
        """Check the given timesteps or sigmas, and set the number of steps to theirs."""
        names = [name for name in ("timesteps", "sigmas") if getattr(self, name) is not None]
        if len(names) > 1:
            raise InputError("timesteps and sigmas exclude each other; give one of them")
        for name in names:
            levels = check_falling_numbers(name, getattr(self, name))
            object.__setattr__(self, name, levels)
            # As diffusers' schedulers take them, the last sigma is where the last step leads to
            object.__setattr__(self, "num_inference_steps", len(levels) - (name == "sigmas"))


def check_falling_numbers(name: str, values: Any) -> tuple[float, ...]:
    """Return a list, array or tensor of numbers as a tuple. Raises InputError unless they fall and none is negative."""
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be a list of numbers, got {values!r:.80}") from None
    least = 2 if name == "sigmas" else 1
    if numbers.ndim != 1 or not least <= len(numbers) <= MAX_STEPS + 1 or not numbers.isfinite().all():
        raise InputError(f"{name} must be a list of {least} to {MAX_STEPS + 1} finite numbers, got {values!r:.80}")
    if numbers.min() < 0 or (numbers.diff() >= 0).any():
        raise InputError(f"{name} must fall to 0 or more, got {values!r:.80}")
    return tuple(int(number) if number == int(number) else number for number in numbers.tolist())


class ResolvedOptions(NamedTuple):
    """Checked options of both stages."""

    prior: PriorOptions
    decoder: DecoderOptions


PRIOR_OPTION_NAMES = frozenset(field.name for field in fields(PriorOptions))
DECODER_OPTION_NAMES = frozenset(field.name for field in fields(DecoderOptions))
OPTION_NAMES = PRIOR_OPTION_NAMES | DECODER_OPTION_NAMES

GUIDANCE_OPTIONS = {"prior_guidance_scale": PriorOptions, "guidance_scale": DecoderOptions}


def list_prior_defaults(prior: AnyPrior | None) -> dict[str, Any]:
    """Return the defaults of `PriorOptions` that depend on the prior, by name."""
    return {
        "prior_num_inference_steps": get_default_steps(prior),
        "prior_guidance_scale": get_default_guidance_scale(prior),
    }


def build_options(
    options: dict[str, Any], defaults: dict[str, Any] | None = None, allowed: frozenset[str] = OPTION_NAMES
) -> ResolvedOptions:
    """Build the options of both stages from keyword arguments.

    Args:
        options: values of the fields of `PriorOptions` and `DecoderOptions`. A guidance scale may also be a dict with
            some of the fields of `Guidance`; the others are those of the default.
        defaults: a model's own defaults, for options that are left out.
        allowed: names of the options that may be given.

    Raises:
        InputError: for a value that is not allowed.
        TypeError: for an unknown name.
    """
    # Refuse unknown names
    if unknown := sorted(options.keys() - allowed):
        raise TypeError(f"unknown argument {unknown[0]!r}; it takes {', '.join(sorted(allowed))}")

    # Fill in the defaults, also of a guidance that is given in part
    values: dict[str, Any] = {name: getattr(options_class, name) for name, options_class in GUIDANCE_OPTIONS.items()}
    values |= defaults or {}
    for name, value in options.items():
        if name in GUIDANCE_OPTIONS and isinstance(value, dict):
            value = replace(Guidance.from_value(values[name]), **value)
        if value is not None:  # None is the default
            values[name] = value.item() if isinstance(value, np.generic) else value  # JSON has no numbers of NumPy
    prior = {name: value for name, value in values.items() if name in PRIOR_OPTION_NAMES}
    decoder = {name: value for name, value in values.items() if name in DECODER_OPTION_NAMES}
    return ResolvedOptions(PriorOptions(**prior), DecoderOptions(**decoder))
