"""The diffusion process: noise levels, the posterior, and what predictions stand for (Ho et al. 2020).

All processes are x_t = alpha x0 + sigma noise: variance-preserving ones, where alpha^2 + sigma^2 = 1, and rectified
flow (`t2i.diffusion.flow`), where alpha + sigma = 1.
"""

import math
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from t2i.checks import check_choice, check_integer
from t2i.config import build_or_explain
from t2i.diffusion.flow import FLOW_PREDICTION, build_flow_scheduler, get_prediction_type, is_flow
from t2i.errors import InputError

MIN_ALPHA = 0.02  # nearer to pure noise, quotients by alpha mean nothing and may overflow


def build_noise_scheduler(arguments: dict[str, Any]) -> SchedulerMixin:
    """Build a noise schedule from its configuration. An argument that is None counts as left out.

    It is a FlowMatchEulerDiscreteScheduler for the `prediction_type` flow_prediction, and a DDIMScheduler for others.
    Raises InputError for a schedule that cannot be trained with.
    """
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if arguments.get("prediction_type") == FLOW_PREDICTION:
        return build_flow_scheduler(arguments)
    check_integer("scheduler.num_train_timesteps", arguments.get("num_train_timesteps", 1000), 1, 100_000)
    scheduler = build_or_explain(DDIMScheduler, "scheduler", arguments)
    # diffusers takes any betas, also such as add no noise
    abar = scheduler.alphas_cumprod
    falls = (abar.diff() <= 0).all()
    if not (abar.isfinite().all() and abar.min() >= 0 and abar.max() <= 1 and falls):
        raise InputError(
            f"scheduler does not turn images into noise: alpha_bar goes from {abar[0]:g} to {abar[-1]:g}; it must fall "
            "and stay between 1 and 0, see its beta_start, beta_end and trained_betas"
        )
    kind = scheduler.config.prediction_type
    check_choice("scheduler.prediction_type", kind, ("sample", "v_prediction", "epsilon", FLOW_PREDICTION))
    if abar[-1] == 0 and kind == "epsilon":  # pure noise does not determine the clean sample
        raise InputError(
            "a schedule that ends in pure noise, as with scheduler.rescale_betas_zero_snr, needs "
            "scheduler.prediction_type sample or v_prediction, got epsilon"
        )
    return scheduler


