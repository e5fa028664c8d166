"""DDIM (Song et al. 2021), exact for any number of steps, and its inversion.

With abar = cos^2 phi a deterministic step turns x_t by the angle between two noise levels:

    x_s = cos(d) x_t - sin(d) v(x_t, t),   d = phi_t - phi_s,   v = sqrt(abar) noise - sqrt(1 - abar) sample

which is Euler's method for the probability-flow ODE dx / dphi = v, exact where sample and noise stay the same.
"""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from t2i.checks import check_integer
from t2i.diffusion.denoiser import Predict
from t2i.diffusion.process import alpha_sigma, posterior_coefficients, predict_x0, split_variance

MIN_ALPHA = 0.02  # nearer to pure noise a velocity is not made of a predicted noise
CLASS_SPECIFIC_KEYS = (
    "variance_type",
    "algorithm_type",
    "solver_order",
    "solver_type",
)  # a class's own, though others share the names


class ExactDDIMScheduler(DDIMScheduler):
    """DDIM whose steps lead from each of its timesteps to the very next, also where their number does not divide T.

    diffusers' own takes a step of T // steps each time, and so misses the next timestep by a little. Same arguments.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Timesteps (num_inference_steps,), int64, falling."""
        if self.config.timestep_spacing != "trailing":
            super().set_timesteps(num_inference_steps, device)
            return
        check_integer("the number of steps", num_inference_steps, 1, self.config.num_train_timesteps)
        left = torch.arange(num_inference_steps, 0, -1, dtype=torch.float64) / num_inference_steps
        self.num_inference_steps = num_inference_steps
        self.timesteps = (self.config.num_train_timesteps * left).round().long().sub(1).to(device)

    @property
    def final_timestep(self) -> int:
        """Last timestep: -1 is the clean sample; 0, without `set_alpha_to_one`, leaves the least noise."""
        return -1 if self.config.set_alpha_to_one else 0

    def previous_timestep(self, timestep: Tensor | int) -> Tensor:
        """The timestep that a step from this one leads to; from the last, `end`."""
        after = (self.timesteps == timestep).nonzero()[-1, 0] + 1
        return self.timesteps[after] if after < len(self.timesteps) else self.timesteps.new_tensor(self.final_timestep)

    def clip_x0(self, sample: Tensor) -> Tensor:
        """The clean sample as the configuration bounds it: `thresholding`, `clip_sample`, or not at all."""
        if self.config.thresholding:
            return self._threshold_sample(sample)
        bound = self.config.clip_sample_range
        return sample.clamp(-bound, bound) if self.config.clip_sample else sample

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step (eq. 12). eta: 0 is deterministic, 1 has the noise of ancestral sampling (eq. 16)."""
        t = torch.as_tensor(timestep, device=sample.device)
        previous = self.previous_timestep(t).to(sample.device)
        x_0 = self.clip_x0(predict_x0(self, model_output, sample, t))
        (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma(self, t, sample), alpha_sigma(self, previous, sample)
        noise = (sample - alpha * x_0) / sigma
        if eta == 0:
            x = alpha_s * x_0 + sigma_s * noise
        else:
            variance = (eta**2 * posterior_coefficients(self, t, previous, sample)[2]).to(sample.dtype)
            fresh = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            x = alpha_s * x_0 + (sigma_s**2 - variance).clamp(min=0).sqrt() * noise + variance.sqrt() * fresh
        return DDIMSchedulerOutput(x, x_0) if return_dict else (x, x_0)


def build_scheduler_like(kind: type[SchedulerMixin], scheduler: SchedulerMixin, **settings: Any) -> Any:
    """A scheduler of another class with the noise schedule, prediction type and timestep spacing of this one.

    It clips only where this one does. (diffusers' `from_config` would replace defaults of one class by the other's.)
    """
    known = {key: scheduler.config[key] for key in signature(kind.__init__).parameters if key in scheduler.config}
    if "beta_schedule" not in known:  # such as UnCLIPScheduler, which has but one
        known["trained_betas"] = scheduler.betas.tolist()
    if "timestep_spacing" in signature(kind.__init__).parameters:
        known.setdefault("timestep_spacing", "linspace")  # the timesteps that UnCLIPScheduler takes
    if "clip_sample" in signature(kind.__init__).parameters:
        known.setdefault("clip_sample", False)
    return kind(**{**{key: value for key, value in known.items() if key not in CLASS_SPECIFIC_KEYS}, **settings})


@torch.no_grad()
def invert_sample(
    predict: Predict,
    scheduler: SchedulerMixin,
    x_0: Tensor,
    steps: int,
    refinements: int = 3,
    progress: Callable[[Iterable], Iterable] = iter,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The noise, like `x_0`, from which DDIM with eta 0 and as many steps draws `x_0`, (B, ...).

    To draw it again: `sample(predict, make_sampler("ddim", scheduler), noise, steps)` with the same predict. What a
    step started from solves x_t = (x_s + sin(d) v(x_t, t)) / cos(d). For a model of the noise that is the same as
    x_t = (alpha_t x_s + sin(d) noise(x_t, t)) / alpha_s, which converges more slowly, but stays bounded where alpha_t,
    which v is divided by, is almost zero. Taking v at x_s instead, the usual inversion, is off by O(d^2) a step; here
    the equation is solved by `refinements` evaluations a step, so this costs refinements * steps evaluations; 1 is the
    usual inversion and costs as much as sampling. The rate is d times how fast v changes: strong guidance or few steps
    may need more. Clipping and thresholding, which cannot be undone, are left out; so must be a `predict` that keeps a
    state, for it is asked several times a step. on_step(i, t, x) runs after each step, with x at t, and may change x.
    """
    check_integer("refinements", refinements, 1, 100)
    exact = build_scheduler_like(ExactDDIMScheduler, scheduler)
    exact.set_timesteps(steps, device=x_0.device)
    x, velocity = x_0, None
    of_noise = exact.config.prediction_type == "epsilon"
    previous = exact.timesteps.new_tensor(exact.final_timestep)
    for i, t in enumerate(progress(exact.timesteps.flip(0))):
        (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma(exact, t, x), alpha_sigma(exact, previous, x)
        cosine, sine = alpha * alpha_s + sigma * sigma_s, sigma * alpha_s - alpha * sigma_s
        guess = x if velocity is None else (x + sine * velocity) / cosine
        for _ in range(refinements):
            prediction, _ = split_variance(predict(guess, t), guess)
            velocity = (alpha * guess - predict_x0(exact, prediction, guess, t)) / sigma
            guess = (x + sine * velocity) / cosine
            if of_noise and alpha < MIN_ALPHA:  # a velocity made of noise and x is divided by it
                guess = (alpha * x + sine * prediction) / alpha_s
        x, previous = guess if on_step is None else on_step(i, t, guess), t
    return x
