"""The diffusion loss of every denoiser, and dropping its condition."""

import math
from collections.abc import Callable

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from t2i.checks import check_choice
from t2i.diffusion.condition import Condition
from t2i.diffusion.flow import FLOW_PREDICTION, draw_flow_timesteps, get_prediction_type, is_flow, shift_fraction
from t2i.diffusion.process import (
    add_noise,
    compute_prediction_target,
    predict_x0,
    reverse_log_variance,
    split_variance,
    variational_term,
)
from t2i.errors import InputError

LOSS_WEIGHTINGS = ("none", "min_snr")
STANDARD_LOGIT = (0.0, 1.0)  # mean and deviation of the logit of a flow's timesteps, as in Stable Diffusion 3


def check_loss_settings(
    scheduler: SchedulerMixin,
    weighting: str,
    logit: tuple[float, float] = STANDARD_LOGIT,
    learned_variance: bool = False,
) -> None:
    """Refuse settings of the loss that a process has no use for, or that leave the first step of sampling untrained."""
    check_choice("loss_weighting", weighting, LOSS_WEIGHTINGS)
    flow = f"scheduler.prediction_type={FLOW_PREDICTION}"
    if is_flow(scheduler):
        if weighting != "none":
            weights = "timesteps are drawn by weight (logit_mean, logit_std, scheduler.shift)"
            raise InputError(f"loss_weighting={weighting} does not go with {flow}, whose {weights}; leave it out")
        if learned_variance:
            raise InputError(f"model.learned_variance does not go with {flow}, whose samplers read none; leave it out")
        return
    if tuple(logit) != STANDARD_LOGIT:
        raise InputError(f"logit_mean and logit_std need {flow}, got {get_prediction_type(scheduler)}; leave them out")
    if weighting == "min_snr" and scheduler.alphas_cumprod[-1] == 0:
        raise InputError(
            "loss_weighting=min_snr gives pure noise no weight, but with scheduler.rescale_betas_zero_snr sampling "
            "starts there; leave out one of the two"
        )


def predict_noised_batch(
    model: Callable[..., Tensor],
    scheduler: SchedulerMixin,
    x: Tensor,
    condition: Condition,
    shift: float = 1.0,
    logit: tuple[float, float] = STANDARD_LOGIT,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise clean `x` by random amounts; return the model's prediction and the target, fp32, and t, (B,).

    shift > 1 draws high noise more often (t -> shift t / (1 + (shift - 1) t) for uniform t in [0, 1]); 1 is uniform.
    logit: mean and deviation of a flow's timesteps, which are logit-normal instead of uniform.
    """
    noise, t = generate_noise_and_timesteps(scheduler, x, shift, logit)
    prediction = model(add_noise(scheduler, x.float(), noise, t), t, condition)
    return prediction.float(), compute_prediction_target(scheduler, x.float(), noise, t), t


def generate_noise_and_timesteps(
    scheduler: SchedulerMixin, x: Tensor, shift: float, logit: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Draw noise like x, fp32, and timesteps, (B,), for a batch."""
    noise = torch.randn_like(x, dtype=torch.float32)
    if is_flow(scheduler):
        return noise, draw_flow_timesteps(scheduler, x, shift, logit)
    uniform = torch.rand(len(x), device=x.device)
    # Uniform in (0, 1), then shifted towards noise, then cut to whole timesteps
    steps = scheduler.config.num_train_timesteps
    return noise, (shift_fraction(uniform, shift) * steps).long().clamp(max=steps - 1)


def compute_diffusion_loss(
    model: Callable[..., Tensor],
    scheduler: SchedulerMixin,
    x: Tensor,
    condition: Condition,
    shift: float = 1.0,
    weighting: str = "none",
    gamma: float = 5.0,
    logit: tuple[float, float] = STANDARD_LOGIT,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the loss of a denoiser on clean `x`, as "loss", and its prediction of the mean, like x, fp32.

    For a model that learns its variance this is the hybrid loss (Nichol and Dhariwal 2021, eq. 16): the squared error
    plus a thousandth of the variational bound in bits per dimension, whose gradient reaches the variance alone. "bound"
    is that bound, estimated from one timestep a sample; for uniform timesteps, shift 1.
    """
    x = x.float()
    noise, t = generate_noise_and_timesteps(scheduler, x, shift, logit)
    noisy = add_noise(scheduler, x, noise, t)
    mean, fraction = split_variance(model(noisy, t, condition).float(), x)
    # The loss of the mean
    weight = compute_loss_weight(scheduler, t, weighting, gamma)
    losses = {"loss": compute_weighted_mse(mean, compute_prediction_target(scheduler, x, noise, t), weight)}
    if fraction is not None:
        # The mean is detached: it has its own, simpler loss.
        error = x - predict_x0(scheduler, mean.detach(), noisy, t)
        log_variance = reverse_log_variance(scheduler, fraction, t, t - 1)
        term = variational_term(scheduler, error, log_variance, t, t - 1).mean()
        losses["bound"] = term / math.log(2) * scheduler.config.num_train_timesteps
        # The weight of the bound in eq. 16
        losses["loss"] = losses["loss"] + 0.001 * losses["bound"]
        losses["bound"] = losses["bound"].detach()
    return losses, mean


def compute_loss_weight(scheduler: SchedulerMixin, t: Tensor, weighting: str, gamma: float) -> Tensor:
    """Return the weight of each sample's squared error, (B,), fp32, at timesteps t, (B,).

    "none": 1. "min_snr" (Hang et al. 2023): min(SNR, gamma) for an error in the clean sample, with
    SNR = abar / (1 - abar), so that the many steps of low noise do not outvote the rest; divided by SNR for noise and
    by SNR + 1 for velocity, whose errors are those of the clean sample in other units.
    """
    if weighting == "none":
        return torch.ones(len(t), device=t.device)
    abar = scheduler.alphas_cumprod.to(t.device)[t]
    snr = abar / (1 - abar)
    match get_prediction_type(scheduler):
        case "epsilon":
            return snr.clamp(max=gamma) / snr
        case "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        case _:
            return snr.clamp(max=gamma)


def compute_weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the mean over samples of weight, (B,), times mean squared error of (B, ...)."""
    return (weight * (prediction - target).square().flatten(1).mean(dim=1)).mean()


def drop_condition(condition: Condition, null: Condition, probability: float) -> Condition:
    """Replace each condition by the null with this probability, for classifier-free guidance."""
    return condition.where(torch.rand(len(condition), device=condition.device) >= probability, null)
