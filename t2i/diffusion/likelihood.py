"""How likely a model finds data: the variational bound and the probability-flow ODE, in bits per dimension.

Both speak of the density of continuous data, whose bits may be negative, unless the bound is told that the data are
pictures of 256 levels. What has half the deviation takes a bit per dimension less.
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
    alpha_bar,
    alpha_sigma,
    predict_x0,
    reverse_log_variance,
    split_variance,
    variational_term,
)
from t2i.diffusion.sampling_loop import generate_noise

REVERSE_VARIANCES = {"small": -1.0, "large": 1.0}  # the posterior's, the forward step's


@dataclass
class VariationalBound:
    """The variational bound of each sample on -log p(x_0), in bits per dimension (Ho et al. 2020, eq. 5).

    prior: L_T, (B,): what is lost by starting from N(0, 1).
    steps: L_{t-1} for the times t = 1, ..., T - 1, (B, K); each stands for its share of the T - 1 steps.
    times: those K times.
    data: L_0, (B,): -log p(x_0 | x_1), of the density, or of the level that a picture has.
    """

    prior: Tensor
    steps: Tensor
    spaced_timesteps: Tensor
    data: Tensor

    @property
    def total_bits(self) -> Tensor:
        """(B,)"""
        return self.prior + self.steps.sum(dim=1) + self.data


@torch.no_grad()
def compute_variational_bound(
    predict: Predict,
    scheduler: SchedulerMixin,
    x_0: Tensor,
    generators: list[Generator],
    variance: str = "small",
    terms: int | None = None,
    pictures: bool = False,
    seed: int = 0,
) -> VariationalBound:
    """The bound of `x_0`, (B, ...): noise is drawn once for each term.

    variance: of the reverse steps, "small" or "large"; a model that has learned its own uses that. terms: of the T - 1
    steps, so many are evaluated, one at random in each stretch of them, and stand for it: no bias, and less work; None
    evaluates all. pictures: the data are in [-1, 1] in 256 levels, whose probability L_0 is (eq. 13), not a density.
    Costs terms + 1 evaluations. generators: one a sample, of its noise. seed: of the choice of the times, which are the
    same for all samples, so that the bound of one does not depend on those beside it.
    """
    check_choice("variance", variance, tuple(REVERSE_VARIANCES))
    last = scheduler.config.num_train_timesteps - 1
    count = last if terms is None else min(terms, last)
    check_integer("terms", count, 1, last)
    # Terms fall with the time, roughly as 1 / t: stretches of even length in log t, but of one step at least.
    edges = (torch.linspace(0, 1, count + 1, dtype=torch.float64) * math.log(last + 1)).exp().round().long()
    edges = torch.maximum(edges, torch.arange(1, count + 2)).clamp(max=last + 1)
    edges = torch.minimum(edges, last + 1 - torch.arange(count, -1, -1))
    sizes = edges.diff()
    draws = random.Random(seed)
    chosen = torch.tensor([draws.random() for _ in range(count)], dtype=torch.float64)
    times = edges[:-1] + (chosen * sizes).long().clamp(max=sizes - 1)

    def step(t: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample that the model sees at this time, and the logarithm of its reverse step's variance."""
        alpha, sigma = alpha_sigma(scheduler, t, x_0)
        noisy = alpha * x_0 + sigma * generate_noise(x_0.shape[1:], generators, x_0.device).to(x_0.dtype)
        mean, share = split_variance(predict(noisy, t), noisy)
        share = torch.full_like(x_0, REVERSE_VARIANCES[variance]) if share is None else share
        return predict_x0(scheduler, mean, noisy, t), reverse_log_variance(scheduler, share, t, t - 1)

    rows = []
    for t, size in zip(times.to(x_0.device), sizes.tolist()):
        found, log_variance = step(t)
        rows.append(size * variational_term(scheduler, x_0 - found, log_variance, t, t - 1).flatten(1).mean(dim=1))
    first = times.new_tensor(0).to(x_0.device)
    found, log_variance = step(first)
    if pictures:
        data = -compute_level_log_probability(x_0, found, log_variance)
    else:
        data = variational_term(scheduler, x_0 - found, log_variance, first, first - 1)
    alpha, sigma = alpha_sigma(scheduler, times.new_tensor(last), x_0)
    start = ((alpha * x_0).square() + sigma**2 - 1 - 2 * sigma.log()) / 2
    data, start = (nats.flatten(1).mean(dim=1) for nats in (data, start))
    return VariationalBound(nats_to_bits(start), nats_to_bits(torch.stack(rows, dim=1)), times, nats_to_bits(data))


