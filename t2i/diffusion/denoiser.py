"""The contract of every denoiser: the prior on vectors, the decoder on latents, the upsampler on images.

A denoiser is a module with

    context    = denoiser.prepare(condition)      all that depends on neither x nor t, once per image
    prediction = denoiser.step(x, t, context)     every step
    denoiser(x, t, condition)                     the same in one pass: what training calls
    denoiser.null(n)                              n times the condition that stands for no condition

Guidance is a function that returns a `Predict`; sampling takes one. The scheduler's `prediction_type` names what is
predicted: noise, clean sample or velocity. A model that has learned the variance of the reverse process predicts
twice the channels: `split_variance` separates the two halves, and `predict_x0` reads the first.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from t2i.diffusion.condition import Condition

Predict = Callable[[Tensor, Tensor], Tensor]  # x: (B, ...), t: () -> the model's prediction, like x
PredictTransform = Callable[[Predict], Predict]
# Names of settings in configurations of before 2026-12: what was saved then still loads
OLD_SETTINGS = {"usual_guidance": "default_guidance_scale"}
StepCallback = Callable[[int, Tensor, Tensor], Tensor]  # step, t, x -> x; see `t2i.diffusion.sampling_loop.Sampling`


class Denoiser(Protocol):
    dtype: torch.dtype

    def __call__(self, x: Tensor, t: Tensor, condition: Any) -> Tensor: ...
    def prepare(self, condition: Any) -> Any: ...
    def step(self, x: Tensor, t: Tensor, context: Any) -> Tensor: ...
    def null(self, count: int) -> Any: ...


class StoredDefaults:
    """The sampling defaults of a model whose configuration stores them: a model may need few steps or no guidance."""

    config: Any

    @property
    def default_steps(self) -> int:
        """The denoising steps where none are given."""
        return self.config.default_steps

    @property
    def default_guidance_scale(self) -> float:
        """The guidance scale where none is given; 1 is off."""
        return self.config.default_guidance_scale

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return what diffusers' method does, also of a configuration with an older name of a setting."""
        renamed = {OLD_SETTINGS.get(name, name): value for name, value in config_dict.items()}
        return super().extract_init_dict(renamed, **kwargs)  # type: ignore[misc]


class PriorMixin:
    """Defaults of what pipelines read of a prior; a prior overrides what differs.

    needs_scheduler: z_i is denoised, by `t2i.sampling.sample.sample_prior`; other priors return it by themselves.
    prepares_timesteps: `prepare` also takes the timesteps of the sampling, (S,), and computes their tokens ahead.
    takes_noise, takes_temperature, takes_guidance: options that have an effect. control_factor: as of a decoder.
    """

    needs_scheduler = True
    prepares_timesteps = False
    takes_noise, takes_temperature, takes_guidance = True, False, True
    control_factor: int | None = None

    def count_steps(self, steps: int) -> int:
        """Return the number of steps that it takes where `steps` are asked for."""
        return steps

    @property
    def default_steps(self) -> int:
        """The denoising steps where none are given."""
        return 25

    @property
    def default_guidance_scale(self) -> float:
        """The guidance scale where none is given; 1 is off."""
        return 1.0

    @property
    def states_width(self) -> int | None:
        """Dimensions of the token states of CLIP that it reads; None if any, or if that is not known."""
        return None


class DecoderMixin:
    """Defaults of what pipelines read of a decoder; a decoder overrides what differs.

    control_factor: pixels of the control image that it reads, along a side of a latent; None if it reads none.
    """

    needs_scheduler = True
    control_factor: int | None = None

    @property
    def default_steps(self) -> int:
        """The denoising steps where none are given."""
        return 25

    @property
    def default_guidance_scale(self) -> float:
        """The guidance scale where none is given; 1 is off."""
        return 1.5

    @property
    def states_width(self) -> int | None:
        """Dimensions of the token states of CLIP that it reads; None if any, or if that is not known."""
        return None

    @property
    def latent_multiple(self) -> int:
        """The number that the sides of the latents must be a multiple of."""
        return 1

    @property
    def noise_levels(self) -> int | None:
        """Number of levels that `noise_image_embeds` takes, from 0 on; None if it does not noise z_i."""
        return None

    def noise_image_embeds(self, z_i: Tensor, noise: Tensor | None = None, level: int | Tensor = 0) -> Tensor:
        """Return the embedding of an ImageCondition for z_i, (B, D): z_i itself, unless the decoder noises it."""
        return z_i


def build_conditional_predict(denoiser: Denoiser, condition: Condition, timesteps: Tensor | None = None) -> Predict:
    """Return the model's own prediction. timesteps: (S,), for denoisers that prepare them too."""
    context = prepare_context(denoiser, condition, timesteps)
    dtype = denoiser.dtype  # read once: diffusers searches all modules for it
    return lambda x, t: denoiser.step(x.to(dtype), t.expand(len(x)), context).to(x.dtype)


def prepare_context(denoiser: Any, condition: Condition, timesteps: Tensor | None) -> Any:
    """Return the context of a condition, with the timesteps prepared if they are given."""
    return denoiser.prepare(condition) if timesteps is None else denoiser.prepare(condition, timesteps)
