"""Training and sampling, the same for every denoiser.

A denoiser is a module with

    context    = denoiser.prepare(condition)      all that depends on neither x nor t, once per picture
    prediction = denoiser.step(x, t, context)     every step
    denoiser(x, t, condition)                     the same in one pass: what training calls
    denoiser.null(n)                              n conditions that say nothing

Guidance is a function that returns a `Predict`; sampling takes one. What the prediction is of (noise, clean sample or
velocity) is the scheduler's `prediction_type`. A model that has learned the variance of the reverse process predicts
twice the channels: `split` tells the two halves apart, and `clean` reads the first.
"""

import math
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, PNDMScheduler, SchedulerMixin
from torch import Generator, Tensor

from t2i.condition import Condition
from t2i.config import build, check_choice, check_integer, check_range
from t2i.errors import InputError

WEIGHTINGS = ("none", "min_snr")

Predict = Callable[[Tensor, Tensor], Tensor]  # x: (B, ...), t: () -> the model's prediction, like x


class Denoiser(Protocol):
    dtype: torch.dtype

    def __call__(self, x: Tensor, t: Tensor, condition: Any) -> Tensor: ...
    def prepare(self, condition: Any, *ahead: Tensor) -> Any: ...
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
    noise, t = draw_levels(scheduler, x, shift)
    prediction = model(scheduler.add_noise(x.float(), noise, t), t, condition)
    return prediction.float(), target(scheduler, x.float(), noise, t), t