def compute_level_log_probability(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the probability of pictures' levels, x in [-1, 1] in steps of 2 / 255, like x (Ho et al. 2020, eq. 13).

    A Gaussian's share between the levels' middles; the lowest and the highest level have what lies beyond them too.
    """
    inverse = (-log_variance / 2).exp()
    upper = torch.where(x > 0.999, math.inf, (x + 1 / 255 - mean) * inverse)
    lower = torch.where(x < -0.999, -math.inf, (x - 1 / 255 - mean) * inverse)
    # On the left of the mean, where differences of small numbers keep their digits.
    mirrored = upper + lower > 0
    low, high = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    below = torch.special.log_ndtr(high)
    return below + torch.log1p(-(torch.special.log_ndtr(low) - below).exp().clamp(max=1 - 1e-12))


def compute_ode_bits(
    predict: Predict,
    scheduler: SchedulerMixin,
    x_0: Tensor,
    generators: list[Generator],
    steps: int = 50,
    probes: int = 1,
) -> Tensor:
    """-log2 of the density of x_0, (B, ...), under the probability-flow ODE, in bits per dimension: (B,).

    Song et al. 2021, section 4.3: in the angle phi of the noise level, dx / dphi = v and d log p = -tr(dv / dx) dphi,
    by Heun's method from the lowest trained level to the highest; the trace is Hutchinson's estimate from `probes`
    vectors of signs for each sample, the same ones in every step. Of data with the noise of the lowest level added, and
    N(0, 1) at the highest. Costs 2 steps evaluations, each with `probes` backward passes.
    """
    check_integer("steps", steps, 2, 10_000)
    check_integer("probes", probes, 1, 1000)
    times = build_scheduler_like(ProbabilityFlowScheduler, scheduler).spaced_timesteps(steps - 1)
    times = torch.cat([times, times.new_zeros(1)]).flip(0).to(x_0.device)
    signs = torch.stack([generate_noise(x_0.shape[1:], generators, x_0.device).sign() for _ in range(probes)])

    def derivatives(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """v, like x, and the trace of its Jacobian, (B,)."""
        alpha, sigma = alpha_sigma(scheduler, t, x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            velocity = (alpha * x - predict_x0(scheduler, predict(x, t), x, t)) / sigma
            trace = torch.zeros(len(x), device=x.device, dtype=x.dtype)
            for i, sign in enumerate(signs.to(x.dtype)):
                (product,) = torch.autograd.grad(velocity, x, sign, retain_graph=i + 1 < probes)
                trace = trace + (product * sign).flatten(1).sum(dim=1) / probes
        return velocity.detach(), trace

    alpha, _ = alpha_sigma(scheduler, times[0], x_0)
    x, change = alpha * x_0, torch.zeros(len(x_0), device=x_0.device, dtype=x_0.dtype)
    for t, after in zip(times[:-1], times[1:]):
        length = (compute_angle(scheduler, after, x) - compute_angle(scheduler, t, x)).to(x.dtype)
        here, here_trace = derivatives(x, t)
        there, there_trace = derivatives(x + length * here, after)
        x = x + length * (here + there) / 2
        change = change + length * (here_trace + there_trace) / 2
    dimensions = x_0[0].numel()
    density = -(x.square() + math.log(2 * math.pi)).flatten(1).sum(dim=1) / 2
    return nats_to_bits(-(density + change) / dimensions - alpha.log())


def compute_angle(scheduler: SchedulerMixin, t: Tensor, x: Tensor) -> Tensor:
    return alpha_bar(scheduler, t, x).sqrt().acos()


def nats_to_bits(nats: Tensor) -> Tensor:
    return nats / math.log(2)
