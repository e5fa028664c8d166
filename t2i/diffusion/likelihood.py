"""Likelihood of data under a model: the variational bound and the probability-flow ODE, in bits per dimension.

Both measure the density of continuous data, whose bits may be negative; the bound can also measure the probability of
images of 256 levels. Data of half the deviation need one bit per dimension less.
"""

import math
import random
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Generator, Tensor

from t2i.checks import check_choice, check_integer
from t2i.diffusion.continuous import ProbabilityFlowScheduler
from t2i.diffusion.ddim import build_scheduler_like
from t2i.diffusion.denoiser import Predict
from t2i.diffusion.process import (
    alpha_sigma,
    find_lowest_timestep,
    path_position,
    path_velocity,
    predict_x0,
    reverse_log_variance,
    split_variance,
    variational_term,
)
from t2i.diffusion.sampling_loop import generate_noise
from t2i.progress import follow_steps
from t2i.runtime.hooks import keep_used_weights

# Variance of the posterior and of the forward step, as `reverse_log_variance` counts.
REVERSE_VARIANCES = {"small": -1.0, "large": 1.0}


@dataclass
class VariationalBound:
    """Variational bound of each sample on -log p(x0), in bits per dimension (Ho et al. 2020, eq. 5).

    prior: L_T, (B,): the cost of starting from N(0, 1).
    steps: L_{t-1}, (B, K), for K of the timesteps t = 1, ..., T - 1; each stands for its part of the T - 1 steps. Of a
        flow t counts from 0, for the timestep 1, the lowest with noise.
    spaced_timesteps: the K timesteps.
    data: L_0, (B,): -log p(x0 | x_1), of the density, or of the levels of an image.
    """

    prior: Tensor
    steps: Tensor
    spaced_timesteps: Tensor
    data: Tensor

    @property
    def total_bits(self) -> Tensor:
        """The sum of all terms, (B,)."""
        return self.prior + self.steps.sum(dim=1) + self.data


