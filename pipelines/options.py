"""What every pipeline knows of its stages: the keyword arguments that all of them take."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from diffusers import DiffusionPipeline
from t2i.pipelines.progress import Preview
from torch import Tensor

from t2i.checks import check_choice, check_integer, check_range
from t2i.diffusion.denoiser import MAX_STEPS
from t2i.diffusion.guidance import Guidance, check_guidance
from t2i.diffusion.samplers import check_sampler_name
from t2i.errors import InputError
from t2i.files.untrusted import MAX_TIMESTEPS
from t2i.sampling.embeddings import MAX_CANDIDATES
from t2i.sampling.steering import Steering
from t2i.sampling.upsampling import MAX_ENLARGEMENTS

MAX_IMAGE_SIDE = 4096  # of a picture, in pixels
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class PriorOptions:
    """How z_i is drawn for captions.

    prior_num_inference_steps: 1 to 1000.
    prior_guidance_scale: a scale, where 1 is off, or a `Guidance`; None is usual for the prior: 2 for diffusion.
    prior_latents: (N, D), the noise that the diffusion prior starts from; the only candidate then.
    prior_candidates: 1 to 64; of so many the one nearest to the caption's own embedding is taken.
    prior_temperature: of the autoregressive prior, 0 to 10; 0 takes the likeliest, None is the model's own.
    prior_sampler: a name of `t2i.diffusion.samplers.SAMPLERS`; None is the model's own scheduler.
    """

    prior_num_inference_steps: int = 25
    prior_guidance_scale: float | Guidance | None = None
    prior_latents: Tensor | None = None
    prior_candidates: int = 2
    prior_temperature: float | None = None
    prior_sampler: str | None = None

    def __post_init__(self) -> None:
        check_integer("prior_num_inference_steps", self.prior_num_inference_steps, 1, MAX_STEPS)
        if self.prior_guidance_scale is not None:
            check_guidance("prior_guidance_scale", self.prior_guidance_scale)
        check_integer("prior_candidates", self.prior_candidates, 1, MAX_CANDIDATES)
        if self.prior_temperature is not None:
            check_range("prior_temperature", self.prior_temperature, 0, 10)
        if self.prior_sampler is not None:
            check_sampler_name("prior_sampler", self.prior_sampler)


@dataclass
class DecoderOptions:
    """How pictures are drawn for z_i.

    num_inference_steps: 1 to 1000; left out, usual for the decoder: 25 for ours.
    guidance_scale: a scale, where 1 is off, or a `Guidance`; left out, usual for the decoder: 1.5 for ours.
    latents: (N, C, h, w), the noise that the decoder starts from.
    steering: a `Steering` towards a class, a text or a picture, beside the guidance.
    output_type: "pil", "np", "pt" or "latent".
    upsample: how many times the pictures pass through the upsampler; 0 is not at all.
    upsample_steps: of the upsampler, each time.
    upsample_level: of the noise that they get first, so that more of them is redrawn; see `sample_upsampler`.
    height, width: of the pictures, in pixels, where none are given; left out, those that the decoder was trained on.
    noise_level: how far a decoder that noises z_i first (Stable unCLIP's) does so, 0 to 999 there: the more, the more
        the pictures differ from what z_i says.
    image_embeds_noise: (N, D), what it noises z_i with.
    super_res_num_inference_steps: of the diffusion that a cascade's pictures (Karlo's) always pass through at the end;
        another number than the default, and super_res_latents, are refused where the model is none.
    super_res_latents: (N, 3, H, W), the noise that it starts from.
    callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after each step of the decoder; what it
        returns under "latents" is used.
    sampler: a name of `t2i.diffusion.samplers.SAMPLERS`; None is the model's own scheduler.
    eta: of the sampler ddim: 0 adds no noise, 1 as much as ancestral sampling.
    on_preview: called with a `Preview` after every `preview_every` steps of each stage.
    """

    num_inference_steps: int = 25
    guidance_scale: float | Guidance = 1.5
    latents: Tensor | None = None
    steering: Steering | None = None
    output_type: str = "pil"
    sampler: str | None = None
    eta: float | None = None
    upsample: int = 0
    upsample_steps: int = 4
    upsample_level: float = 0.0
    height: int | None = None
    width: int | None = None
    noise_level: int = 0
    image_embeds_noise: Tensor | None = None
    super_res_num_inference_steps: int = 7
    super_res_latents: Tensor | None = None
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: list[str] | None = None
    on_preview: Callable[[Preview], None] | None = None
    preview_every: int = 1

    def __post_init__(self) -> None:
        check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        check_guidance("guidance_scale", self.guidance_scale)
        if self.sampler is not None:
            check_sampler_name("sampler", self.sampler)
        if self.eta is not None:
            check_range("eta", self.eta, 0, 1)
            if self.sampler not in (None, "ddim"):
                raise InputError(f"eta is of the sampler ddim, got eta={self.eta:g} with {self.sampler}")
        check_choice("output_type", self.output_type, OUTPUT_TYPES)
        check_integer("upsample", self.upsample, 0, MAX_ENLARGEMENTS)
        check_integer("upsample_steps", self.upsample_steps, 1, MAX_STEPS)
        check_range("upsample_level", self.upsample_level, 0, 1)
        if self.upsample and self.output_type == "latent":
            raise InputError("upsample is of pictures, output_type is latent; one of the two")
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1, MAX_IMAGE_SIDE)
        check_integer("noise_level", self.noise_level, 0, MAX_TIMESTEPS)
        check_integer("super_res_num_inference_steps", self.super_res_num_inference_steps, 1, MAX_STEPS)
        check_integer("preview_every", self.preview_every, 1, MAX_STEPS)
        if unknown := sorted(set(self.callback_on_step_end_tensor_inputs or []) - {"latents"}):
            raise InputError(f"callback_on_step_end_tensor_inputs may hold 'latents', got {', '.join(unknown)}")


def split_options(options: dict[str, Any]) -> tuple[PriorOptions, DecoderOptions]:
    """Those of the prior and those of the decoder. Raises InputError for values that are not allowed."""
    prior = {one.name for one in fields(PriorOptions)}
    return (
        PriorOptions(**{name: value for name, value in options.items() if name in prior}),
        build_decoder_options({name: value for name, value in options.items() if name not in prior}),
    )


def build_decoder_options(options: dict[str, Any]) -> DecoderOptions:
    """Those of a pipeline that uses no prior. Raises TypeError for names that there are not."""
    known = {one.name for one in fields(DecoderOptions)}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"unknown argument {unknown[0]!r}; see pipelines.options")
    return DecoderOptions(**options)
