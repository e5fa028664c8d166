"""Guidance: functions that return a `Predict` which goes further than the model's own.

Classifier-free guidance extrapolates from a negative condition to the positive one; steering adds the gradient of a
score. Both work on the clean sample that a prediction stands for, so that it does not matter what the model predicts. A
learned variance stays that of the positive condition.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from t2i.checks import check_range
from t2i.diffusion.condition import Condition
from t2i.diffusion.denoiser import Denoiser, Predict, build_conditional_predict, prepare_context
from t2i.diffusion.process import MIN_ALPHA, alpha_sigma, join_variance, predict_x0, split_variance, x0_to_prediction
from t2i.errors import InputError
from t2i.runtime.hooks import keep_used_weights

MAX_GUIDANCE_SCALE = 1000

ScoreFunction = Callable[[Tensor, Tensor], Tensor]  # x: (B, ...), t: () -> (B,), such as log p(class | x)


@dataclass(frozen=True)
class Guidance:
    """Scale of classifier-free guidance, and settings against its side effects.

    scale: w in negative + w (positive - negative); 1 is off. Papers that write (1 + w) cond - w uncond mean w + 1 here.
    interval: guided part of the training timesteps, as fractions: 0 is no noise, 1 is pure noise. Outside, the model is
        not guided, which costs half (Kynkaanniemi et al. 2024).
    rescale: fraction of the way back to the standard deviation of the unguided prediction (Lin et al. 2023, sec. 3.4).
    threshold: dynamic thresholding (Saharia et al. 2022, section 2.3): a guided clean sample is cut at this quantile of
        its absolute values, and shrunk until the quantile is that of the unguided sample; 1 is off. Pixels would be
        bounded by 1 instead; latents have no such bound.
    parallel, norm, momentum: adaptive projected guidance (Sadat et al. 2024): factor of the part of the difference that
        is parallel to the positive sample and saturates colours (1 keeps it), largest root mean square of the
        difference (None: any), and momentum of its average over the steps (negative in the paper; 0 is off).
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    threshold: float = 1.0
    parallel: float = 1.0
    norm: float | None = None
    momentum: float = 0.0

    @classmethod
    def from_value(cls, value: "float | Guidance") -> "Guidance":
        """Return a Guidance for a scale alone; a Guidance is returned as it is."""
        return value if isinstance(value, Guidance) else cls(value)

    @property
    def is_off(self) -> bool:
        return self.scale == 1

    @property
    def is_projected(self) -> bool:
        return self.parallel != 1 or self.norm is not None or self.momentum != 0


GUIDANCE_RANGES = {
    "rescale": (0, 1),
    "threshold": (0.5, 1),
    "parallel": (-10, 10),
    "norm": (0, 1e6),
    "momentum": (-0.99, 0.99),
}


def parse_guidance_value(name: str, value: Any) -> Guidance:
    """Return a scale or a Guidance as a Guidance. Raises InputError, under `name`, for values out of range."""
    guidance = Guidance.from_value(value)
    check_range(name, guidance.scale, 0, MAX_GUIDANCE_SCALE)
    for key, (low, high) in GUIDANCE_RANGES.items():
        if key != "norm" or guidance.norm is not None:
            check_range(f"{name}.{key}", getattr(guidance, key), low, high)
    if not isinstance(guidance.interval, list | tuple) or len(guidance.interval) != 2:
        raise InputError(f"{name}.interval must be two numbers, low and high, got {guidance.interval!r:.80}")
    for end in guidance.interval:
        check_range(f"{name}.interval", end, 0, 1)
    low, high = guidance.interval
    if low >= high:
        raise InputError(f"{name}.interval must rise, got {low:g} to {high:g}; give the lower number first")
    return guidance


def parse_guidance(name: str, scale: float, settings: list[str]) -> Guidance:
    """Parse `key=value` texts, such as `interval=LOW:HIGH`, into a Guidance. Raises InputError for other keys."""
    known = [field.name for field in fields(Guidance) if field.name != "scale"]
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in known or not equals:
            raise InputError(f"{name} takes KEY=VALUE with a key of {', '.join(known)}; got {setting!r}")
        try:
            numbers = tuple(float(part) for part in value.split(":"))
        except ValueError:
            raise InputError(f"{name} {key} must be a number (interval: LOW:HIGH), got {value!r}") from None
        if len(numbers) != (2 if key == "interval" else 1):
            raise InputError(f"{name} {key} must be a number (interval: LOW:HIGH), got {value!r}")
        values[key] = numbers if key == "interval" else numbers[0]
    return parse_guidance_value(name, Guidance(scale, **values))


