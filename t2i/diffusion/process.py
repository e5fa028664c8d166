"""Alpha, sigma, posterior; clean sample <-> prediction."""

import math
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from t2i.checks import check_choice, check_integer
from t2i.config import build_or_explain
from t2i.errors import InputError


def build_noise_scheduler(arguments: dict[str, Any]) -> DDIMScheduler:
    """The schedule of the noise, by its configuration. Raises InputError for one that cannot be trained with."""
    check_integer("scheduler.num_train_timesteps", arguments.get("num_train_timesteps", 1000), 1, 100_000)
    scheduler = build_or_explain(DDIMScheduler, "scheduler", arguments)
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


def compute_prediction_target(scheduler: SchedulerMixin, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Compute the target of a prediction for x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise."""
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x
        case "v_prediction":  # sqrt(abar_t) noise - sqrt(1 - abar_t) x
            return scheduler.get_velocity(x, noise, t)
        case other:
            raise ValueError(f"unknown prediction_type {other!r}; use 'epsilon', 'sample' or 'v_prediction'")


def alpha_sigma(scheduler: SchedulerMixin, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), the shares of sample and noise in an x_t like `like`; t: () or (B,).

    A time below 0 is the clean sample, as diffusers' schedulers count. Times between the trained ones are interpolated
    in the logarithm of the signal-to-noise ratio.
    """
    at = alpha_bar(scheduler, t, like)
    return at.sqrt().to(like.dtype), (1 - at).sqrt().to(like.dtype)


def alpha_bar(scheduler: SchedulerMixin, t: Tensor, like: Tensor) -> Tensor:
    """abar_t as `alpha_sigma` takes it, fp64: () or (B, 1, ...)."""
    abar = scheduler.alphas_cumprod.to(like.device, torch.float64)
    t = torch.as_tensor(t, device=like.device)
    if t.is_floating_point() and not (t == t.round()).all():
        low = t.floor().long().clamp(0, len(abar) - 1)
        high, share = (low + 1).clamp(max=len(abar) - 1), (t - low).clamp(min=0)
        at = torch.sigmoid(torch.lerp(torch.logit(abar[low]), torch.logit(abar[high]), share.double()))
    else:
        at = abar[t.long().clamp(0, len(abar) - 1)]
    at = torch.where(t < 0, 1.0, at)
    return at.view(-1, *[1] * (like.ndim - 1)) if at.ndim else at


def split_variance(prediction: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a prediction into that of the mean, like x, and that of the variance: None without a learned variance."""
    if prediction.shape[1] == x.shape[1]:
        return prediction, None
    mean, share = prediction.chunk(2, dim=1)
    return mean, share


def join_variance(mean: Tensor, prediction: Tensor) -> Tensor:
    """A prediction with another mean: what changes the mean alone, as guidance does, returns this."""
    _, share = split_variance(prediction, mean)
    return mean if share is None else torch.cat([mean, share], dim=1)


def posterior_mean_variance(
    scheduler: SchedulerMixin, sample: Tensor, x: Tensor, t: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor]:
    """q(x_s | x_t, x_0) for any s = `previous` < t: its mean, like x, and its variance, () or (B, 1, ...).

    Ho et al. 2020, eq. 6 and 7, for neighbours s = t - 1. Below 0, s is the clean sample: no variance is left.
    """
    of_x, of_sample, variance, _ = posterior_coefficients(scheduler, t, previous, x)
    return of_x.to(x.dtype) * x + of_sample.to(x.dtype) * sample, variance.to(x.dtype)


def posterior_coefficients(
    scheduler: SchedulerMixin, t: Tensor, previous: Tensor, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of x_t and x_0 in the mean of q(x_s | x_t, x_0), its variance, and that of q(x_t | x_s).

    All fp64, () or (B, 1, ...). The two variances bound that of the reverse step, for data of unit variance.
    """
    now, before = alpha_bar(scheduler, t, like), alpha_bar(scheduler, previous, like)
    step, left = now / before, (1 - before) / (1 - now)
    return step.sqrt() * left, before.sqrt() * (1 - step) / (1 - now), (1 - step) * left, 1 - step


def reverse_log_variance(scheduler: SchedulerMixin, share: Tensor, t: Tensor, previous: Tensor) -> Tensor:
    """log Sigma of a learned reverse step (Nichol and Dhariwal 2021, eq. 15), like `share`, which the model predicts.

    From the posterior's at -1 to that of the forward step at 1, in the logarithm.
    """
    _, _, small, large = posterior_coefficients(scheduler, t, previous, share)
    # The last step has a posterior without variance; it borrows that of the step before, as the paper's code does.
    first, second = torch.zeros_like(t), torch.ones_like(t)
    small = torch.where(small > 0, small, posterior_coefficients(scheduler, second, first, share)[2])
    low, high = small.log().to(share.dtype), large.log().to(share.dtype)
    return low + (share + 1) / 2 * (high - low)


def variational_term(
    scheduler: SchedulerMixin, error: Tensor, log_variance: Tensor, t: Tensor, previous: Tensor
) -> Tensor:
    """A term of the variational bound for each dimension, in nats, like `error`.

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)) (Ho et al. 2020, eq. 5); where s = `previous` is the clean sample, below 0,
    -log of the density p(x_0 | x_t). error: x_0 minus what the model takes for it. log_variance: of p, to be broadcast.
    """
    _, of_sample, variance, _ = posterior_coefficients(scheduler, t, previous, error)
    scaled = (of_sample.to(error.dtype) * error).square() * (-log_variance).exp()
    density = (scaled + log_variance + math.log(2 * math.pi)) / 2
    before = torch.as_tensor(previous, device=error.device).view(-1, *[1] * (error.ndim - 1)) < 0
    log_true = torch.where(variance > 0, variance, 1.0).log().to(error.dtype)
    divergence = (scaled + log_variance - log_true + (log_true - log_variance).exp() - 1) / 2
    return torch.where(before, density, divergence)


def predict_x0(scheduler: SchedulerMixin, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The clean sample that a prediction at x_t stands for, like x. Where all is noise, epsilon says nothing of it."""
    prediction, _ = split_variance(prediction, x)
    alpha, sigma = alpha_sigma(scheduler, t, x)
    match scheduler.config.prediction_type:
        case "sample":
            return prediction
        case "epsilon":
            return (x - sigma * prediction) / alpha
        case _:  # velocity
            return alpha * x - sigma * prediction


def x0_to_prediction(scheduler: SchedulerMixin, sample: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The prediction that says that x_t comes from this clean sample: the reverse of `predict_x0`."""
    alpha, sigma = alpha_sigma(scheduler, t, x)
    match scheduler.config.prediction_type:
        case "sample":
            return sample
        case "epsilon":
            return (x - alpha * sample) / sigma
        case _:  # velocity
            return (alpha * x - sample) / sigma
