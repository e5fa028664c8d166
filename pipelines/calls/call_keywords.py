"""Options of the pipelines' calls as type checkers and editors read them: `**options: Unpack[DrawingKeywords]`.

`t2i.pipelines.calls.signature` builds what `inspect` and `help` show from the same classes. Their fields are those of
`PriorOptions` and `DecoderOptions`, which describe them. None is also taken where a model decides the default.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict

from t2i.pipelines.calls.callbacks import UserCallback
from t2i.pipelines.calls.progress import Preview
from t2i.pipelines.inputs import ImageInputs
from t2i.pipelines.options import ResolvedOptions
from torch import Tensor

from t2i.diffusion.guidance import Guidance
from t2i.sampling.steering import Steering

GuidanceScale: TypeAlias = float | Guidance | dict[str, Any]


class ResolvedKeyword(TypedDict, total=False):
    """Result of `resolve_options`, in place of all options."""

    resolved: ResolvedOptions | None


class PriorKeywords(ResolvedKeyword, total=False):
    """Options of the prior."""

    prior_num_inference_steps: int
    prior_guidance_scale: GuidanceScale | None
    prior_latents: Tensor | None
    prior_candidates: int | None
    prior_temperature: float | None
    prior_sampler: str | None
    prior_callback_on_step_end: UserCallback | None
    prior_callback_on_step_end_tensor_inputs: list[str] | None


class PriorAliases(TypedDict, total=False):
    """Options of the prior by diffusers' names, which are those of `PriorKeywords` without `prior_`."""

    num_inference_steps: int | None
    guidance_scale: GuidanceScale | None
    latents: Tensor | None
    callback_on_step_end: UserCallback | None
    callback_on_step_end_tensor_inputs: list[str] | None


class PriorPipelineKeywords(PriorKeywords, PriorAliases, total=False):
    """Options of the prior alone."""


class VariationKeywords(ResolvedKeyword, total=False):
    """Options of the decoder for pipelines that invert images; `eta` is an argument of the variations themselves."""

    num_inference_steps: int | None
    guidance_scale: GuidanceScale | None
    guidance_rescale: float | None
    latents: Tensor | None
    steering: Steering | None
    output_type: str
    sampler: str | None
    use_clipped_model_output: bool
    upsample: int
    upsample_steps: int
    upsample_level: float
    height: int | None
    width: int | None
    noise_level: int
    image_embeds_noise: Tensor | None
    control_image: ImageInputs | None
    super_res_num_inference_steps: int
    super_res_latents: Tensor | None
    callback_on_step_end: UserCallback | None
    callback_on_step_end_tensor_inputs: list[str] | None
    on_preview: Callable[[Preview], None] | None
    preview_every: int


class RedrawingKeywords(VariationKeywords, total=False):
    """Options of the decoder for pipelines that invert images."""

    eta: float | None


class InterpolationKeywords(PriorKeywords, RedrawingKeywords, total=False):
    """Options of both stages for pipelines that invert images."""


class DrawingKeywords(InterpolationKeywords, total=False):
    """All options."""

    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    negative_image_embeds: Tensor | None