def add_noise(scheduler: SchedulerMixin, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t as the model sees it in training, from clean x, (B, ...), and timesteps, (B,)."""
    if not is_flow(scheduler):
        return scheduler.add_noise(x, noise, t)
    alpha, sigma = alpha_sigma(scheduler, t, x)
    return alpha * x + sigma * noise


def compute_prediction_target(scheduler: SchedulerMixin, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the target of a prediction from x_t = alpha x + sigma noise."""
    match get_prediction_type(scheduler):
        case "epsilon":
            return noise
        case "sample":
            return x
        case "v_prediction":  # sqrt(abar_t) noise - sqrt(1 - abar_t) x
            return scheduler.get_velocity(x, noise, t)
        case "flow_prediction":
            return noise - x
        case other:
            raise ValueError(f"unknown prediction_type {other!r}; use 'epsilon', 'sample' or 'v_prediction'")


def alpha_sigma(scheduler: SchedulerMixin, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of sample and noise in an x_t like `like`, sqrt(abar_t) and sqrt(1 - abar_t); t: () or (B,).

    This is the x that a model sees: `own_alpha_sigma` returns the factors in the x that a scheduler steps. A timestep
    below 0 is the clean sample, as diffusers' schedulers count. Timesteps between the trained ones are interpolated in
    the logarithm of the signal-to-noise ratio, unless the scheduler is about to step from there by its own sigma. Those
    of a flow are 1 - sigma and sigma.
    """
    if is_flow(scheduler):
        sigma = flow_sigma(scheduler, t, like)
        return (1 - sigma).to(like.dtype), sigma.to(like.dtype)
    at = alpha_bar(scheduler, t, like)
    return at.sqrt().to(like.dtype), (1 - at).sqrt().to(like.dtype)


def flow_sigma(scheduler: SchedulerMixin, t: Tensor, like: Tensor) -> Tensor:
    """Return the sigma of a flow at timesteps, fp64: () or (B, 1, ...)."""
    t = torch.as_tensor(t, device=like.device)
    sigma = find_step_sigma(scheduler, t)  # some schedulers round their timesteps, but not their sigmas
    if sigma is None:
        sigma = t.double().clamp(min=0) / scheduler.config.num_train_timesteps
    return sigma.to(like.device).view(-1, *[1] * (like.ndim - 1)) if sigma.ndim else sigma.to(like.device)


def own_alpha_sigma(scheduler: SchedulerMixin, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of sample and noise in the x that a scheduler is about to step from timestep t, ().

    Those of `alpha_sigma` for most schedulers; 1 and sigma for those that scale x before the model sees it.
    """
    (alpha, sigma), scale = alpha_sigma(scheduler, t, like), get_input_scale(scheduler, t)
    return (alpha, sigma) if scale == 1 else (alpha / scale.to(alpha), sigma / scale.to(sigma))


def get_input_scale(scheduler: SchedulerMixin, t: Tensor) -> Tensor:
    """Return the factor of x in what the model sees, (), fp64, in the step from timestep t that comes next."""
    one = torch.ones((), dtype=torch.float64)
    return scale_input(scheduler, one, t)


def scale_input(scheduler: SchedulerMixin, x: Tensor, t: Tensor) -> Tensor:
    """Return what the model sees of the x that a scheduler steps; diffusers' FlowMatch schedulers have no scale."""
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def find_step_sigma(scheduler: SchedulerMixin, t: Tensor) -> Tensor | None:
    """Return sigma / alpha, or sigma of a flow, of the step from timestep t that comes next, (), fp64.

    Schedulers that step in sigmas round or interpolate timesteps, so that x is not exactly at the trained level of t.
    None: the scheduler has no sigmas, or t is not its next timestep.
    """
    # Before `set_timesteps` sigmas and timesteps may be in other orders
    if t.ndim or not hasattr(scheduler, "sigmas") or getattr(scheduler, "num_inference_steps", None) is None:
        return None
    timesteps = scheduler.timesteps
    steps = (timesteps == t.to(timesteps.device)).nonzero()[:, 0].tolist()
    following = scheduler.step_index
    if following is None:
        following = scheduler.begin_index or next(iter(steps), None)
    if following not in steps:
        return None
    # The scale is exact between two steps of a method of second order too, where `sigmas` is not
    scale = get_input_scale(scheduler, t)
    return scheduler.sigmas[following].double() if scale == 1 else (scale**-2 - 1).sqrt()


def alpha_bar(scheduler: SchedulerMixin, t: Tensor, like: Tensor) -> Tensor:
    """Return abar_t as `alpha_sigma` uses it, fp64: () or (B, 1, ...); for a flow that of the same alpha / sigma."""
    if is_flow(scheduler):
        sigma = flow_sigma(scheduler, t, like)
        return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    t = torch.as_tensor(t, device=like.device)
    if (step_sigma := find_step_sigma(scheduler, t)) is not None:
        return 1 / (1 + step_sigma.to(like.device) ** 2)
    abar = scheduler.alphas_cumprod.to(like.device, torch.float64)
    # sigmoid and logit are abar as a function of the log-SNR, and back
    if t.is_floating_point() and not (t == t.round()).all():
        low = t.floor().long().clamp(0, len(abar) - 1)
        high, fraction = (low + 1).clamp(max=len(abar) - 1), (t - low).clamp(min=0)
        at = torch.sigmoid(torch.lerp(torch.logit(abar[low]), torch.logit(abar[high]), fraction.double()))
    else:
        at = abar[t.long().clamp(0, len(abar) - 1)]
    at = torch.where(t < 0, 1.0, at)
    return at.view(-1, *[1] * (like.ndim - 1)) if at.ndim else at


def path_position(scheduler: SchedulerMixin, t: Tensor, like: Tensor) -> Tensor:
    """Return the place of x_t on its path, fp64, () or (B, 1, ...): phi of abar_t = cos^2 phi; sigma of a flow."""
    return flow_sigma(scheduler, t, like) if is_flow(scheduler) else alpha_bar(scheduler, t, like).sqrt().acos()


def path_velocity(scheduler: SchedulerMixin, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return the derivative of x_t, like x, by its `path_position`, for an estimate of the clean sample."""
    alpha, sigma = alpha_sigma(scheduler, t, x)
    return ((x if is_flow(scheduler) else alpha * x) - x0) / sigma


def path_turn(scheduler: SchedulerMixin, t: Tensor, other: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b in x_s = a x_t - b velocity, s = `other`, which is exact where sample and noise stay the same.

    The cosine and sine of the angle between both; for a flow, 1 and the difference of the sigmas.
    """
    (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma(scheduler, t, like), alpha_sigma(scheduler, other, like)
    sine = sigma * alpha_s - alpha * sigma_s
    return torch.ones_like(sine) if is_flow(scheduler) else alpha * alpha_s + sigma * sigma_s, sine


def preserve_variance(scheduler: SchedulerMixin, x: Tensor, t: Tensor) -> Tensor:
    """Return the x_t of a flow, scaled as that of a variance-preserving process; of the others x itself."""
    if not is_flow(scheduler):
        return x
    alpha, sigma = alpha_sigma(scheduler, t, x)
    return x / torch.hypot(alpha, sigma)


def find_lowest_timestep(scheduler: SchedulerMixin) -> int:
    """Return the lowest of the whole timesteps that have noise: 0; 1 for a flow, whose 0 is the clean sample."""
    return int(is_flow(scheduler))


def split_variance(prediction: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a prediction into that of the mean, like x, and that of the variance, None if the model learned none."""
    if prediction.shape[1] == x.shape[1]:
        return prediction, None
    mean, fraction = prediction.chunk(2, dim=1)
    return mean, fraction


def join_variance(mean: Tensor, prediction: Tensor) -> Tensor:
    """Join a changed mean, such as a guided one, with the variance of the prediction that it was made of."""
    _, fraction = split_variance(prediction, mean)
    return mean if fraction is None else torch.cat([mean, fraction], dim=1)


def posterior_mean_variance(
    scheduler: SchedulerMixin, x0: Tensor, x: Tensor, t: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean, like x, and variance, () or (B, 1, ...), of q(x_s | x_t, x0) for any s = `previous` < t.

    Ho et al. 2020, eq. 6 and 7, for neighbours s = t - 1. Below 0, s is the clean sample, and the variance is 0.
    """
    of_x, of_x0, variance, _ = posterior_coefficients(scheduler, t, previous, x)
    return of_x.to(x.dtype) * x + of_x0.to(x.dtype) * x0, variance.to(x.dtype)


def posterior_coefficients(
    scheduler: SchedulerMixin, t: Tensor, previous: Tensor, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the factors of x_t and x0 in the mean of q(x_s | x_t, x0), its variance, and that of q(x_t | x_s).

    All fp64, () or (B, 1, ...). The two variances bound that of the reverse step, for data of unit variance.
    """
    if is_flow(scheduler):
        sigma, sigma_s = flow_sigma(scheduler, t, like), flow_sigma(scheduler, previous, like)
        ratio = (1 - sigma) / (1 - sigma_s)
        forward, left = sigma**2 - (ratio * sigma_s) ** 2, (sigma_s / sigma) ** 2
        return ratio * left, (1 - sigma_s) * forward / sigma**2, forward * left, forward
    now, before = alpha_bar(scheduler, t, like), alpha_bar(scheduler, previous, like)
    # step: 1 - beta of the whole step from s to t. left: the part of x_t's noise that x_s has already
    step, left = now / before, (1 - before) / (1 - now)
    return step.sqrt() * left, before.sqrt() * (1 - step) / (1 - now), (1 - step) * left, 1 - step


def reverse_log_variance(scheduler: SchedulerMixin, fraction: Tensor, t: Tensor, previous: Tensor) -> Tensor:
    """Return log Sigma of a learned reverse step (Nichol and Dhariwal 2021, eq. 15), like `fraction`.

    fraction: output of the model, from -1, the posterior's variance, to 1, that of the forward step; in between the
    logarithm is interpolated.
    """
    _, _, small, large = posterior_coefficients(scheduler, t, previous, fraction)
    # The posterior of the last step has no variance; it borrows that of the step before, as the paper's code does.
    first = torch.zeros_like(t) + find_lowest_timestep(scheduler)
    second = first + 1
    small = torch.where(small > 0, small, posterior_coefficients(scheduler, second, first, fraction)[2])
    low, high = small.log().to(fraction.dtype), large.log().to(fraction.dtype)
    return low + (fraction + 1) / 2 * (high - low)


def variational_term(
    scheduler: SchedulerMixin, error: Tensor, log_variance: Tensor, t: Tensor, previous: Tensor
) -> Tensor:
    """Return a term of the variational bound for each dimension, in nats, like `error`.

    KL(q(x_s | x_t, x0) || p(x_s | x_t)) (Ho et al. 2020, eq. 5); where s = `previous` is the clean sample,
    -log of the density p(x0 | x_t). error: x0 minus the model's estimate of it. log_variance: logarithm of p's
    variance, broadcast.
    """
    _, of_x0, variance, _ = posterior_coefficients(scheduler, t, previous, error)
    scaled = (of_x0.to(error.dtype) * error).square() * (-log_variance).exp()
    # -log N(x0; estimate, variance): of the last step, which is no divergence
    density = (scaled + log_variance + math.log(2 * math.pi)) / 2
    timestep = torch.as_tensor(previous, device=error.device).view(-1, *[1] * (error.ndim - 1))
    before = timestep < find_lowest_timestep(scheduler)
    log_true = torch.where(variance > 0, variance, 1.0).log().to(error.dtype)
    # KL of two Gaussians whose means differ by of_x0 * error
    divergence = (scaled + log_variance - log_true + (log_true - log_variance).exp() - 1) / 2
    return torch.where(before, density, divergence)


def predict_x0(scheduler: SchedulerMixin, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return the clean sample that a prediction at x_t stands for, like x; infinite for epsilon where abar_t is 0."""
    return solve_x0(get_prediction_type(scheduler), prediction, x, *alpha_sigma(scheduler, t, x))


def solve_x0(prediction_type: str | None, prediction: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the clean sample that a prediction at x = alpha sample + sigma noise stands for, like x."""
    prediction, _ = split_variance(prediction, x)
    match prediction_type:
        case "sample":
            return prediction
        case "epsilon":
            return (x - sigma * prediction) / alpha
        case "flow_prediction":
            return x - sigma * prediction
        case _:  # velocity
            return alpha * x - sigma * prediction


def x0_to_prediction(scheduler: SchedulerMixin, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return the prediction that stands for a clean sample at x_t: the inverse of `predict_x0`."""
    alpha, sigma = alpha_sigma(scheduler, t, x)
    match get_prediction_type(scheduler):
        case "sample":
            return x0
        case "epsilon":
            return (x - alpha * x0) / sigma
        case "flow_prediction":
            return (x - x0) / sigma
        case _:  # velocity
            return (alpha * x - x0) / sigma