def build_guided_predict(
    denoiser: Denoiser,
    condition: Condition,
    negative: Condition,
    guidance: float | Guidance,
    scheduler: SchedulerMixin,
    timesteps: Tensor | None = None,
) -> Predict:
    """Return the prediction with classifier-free guidance (Ho and Salimans 2022): both conditions in one batch.

    negative: the model's null, or any other condition to move away from. timesteps: (S,), for denoisers that prepare
    them too. The result has a state if `momentum` is used: build a new one for every sampling.
    """
    guidance = Guidance.from_value(guidance)
    if guidance.is_off:
        return build_conditional_predict(denoiser, condition, timesteps)
    # Prepare both conditions once, and the positive one alone for steps outside of the interval
    context, dtype = prepare_context(denoiser, negative.cat(condition), timesteps), denoiser.dtype
    outside = None if guidance.interval == (0, 1) else build_conditional_predict(denoiser, condition, timesteps)
    # Fractions of the training timesteps become timesteps
    low, high = (end * scheduler.config.num_train_timesteps for end in guidance.interval)
    combine = ProjectedGuidance(guidance) if guidance.is_projected else None

    def predict(x: Tensor, t: Tensor) -> Tensor:
        """Return the guided prediction, like x, with the variance of the positive condition if one is learned."""
        if outside is not None and not low <= t <= high:
            return outside(x, t)
        # Negative first: `context` has the rows in this order
        twice = torch.cat([x, x]).to(dtype)
        both = denoiser.step(twice, t.expand(2 * len(x)), context).to(x.dtype).chunk(2)
        (negative_prediction, _), (positive_prediction, _) = (split_variance(prediction, x) for prediction in both)
        if combine is None:
            # Linear in the prediction, so that it is the same for noise, clean sample and velocity
            prediction = negative_prediction.lerp(positive_prediction, guidance.scale)
        else:
            # Projections and norms are those of clean samples
            ends = (negative_prediction, positive_prediction)
            negative_x0, positive_x0 = (predict_x0(scheduler, end, x, t) for end in ends)
            prediction = x0_to_prediction(scheduler, combine(negative_x0, positive_x0), x, t)
        if guidance.rescale:
            prediction = rescale_std(prediction, positive_prediction, guidance.rescale)
        if guidance.threshold < 1:
            guided, unguided = (predict_x0(scheduler, end, x, t) for end in (prediction, positive_prediction))
            prediction = x0_to_prediction(scheduler, threshold_x0(guided, unguided, guidance.threshold), x, t)
        # The variance is that of the positive condition
        return join_variance(prediction, both[1])

    return predict


class ProjectedGuidance:
    """Adaptive projected guidance of one sampling, with its running average of the differences."""

    def __init__(self, guidance: Guidance):
        self.guidance = guidance
        self.average_difference: Tensor | float = 0.0

    def __call__(self, negative: Tensor, positive: Tensor) -> Tensor:
        """Return the guided clean sample from those of both conditions, (B, ...): Sadat et al. 2024, algorithm 1."""
        guidance = self.guidance
        self.average_difference = difference = positive - negative + guidance.momentum * self.average_difference
        if guidance.norm is not None:
            size = difference.flatten(1).square().mean(dim=1).sqrt()
            difference = difference * broadcast_like(difference, (guidance.norm / size.clamp(min=1e-12)).clamp(max=1))
        # Split the difference into the parts along the positive sample and across it
        direction = torch.nn.functional.normalize(positive.flatten(1), dim=1).view_as(positive)
        parallel = direction * broadcast_like(positive, (difference * direction).flatten(1).sum(dim=1))
        return positive + (guidance.scale - 1) * (difference - parallel + guidance.parallel * parallel)


def rescale_std(prediction: Tensor, unguided: Tensor, fraction: float) -> Tensor:
    """Rescale a guided prediction towards the standard deviation of each sample's unguided one."""
    ratio = unguided.flatten(1).std(dim=1) / prediction.flatten(1).std(dim=1).clamp(min=1e-12)
    return prediction * broadcast_like(prediction, fraction * ratio + 1 - fraction)


def threshold_x0(x0: Tensor, unguided: Tensor, quantile: float) -> Tensor:
    """Cut a clean sample at its own quantile, and shrink it to the quantile of the unguided one, if that is smaller."""
    bound, limit = (end.abs().flatten(1).quantile(quantile, dim=1) for end in (x0, unguided))
    bound, limit = broadcast_like(x0, bound.clamp(min=1e-12)), broadcast_like(x0, limit)
    return torch.where(bound > limit, x0.clamp(-bound, bound) * (limit / bound), x0)


def broadcast_like(x: Tensor, value: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ...), to be broadcast over x."""
    return value.view(-1, *[1] * (x.ndim - 1))


def build_steered_predict(
    predict: Predict, scheduler: SchedulerMixin, score: ScoreFunction, scale: float, of_x0: bool = False
) -> Predict:
    """Add the gradient of a score: classifier guidance (Dhariwal and Nichol 2021, algorithm 2), for any prediction.

    With scale 1 and the score log p(y | x_t) of an exact classifier this samples p(x | y).

    of_x0: apply the score to the model's estimate of the clean sample instead of x_t. The gradient then runs through
    the model, which costs more, but allows every differentiable score of clean samples.
    """
    if scale == 0:
        return predict

    def predict_steered(x: Tensor, t: Tensor) -> Tensor:
        """Return the prediction whose clean samples are moved along the gradient of the score."""
        with torch.enable_grad(), keep_used_weights():
            leaf = x.detach().requires_grad_()
            if of_x0:
                prediction = predict(leaf, t)
                scored = predict_x0(scheduler, prediction, leaf, t)
            else:
                prediction, scored = predict(x, t), leaf
            # The sum's gradient is each sample's own, for no score reads another sample
            (gradient,) = torch.autograd.grad(score(scored, t).sum(), leaf)
        prediction = prediction.detach()
        alpha, sigma = alpha_sigma(scheduler, t, x)
        # Algorithm 2 moves the noise by -sigma gradient, which moves the clean sample by sigma^2 / alpha gradient
        moved = predict_x0(scheduler, prediction, x, t) + scale * sigma.square() / alpha.clamp(min=MIN_ALPHA) * gradient
        return join_variance(x0_to_prediction(scheduler, moved, x, t), prediction)

    return predict_steered