@torch.no_grad()
def compute_variational_bound(
    predict: Predict,
    scheduler: SchedulerMixin,
    x0: Tensor,
    generators: list[Generator],
    variance: str = "small",
    terms: int | None = None,
    images: bool = False,
    seed: int = 0,
) -> VariationalBound:
    """Compute the bound of `x0`, (B, ...), with one draw of noise for each term: terms + 1 evaluations.

    Args:
        generators: one a sample, of its noise.
        variance: kind of the reverse steps, "small" or "large"; a model that has learned its own uses that.
        terms: number of the T - 1 steps that are evaluated, one at random in each stretch of them, for which it stands:
            an unbiased estimate. None evaluates all.
        images: the data are images in [-1, 1] in 256 levels; L_0 is then their probability (eq. 13), not a density.
        seed: number for the choice of the timesteps. All samples have the same, so that the bound of a sample does not
            depend on the batch.
    """
    check_choice("variance", variance, tuple(REVERSE_VARIANCES))
    last = scheduler.config.num_train_timesteps - 1
    count = last if terms is None else min(terms, last)
    check_integer("terms", count, 1, last)
    # Terms fall roughly as 1 / t: stretches of even length in log t, but of at least one step
    edges = (torch.linspace(0, 1, count + 1, dtype=torch.float64) * math.log(last + 1)).exp().round().long()
    edges = torch.maximum(edges, torch.arange(1, count + 2)).clamp(max=last + 1)
    edges = torch.minimum(edges, last + 1 - torch.arange(count, -1, -1))
    sizes = edges.diff()
    draws = random.Random(seed)
    chosen = torch.tensor([draws.random() for _ in range(count)], dtype=torch.float64)
    # One timestep at random in each stretch
    timesteps = edges[:-1] + (chosen * sizes).long().clamp(max=sizes - 1)

    def reverse_step(t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the estimate of the clean sample at t, and the logarithm of the reverse step's variance."""
        alpha, sigma = alpha_sigma(scheduler, t, x0)
        noisy = alpha * x0 + sigma * generate_noise(x0.shape[1:], generators, x0.device).to(x0.dtype)
        mean, fraction = split_variance(predict(noisy, t), noisy)
        fraction = torch.full_like(x0, REVERSE_VARIANCES[variance]) if fraction is None else fraction
        return predict_x0(scheduler, mean, noisy, t), reverse_log_variance(scheduler, fraction, t, t - 1)

    # L_{t-1}, L_0 and L_T
    rows, lowest = [], find_lowest_timestep(scheduler)
    for t, size in follow_steps("bound", list(zip(timesteps.to(x0.device) + lowest, sizes.tolist()))):
        estimate, log_variance = reverse_step(t)
        rows.append(size * variational_term(scheduler, x0 - estimate, log_variance, t, t - 1).flatten(1).mean(dim=1))
    first = timesteps.new_tensor(lowest).to(x0.device)
    estimate, log_variance = reverse_step(first)
    if images:
        data = -compute_level_log_probability(x0, estimate, log_variance)
    else:
        data = variational_term(scheduler, x0 - estimate, log_variance, first, first - 1)
    # L_T: KL of q(x_T | x0) from N(0, 1)
    alpha, sigma = alpha_sigma(scheduler, timesteps.new_tensor(last + lowest), x0)
    start = ((alpha * x0).square() + sigma**2 - 1 - 2 * sigma.log()) / 2
    data, start = (nats.flatten(1).mean(dim=1) for nats in (data, start))
    return VariationalBound(nats_to_bits(start), nats_to_bits(torch.stack(rows, dim=1)), timesteps, nats_to_bits(data))


def compute_level_log_probability(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log-probability of the levels of images, in [-1, 1] in steps of 2 / 255, like x (Ho et al., eq. 13).

    The Gaussian's mass between the middles of levels; the lowest and the highest level include the tails.
    """
    inverse = (-log_variance / 2).exp()
    upper = torch.where(x > 0.999, math.inf, (x + 1 / 255 - mean) * inverse)
    lower = torch.where(x < -0.999, -math.inf, (x - 1 / 255 - mean) * inverse)
    # Mirror to the left of the mean, where differences of small numbers keep their digits.
    mirrored = upper + lower > 0
    low, high = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    below = torch.special.log_ndtr(high)
    return below + torch.log1p(-(torch.special.log_ndtr(low) - below).exp().clamp(max=1 - 1e-12))


def compute_ode_bits(
    predict: Predict,
    scheduler: SchedulerMixin,
    x0: Tensor,
    generators: list[Generator],
    steps: int = 50,
    probes: int = 1,
) -> Tensor:
    """Compute -log2 of the density of x0, (B, ...), under the probability-flow ODE, in bits per dimension: (B,).

    Song et al. 2021, section 4.3: in the angle phi of the noise level, or in sigma of a flow, dx / dphi = v and
    d log p = -tr(dv / dx) dphi, by Heun's method from the lowest trained noise level, added to the data, to the
    highest, taken for N(0, 1). The trace is Hutchinson's estimate from `probes` vectors of signs for each sample, the
    same in every step. Costs 2 steps evaluations, each with `probes` backward passes.
    """
    check_integer("steps", steps, 2, 10_000)
    check_integer("probes", probes, 1, 1000)
    timesteps = build_scheduler_like(ProbabilityFlowScheduler, scheduler).space_timesteps(steps - 1)
    # Rising from the lowest trained noise level: from data to noise
    lowest = timesteps.new_full((1,), find_lowest_timestep(scheduler))
    timesteps = torch.cat([timesteps, lowest]).flip(0).to(x0.device)
    signs = torch.stack([generate_noise(x0.shape[1:], generators, x0.device).sign() for _ in range(probes)])

    def compute_derivatives(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return v, like x, and the trace of its Jacobian, (B,)."""
        with torch.enable_grad(), keep_used_weights():
            x = x.detach().requires_grad_()
            velocity = path_velocity(scheduler, predict_x0(scheduler, predict(x, t), x, t), x, t)
            trace = torch.zeros(len(x), device=x.device, dtype=x.dtype)
            # E[s^T J s] = tr J for random signs s
            for i, sign in enumerate(signs.to(x.dtype)):
                (product,) = torch.autograd.grad(velocity, x, sign, retain_graph=i + 1 < probes)
                trace = trace + (product * sign).flatten(1).sum(dim=1) / probes
        return velocity.detach(), trace

    alpha, _ = alpha_sigma(scheduler, timesteps[0], x0)
    x, change = alpha * x0, torch.zeros(len(x0), device=x0.device, dtype=x0.dtype)
    for t, after in follow_steps("ODE", list(zip(timesteps[:-1], timesteps[1:]))):
        length = (path_position(scheduler, after, x) - path_position(scheduler, t, x)).to(x.dtype)
        velocity, trace = compute_derivatives(x, t)
        # Heun's method: the mean of the derivatives at both ends
        next_velocity, next_trace = compute_derivatives(x + length * velocity, after)
        x = x + length * (velocity + next_velocity) / 2
        change = change + length * (trace + next_trace) / 2
    # x0 was scaled by alpha at the start, which changes its density by log alpha a dimension
    dimensions = x0[0].numel()
    density = -(x.square() + math.log(2 * math.pi)).flatten(1).sum(dim=1) / 2
    return nats_to_bits(-(density + change) / dimensions - alpha.log())


def nats_to_bits(nats: Tensor) -> Tensor:
    return nats / math.log(2)
