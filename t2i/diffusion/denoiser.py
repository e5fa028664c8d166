"""Training and sampling, the same for every denoiser.

A denoiser is a module with

    context    = denoiser.prepare(condition)      all that depends on neither x nor t, once per picture
    prediction = denoiser.step(x, t, context)     every step
    denoiser(x, t, condition)                     the same in one pass: what training calls
    denoiser.null(n)                              n conditions that say nothing

Guidance is a function that returns a `Predict`; sampling takes one. What the prediction is of (noise, clean sample or
velocity) is the scheduler's `prediction_type`. A model that has learned the variance of the reverse process predicts
twice the channels: `split_variance` tells the two halves apart, and `clean` reads the first.
"""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, Protocol

import torch
from diffusers import PNDMScheduler, SchedulerMixin
from torch import Generator, Tensor

from t2i.checks import check_range
from t2i.diffusion.condition import Condition
from t2i.diffusion.process import split_variance
from t2i.errors import InputError

Predict = Callable[[Tensor, Tensor], Tensor]  # x: (B, ...), t: () -> the model's prediction, like x


class Denoiser(Protocol):
    dtype: torch.dtype

    def __call__(self, x: Tensor, t: Tensor, condition: Any) -> Tensor: ...
    def prepare(self, condition: Any, *ahead: Tensor) -> Any: ...
    def step(self, x: Tensor, t: Tensor, context: Any) -> Tensor: ...
    def null(self, count: int) -> Any: ...


def build_conditional_predict(denoiser: Denoiser, condition: Condition, *ahead: Tensor) -> Predict:
    """The model's own prediction. ahead: what else it prepares, such as the timesteps that it will be asked for."""
    context, dtype = denoiser.prepare(condition, *ahead), denoiser.dtype  # which diffusers looks for in all modules
    return lambda x, t: denoiser.step(x.to(dtype), t.expand(len(x)), context).to(x.dtype)


@torch.no_grad()
def sample_from_noise(
    predict: Predict,
    scheduler: SchedulerMixin,
    noise: Tensor,
    steps: int,
    generators: list[Generator] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    eta: float | None = None,
    original: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Denoise from `noise`, (B, ...) of unit variance, to a sample, step by step, in the noise's dtype.

    generators: one a sample, for schedulers that add noise. on_step(i, t, x) runs after each step and may change x.
    eta: how much of the noise of ancestral sampling DDIM adds, for schedulers that take it; None leaves it to them.
    original, like noise: start from it instead, noised as far as the last `strength` of the steps, in (0, 1], undo.
    """
    check_eta(scheduler, eta)
    scheduler.set_timesteps(steps, device=noise.device)
    accepted = signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": generators} if "generator" in accepted else {}
    if eta is not None:
        extra["eta"] = eta
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    x, timesteps = initialize_sampling(scheduler, noise, steps, original, strength)
    for i, t in enumerate(progress(timesteps)):
        prediction = predict(scheduler.scale_model_input(x, t), t)
        if not learned:
            prediction, _ = split_variance(prediction, x)
        x = scheduler.step(prediction, t, x, **extra).prev_sample
        if on_step is not None:
            x = on_step(i, t, x)
    return x


def initialize_sampling(
    scheduler: SchedulerMixin, noise: Tensor, steps: int, original: Tensor | None, strength: float
) -> tuple[Tensor, Tensor]:
    """What sampling starts from, and the timesteps that are left: all, or the last `strength` of them."""
    # diffusers' trailing timesteps end, for some numbers of steps, with one too many: -1, where there is no noise.
    timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
    if original is None:
        return noise * scheduler.init_noise_sigma, timesteps
    check_range("strength", strength, 0, 1)
    first = (steps - count_steps_left(steps, strength)) * getattr(scheduler, "order", 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps = timesteps[first:]
    if isinstance(scheduler, PNDMScheduler) and scheduler.config.skip_prk_steps:
        # Its first step is a step of Heun's method, which asks at the second of the timesteps once more.
        left = scheduler.timesteps.unique_consecutive()[first:]
        scheduler.timesteps = timesteps = torch.cat([left[:2], left[1:]])
    return scheduler.add_noise(original.to(noise), noise, timesteps[:1].expand(len(noise))), timesteps


def count_steps_left(steps: int, strength: float) -> int:
    """How many of the steps are taken: the last `strength` of them, and one at least."""
    return max(1, min(round(steps * strength), steps))


def check_eta(scheduler: SchedulerMixin, eta: float | None) -> None:
    if eta is None:
        return
    check_range("eta", eta, 0, 1)
    if "eta" not in signature(scheduler.step).parameters:
        raise InputError(f"eta is of the sampler ddim; {type(scheduler).__name__} does not take it, got eta={eta:g}")


def generate_noise(shape: tuple[int, ...], generators: list[Generator], device: torch.device) -> Tensor:
    """(len(generators), *shape), fp32: every sample's noise from its own generator, so that no batch changes it."""
    return torch.stack([torch.randn(shape, generator=one, device=one.device).to(device) for one in generators])


MAX_STEPS = 1000

PredictTransform = Callable[[Predict], Predict]
StepCallback = Callable[[int, Tensor, Tensor], Tensor]  # step, t, x -> x; see `sample_from_noise`
