"""Training and sampling, the same for every denoiser.

A denoiser is a module with

    context    = denoiser.prepare(condition)      all that depends on neither x nor t, once per picture
    prediction = denoiser.step(x, t, context)     every step
    denoiser(x, t, condition)                     the same in one pass: what training calls
    denoiser.null(n)                              n conditions that say nothing

Guidance is a function that returns a `Predict`; sampling takes one. What the prediction is of (noise, clean sample or
velocity) is the scheduler's `prediction_type`.
"""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Generator, Tensor

from t2i.condition import Condition
from t2i.config import build, check_choice, check_integer
from t2i.errors import InputError

WEIGHTINGS = ("none", "min_snr")

Predict = Callable[[Tensor, Tensor], Tensor]  # x: (B, ...), t: () -> the model's prediction, like x


class Denoiser(Protocol):
    dtype: torch.dtype

    def __call__(self, x: Tensor, t: Tensor, condition: Any) -> Tensor: ...
    def prepare(self, condition: Any) -> Any: ...
    def step(self, x: Tensor, t: Tensor, context: Any) -> Tensor: ...
    def null(self, count: int) -> Any: ...


def noise_scheduler(arguments: dict[str, Any]) -> DDIMScheduler:
    """The schedule of the noise, by its configuration. Raises InputError for one that cannot be trained with."""
    check_integer("scheduler.num_train_timesteps", arguments.get("num_train_timesteps", 1000), 1, 100_000)
    scheduler = build(DDIMScheduler, "scheduler", arguments)
    abar = scheduler.alphas_cumprod
    falls = (abar.diff() <= 0).all()
    if not (abar.isfinite().all() and abar.min() >= 0 and abar.max() <= 1 and falls):
        raise InputError(
            f"scheduler does not turn pictures into noise: their share goes from {abar[0]:g} to {abar[-1]:g}; it must "
            "fall within 1 and 0, see its beta_start, beta_end and trained_betas"
        )
    kind = scheduler.config.prediction_type
    check_choice("scheduler.prediction_type", kind, ("sample", "v_prediction", "epsilon"))
    if abar[-1] == 0 and kind == "epsilon":  # pure noise says nothing of the clean sample
        raise InputError(
            "a schedule that ends in pure noise, as with scheduler.rescale_betas_zero_snr, needs "
            "scheduler.prediction_type sample or v_prediction, got epsilon"
        )
    return scheduler


def check_weighting(scheduler: SchedulerMixin, weighting: str) -> None:
    """Refuse to leave untrained the step that sampling starts with."""
    check_choice("loss_weighting", weighting, WEIGHTINGS)
    if weighting == "min_snr" and scheduler.alphas_cumprod[-1] == 0:
        raise InputError(
            "loss_weighting=min_snr gives no weight to pure noise, where scheduler.rescale_betas_zero_snr ends and "
            "sampling starts; leave one of the two"
        )