def draw_levels(scheduler: SchedulerMixin, x: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """What a batch is noised with: noise like x, fp32, and timesteps, (B,)."""
    noise = torch.randn_like(x, dtype=torch.float32)
    uniform = torch.rand(len(x), device=x.device)
    steps = scheduler.config.num_train_timesteps
    return noise, (shift * uniform / (1 + (shift - 1) * uniform) * steps).long().clamp(max=steps - 1)


def diffusion_loss(
    model: Callable[..., Tensor],
    scheduler: SchedulerMixin,
    x: Tensor,
    condition: Condition,
    shift: float = 1.0,
    weighting: str = "none",
    gamma: float = 5.0,
) -> tuple[dict[str, Tensor], Tensor]:
    """The loss of a denoiser on clean `x`, as "loss", and what it predicted of the mean, like x, fp32.

    For a model that learns its variance this is the hybrid loss (Nichol and Dhariwal 2021, eq. 16): the squared error,
    and a thousandth of the variational bound, in bits per dimension, which reaches the variance alone. "bound" is that
    bound, estimated from one time a sample (for uniform times, shift 1).
    """
    x = x.float()
    noise, t = draw_levels(scheduler, x, shift)
    noisy = scheduler.add_noise(x, noise, t)
    mean, share = split(model(noisy, t, condition).float(), x)
    weight = loss_weight(scheduler, t, weighting, gamma)
    losses = {"loss": weighted_mse(mean, target(scheduler, x, noise, t), weight)}
    if share is not None:
        error = x - clean(scheduler, mean.detach(), noisy, t)
        log_variance = reverse_log_variance(scheduler, share, t, t - 1)
        term = variational_term(scheduler, error, log_variance, t, t - 1).mean()
        losses["bound"] = term / math.log(2) * scheduler.config.num_train_timesteps
        losses["loss"] = losses["loss"] + 0.001 * losses["bound"]
        losses["bound"] = losses["bound"].detach()
    return losses, mean


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
    at = signal(scheduler, t, like)
    return at.sqrt().to(like.dtype), (1 - at).sqrt().to(like.dtype)


def signal(scheduler: SchedulerMixin, t: Tensor, like: Tensor) -> Tensor:
    """abar_t as `levels` takes it, fp64: () or (B, 1, ...)."""
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


def split(prediction: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a model predicts of the mean, like x, and of the variance: None for a model that has not learned it."""
    if prediction.shape[1] == x.shape[1]:
        return prediction, None
    mean, share = prediction.chunk(2, dim=1)
    return mean, share


def with_variance(mean: Tensor, prediction: Tensor) -> Tensor:
    """A prediction with another mean: what changes the mean alone, as guidance does, returns this."""
    _, share = split(prediction, mean)
    return mean if share is None else torch.cat([mean, share], dim=1)


def posterior(
    scheduler: SchedulerMixin, sample: Tensor, x: Tensor, t: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor]:
    """q(x_s | x_t, x_0) for any s = `previous` < t: its mean, like x, and its variance, () or (B, 1, ...).

    Ho et al. 2020, eq. 6 and 7, for neighbours s = t - 1. Below 0, s is the clean sample: no variance is left.
    """
    of_x, of_sample, variance, _ = transition(scheduler, t, previous, x)
    return of_x.to(x.dtype) * x + of_sample.to(x.dtype) * sample, variance.to(x.dtype)


def transition(
    scheduler: SchedulerMixin, t: Tensor, previous: Tensor, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of q(x_s | x_t, x_0): the shares of x_t and of x_0 in its mean, and its variance; the variance of q(x_t | x_s).

    All fp64, () or (B, 1, ...). The two variances bound that of the reverse step, for data of unit variance.
    """
    now, before = signal(scheduler, t, like), signal(scheduler, previous, like)
    step, left = now / before, (1 - before) / (1 - now)
    return step.sqrt() * left, before.sqrt() * (1 - step) / (1 - now), (1 - step) * left, 1 - step


def reverse_log_variance(scheduler: SchedulerMixin, share: Tensor, t: Tensor, previous: Tensor) -> Tensor:
    """log Sigma of a learned reverse step (Nichol and Dhariwal 2021, eq. 15), like `share`, which the model predicts.

    From the posterior's at -1 to that of the forward step at 1, in the logarithm.
    """
    _, _, small, large = transition(scheduler, t, previous, share)
    # The last step has a posterior without variance; it borrows that of the step before, as the paper's code does.
    first, second = torch.zeros_like(t), torch.ones_like(t)
    small = torch.where(small > 0, small, transition(scheduler, second, first, share)[2])
    low, high = small.log().to(share.dtype), large.log().to(share.dtype)
    return low + (share + 1) / 2 * (high - low)


def variational_term(
    scheduler: SchedulerMixin, error: Tensor, log_variance: Tensor, t: Tensor, previous: Tensor
) -> Tensor:
    """A term of the variational bound for each dimension, in nats, like `error`.

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)) (Ho et al. 2020, eq. 5); where s = `previous` is the clean sample, below 0,
    -log of the density p(x_0 | x_t). error: x_0 minus what the model takes for it. log_variance: of p, to be broadcast.
    """
    _, of_sample, variance, _ = transition(scheduler, t, previous, error)
    scaled = (of_sample.to(error.dtype) * error).square() * (-log_variance).exp()
    density = (scaled + log_variance + math.log(2 * math.pi)) / 2
    before = torch.as_tensor(previous, device=error.device).view(-1, *[1] * (error.ndim - 1)) < 0
    log_true = torch.where(variance > 0, variance, 1.0).log().to(error.dtype)
    divergence = (scaled + log_variance - log_true + (log_true - log_variance).exp() - 1) / 2
    return torch.where(before, density, divergence)


def clean(scheduler: SchedulerMixin, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The clean sample that a prediction at x_t stands for, like x. Where all is noise, epsilon says nothing of it."""
    prediction, _ = split(prediction, x)
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


def conditional(denoiser: Denoiser, condition: Condition, *ahead: Tensor) -> Predict:
    """The model's own prediction. ahead: what else it prepares, such as the timesteps that it will be asked for."""
    context, dtype = denoiser.prepare(condition, *ahead), denoiser.dtype  # which diffusers looks for in all modules
    return lambda x, t: denoiser.step(x.to(dtype), t.expand(len(x)), context).to(x.dtype)


@torch.no_grad()
def sample(
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
    x, timesteps = start(scheduler, noise, steps, original, strength)
    for i, t in enumerate(progress(timesteps)):
        prediction = predict(scheduler.scale_model_input(x, t), t)
        if not learned:
            prediction, _ = split(prediction, x)
        x = scheduler.step(prediction, t, x, **extra).prev_sample
        if on_step is not None:
            x = on_step(i, t, x)
    return x


def start(
    scheduler: SchedulerMixin, noise: Tensor, steps: int, original: Tensor | None, strength: float
) -> tuple[Tensor, Tensor]:
    """What sampling starts from, and the timesteps that are left: all, or the last `strength` of them."""
    # diffusers' trailing timesteps end, for some numbers of steps, with one too many: -1, where there is no noise.
    timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
    if original is None:
        return noise * scheduler.init_noise_sigma, timesteps
    check_range("strength", strength, 0, 1)
    first = (steps - steps_left(steps, strength)) * getattr(scheduler, "order", 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps = timesteps[first:]
    if isinstance(scheduler, PNDMScheduler) and scheduler.config.skip_prk_steps:
        # Its first step is a step of Heun's method, which asks at the second of the timesteps once more.
        left = scheduler.timesteps.unique_consecutive()[first:]
        scheduler.timesteps = timesteps = torch.cat([left[:2], left[1:]])
    return scheduler.add_noise(original.to(noise), noise, timesteps[:1].expand(len(noise))), timesteps


def steps_left(steps: int, strength: float) -> int:
    """How many of the steps are taken: the last `strength` of them, and one at least."""
    return max(1, min(round(steps * strength), steps))


def check_eta(scheduler: SchedulerMixin, eta: float | None) -> None:
    if eta is None:
        return
    check_range("eta", eta, 0, 1)
    if "eta" not in signature(scheduler.step).parameters:
        raise InputError(f"eta is of the sampler ddim; {type(scheduler).__name__} does not take it, got eta={eta:g}")


def draw_noise(shape: tuple[int, ...], generators: list[Generator], device: torch.device) -> Tensor:
    """(len(generators), *shape), fp32: every sample's noise from its own generator, so that no batch changes it."""
    return torch.stack([torch.randn(shape, generator=one, device=one.device).to(device) for one in generators])