def denoise(
    model: Callable[..., Tensor], scheduler: SchedulerMixin, x: Tensor, condition: Condition, shift: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise clean `x` by random amounts and let the model undo it: its prediction and the target, fp32; t, (B,).

    shift > 1 draws high noise more often (t -> shift t / (1 + (shift - 1) t) for uniform t in [0, 1]); 1 is uniform.
    """
    x = x.float()
    noise = torch.randn_like(x)
    uniform = torch.rand(len(x), device=x.device)
    steps = scheduler.config.num_train_timesteps
    t = (shift * uniform / (1 + (shift - 1) * uniform) * steps).long().clamp(max=steps - 1)
    prediction = model(scheduler.add_noise(x, noise, t), t, condition)
    return prediction.float(), target(scheduler, x, noise, t), t


def target(scheduler: SchedulerMixin, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the model is to predict, of x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise."""
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x
        case "v_prediction":  # sqrt(abar_t) noise - sqrt(1 - abar_t) x
            return scheduler.get_velocity(x, noise, t)
        case other:
            raise ValueError(f"unknown prediction_type {other!r}; use 'epsilon', 'sample' or 'v_prediction'")


def levels(scheduler: SchedulerMixin, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), the shares of sample and noise in an x_t like `like`; t: () or (B,).

    A time below 0 is the clean sample, as diffusers' schedulers count. Times between the trained ones are interpolated
    in the logarithm of the signal-to-noise ratio.
    """
    abar = scheduler.alphas_cumprod.to(like.device, torch.float64)
    t = torch.as_tensor(t, device=like.device)
    if t.is_floating_point() and not (t == t.round()).all():
        low = t.floor().long().clamp(0, len(abar) - 1)
        high, share = (low + 1).clamp(max=len(abar) - 1), (t - low).clamp(min=0)
        at = torch.sigmoid(torch.lerp(torch.logit(abar[low]), torch.logit(abar[high]), share.double()))
    else:
        at = torch.where(t < 0, 1.0, abar[t.long().clamp(0, len(abar) - 1)])
    at = at.view(-1, *[1] * (like.ndim - 1)) if at.ndim else at
    return at.sqrt().to(like.dtype), (1 - at).sqrt().to(like.dtype)


def clean(scheduler: SchedulerMixin, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The clean sample that a prediction at x_t stands for, like x. Where all is noise, epsilon says nothing of it."""
    alpha, sigma = levels(scheduler, t, x)
    match scheduler.config.prediction_type:
        case "sample":
            return prediction
        case "epsilon":
            return (x - sigma * prediction) / alpha
        case _:  # velocity
            return alpha * x - sigma * prediction


def said(scheduler: SchedulerMixin, sample: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The prediction that says that x_t comes from this clean sample: the reverse of `clean`."""
    alpha, sigma = levels(scheduler, t, x)
    match scheduler.config.prediction_type:
        case "sample":
            return sample
        case "epsilon":
            return (x - alpha * sample) / sigma
        case _:  # velocity
            return (alpha * x - sample) / sigma


def loss_weight(scheduler: SchedulerMixin, t: Tensor, weighting: str, gamma: float) -> Tensor:
    """(B,) timesteps -> (B,), fp32: how much the squared error of each sample counts.

    "none": all the same. "min_snr" (Hang et al. 2023): an error in the clean sample counts min(SNR, gamma) with
    SNR = abar / (1 - abar), so that the many steps of low noise do not outvote the rest; divided by SNR for noise and
    by SNR + 1 for velocity, whose errors are those of the clean sample in other units.
    """
    if weighting == "none":
        return torch.ones(len(t), device=t.device)
    abar = scheduler.alphas_cumprod.to(t.device)[t]
    snr = abar / (1 - abar)
    match scheduler.config.prediction_type:
        case "epsilon":
            return snr.clamp(max=gamma) / snr
        case "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        case _:
            return snr.clamp(max=gamma)


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """(B, ...), (B, ...), (B,) -> the mean over samples of weight times mean squared error."""
    return (weight * (prediction - target).square().flatten(1).mean(dim=1)).mean()


def drop(condition: Condition, null: Condition, probability: float) -> Condition:
    """Each condition replaced by the one that says nothing, with this probability: what makes guidance possible."""
    device = next(value.device for value in vars(condition).values() if isinstance(value, Tensor))
    return condition.where(torch.rand(len(condition), device=device) >= probability, null)


def conditional(denoiser: Denoiser, condition: Condition) -> Predict:
    """The model's own prediction."""
    context = denoiser.prepare(condition)
    return lambda x, t: denoiser.step(x.to(denoiser.dtype), t.expand(len(x)), context).to(x.dtype)


@torch.no_grad()
def sample(
    predict: Predict,
    scheduler: SchedulerMixin,
    noise: Tensor,
    steps: int,
    generators: list[Generator] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Denoise from `noise`, (B, ...) of unit variance, to a sample, step by step, in the noise's dtype.

    generators: one a sample, for schedulers that add noise. on_step(i, t, x) runs after each step and may change x.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    accepted = signature(scheduler.step).parameters
    extra = {"generator": generators} if "generator" in accepted else {}
    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(progress(scheduler.timesteps)):
        prediction = predict(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(prediction, t, x, **extra).prev_sample
        if on_step is not None:
            x = on_step(i, t, x)
    return x


def draw_noise(shape: tuple[int, ...], generators: list[Generator], device: torch.device) -> Tensor:
    """(len(generators), *shape), fp32: every sample's noise from its own generator, so that no batch changes it."""
    return torch.stack([torch.randn(shape, generator=one, device=one.device).to(device) for one in generators])
