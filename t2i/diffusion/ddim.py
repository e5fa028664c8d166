"""DDIM (Song et al. 2021), exact for any number of steps, and its inversion.

With abar = cos^2 phi a deterministic step turns x_t by the angle between two noise levels:

    x_s = cos(d) x_t - sin(d) v(x_t, t),   d = phi_t - phi_s,   v = sqrt(abar) noise - sqrt(1 - abar) sample

which is Euler's method for the probability-flow ODE dx / dphi = v, exact where sample and noise stay the same. For
rectified flow, with sigma for phi, the step is x_s = x_t - d v with d = sigma_t - sigma_s: Euler's method too.
"""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from t2i.checks import check_integer
from t2i.diffusion.denoiser import Predict
from t2i.diffusion.flow import build_flow_settings, get_prediction_type, is_flow, space_flow_timesteps
from t2i.diffusion.process import (
    MIN_ALPHA,
    alpha_sigma,
    path_turn,
    path_velocity,
    posterior_coefficients,
    predict_x0,
    solve_x0,
    split_variance,
)

# Settings that schedulers of different classes share by name, but not by meaning.
CLASS_SPECIFIC_KEYS = ("variance_type", "algorithm_type", "solver_order", "solver_type")
# Spacings of FlowMatchEulerDiscreteScheduler, which the others have for other processes
SPACING_KEYS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting")


class SharedLevels(dict[tuple, tuple[Tensor, Tensor]]):
    """Factors of sample and noise by timestep, dtype and device, which all copies of a scheduler share.

    Threads may add to it at any time, so that it is not copied.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedLevels":
        return self


class ExactDDIMScheduler(DDIMScheduler):
    """DDIM whose steps lead from each timestep to the next one, also where their number does not divide T.

    diffusers' DDIMScheduler steps by T // steps each time, and so misses the next timestep by a little. Same arguments.
    """

    levels: SharedLevels | None = None  # `construct_scheduler` gives all that are equal the same ones

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the timesteps, (num_inference_steps,), int64 or of a flow fp32, falling; or those that are given."""
        if timesteps is not None:
            given = torch.as_tensor(timesteps, device=device)
            self.timesteps = given.float() if is_flow(self) else given.round().long()
            self.num_inference_steps = len(self.timesteps)
            return
        assert num_inference_steps is not None, "one of both is given"
        if is_flow(self):
            self.num_inference_steps = num_inference_steps
            self.timesteps = space_flow_timesteps(self, num_inference_steps).to(device)
            return
        if self.config.timestep_spacing != "trailing":
            super().set_timesteps(num_inference_steps, device)
            return
        check_integer("the number of steps", num_inference_steps, 1, self.config.num_train_timesteps)
        # Trailing timesteps: the first is the last trained one, where there is most noise
        left = torch.arange(num_inference_steps, 0, -1, dtype=torch.float64) / num_inference_steps
        self.num_inference_steps = num_inference_steps
        self.timesteps = (self.config.num_train_timesteps * left).round().long().sub(1).to(device)

    @property
    def final_timestep(self) -> int:
        """Timestep that the last step leads to: -1, the clean sample; or 0, without `set_alpha_to_one`."""
        return -1 if self.config.set_alpha_to_one else 0

    def previous_timestep(self, timestep: Tensor | int) -> Tensor:
        """Return the timestep that a step from this one leads to; `final_timestep` from the last."""
        timesteps, given = self.timesteps.tolist(), torch.as_tensor(timestep).item()
        after = len(timesteps) - timesteps[::-1].index(given)  # of equal ones, the last leads on
        return self.timesteps[after] if after < len(timesteps) else self.timesteps.new_tensor(self.final_timestep)

    def find_level(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return `alpha_sigma` of a timestep, (); computed once for each trained one, if the scheduler keeps levels."""
        # Tensors of inference mode could take part in no gradient later
        if self.levels is None or t.is_floating_point() or torch.is_inference_mode_enabled():
            return alpha_sigma(self, t, like)
        key = (int(t), like.dtype, like.device)
        if (level := self.levels.get(key)) is None:
            level = self.levels[key] = alpha_sigma(self, t, like)
        return level

    def clip_x0(self, sample: Tensor) -> Tensor:
        """Bound a clean sample by the configuration's `thresholding` or `clip_sample`, or not at all."""
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
        use_clipped_model_output: bool = False,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step (eq. 12).

        eta: 0 is deterministic, 1 adds the noise of ancestral sampling (eq. 16). use_clipped_model_output: take the
        noise that belongs to a clipped clean sample, as OpenAI's code does, instead of the predicted one.
        """
        t = torch.as_tensor(timestep, device=sample.device)
        previous = self.previous_timestep(t).to(sample.device)
        (alpha, sigma), (alpha_s, sigma_s) = self.find_level(t, sample), self.find_level(previous, sample)
        predicted = solve_x0(get_prediction_type(self), model_output, sample, alpha, sigma)
        x0 = self.clip_x0(predicted)
        noise = (sample - alpha * x0) / sigma
        # Clipping changes the clean sample alone, unless the caller wants both to fit
        if x0 is not predicted and not use_clipped_model_output:
            is_noise = self.config.prediction_type == "epsilon"
            noise = split_variance(model_output, sample)[0] if is_noise else (sample - alpha * predicted) / sigma
        if eta == 0:
            x = alpha_s * x0 + sigma_s * noise
        else:
            variance = (eta**2 * posterior_coefficients(self, t, previous, sample)[2]).to(sample.dtype)
            fresh = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            x = alpha_s * x0 + (sigma_s**2 - variance).clamp(min=0).sqrt() * noise + variance.sqrt() * fresh
        return DDIMSchedulerOutput(x, x0) if return_dict else (x, x0)


def build_scheduler_like(kind: type[SchedulerMixin], scheduler: SchedulerMixin, **settings: Any) -> Any:
    """Build a scheduler of another class with the noise schedule, prediction type and timestep spacing of this one.

    It clips only where this one does. (diffusers' `from_config` would replace defaults of one class by the other's.)
    """
    accepted = signature(kind.__init__).parameters
    shared = {key: scheduler.config[key] for key in accepted if key in scheduler.config}
    flow = build_flow_settings(scheduler) if is_flow(scheduler) else {}
    if flow:
        own = {key: value for key, value in shared.items() if key not in SPACING_KEYS}
        shared = own | {key: value for key, value in flow.items() if key in accepted}
    elif "beta_schedule" not in shared:  # such as UnCLIPScheduler, which has only one
        shared["trained_betas"] = scheduler.betas.tolist()
    if "timestep_spacing" in accepted:
        shared.setdefault("timestep_spacing", "linspace")  # the timesteps that UnCLIPScheduler takes
    # A class's own default would clip what the model was not trained to have clipped
    if "clip_sample" in accepted:
        shared.setdefault("clip_sample", False)
    own = {key: value for key, value in shared.items() if key not in CLASS_SPECIFIC_KEYS} | settings
    # Computing a noise schedule takes as long as a step of a small model, and each drawing asks for the same ones.
    # Shared tensors are never changed in place, and lists are new for each sampling (`set_timesteps`)
    stored = json.dumps(own, default=lambda array: array.tolist())
    built = copy.copy(construct_scheduler(kind, stored))  # type: ignore[arg-type]  # mypy: no class is hashable
    if flow:  # the shift, which a DDIMScheduler has no argument for
        built.register_to_config(flow_shift=flow["flow_shift"])
    return built


@lru_cache(maxsize=64)
def construct_scheduler(kind: type[SchedulerMixin], settings: str) -> Any:
    """Return a scheduler of a class with settings in JSON; equal ones are one object, to be copied."""
    built = kind(**json.loads(settings))
    if isinstance(built, ExactDDIMScheduler):
        # A small model's step takes little longer than computing them
        built.levels = SharedLevels()
    return built


@torch.no_grad()
def invert_sample(
    predict: Predict,
    scheduler: SchedulerMixin,
    x0: Tensor,
    steps: int,
    refinements: int = 3,
    progress: Callable[[Iterable], Iterable] = iter,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the noise, like `x0`, from which DDIM with eta 0 and as many steps samples `x0`, (B, ...).

    To sample it again: `sample_from_noise(predict, build_sampler("ddim", scheduler), noise, Sampling(steps))`.

    The start of a step solves x_t = (x_s + sin(d) v(x_t, t)) / cos(d). The usual inversion takes v at x_s instead,
    which is off by O(d^2) a step. Here the equation is solved by fixed-point iteration with `refinements` evaluations
    a step; 1 is the usual inversion. It converges at a rate of d times the change of v: strong guidance or few steps
    may need more. Clipping and thresholding cannot be undone and are left out. `predict` must not have a state, because
    it is evaluated several times a step.

    on_step: `on_step(i, t, x)` runs after each step, with x at t, and may change x.
    """
    check_integer("refinements", refinements, 1, 100)
    exact = build_scheduler_like(ExactDDIMScheduler, scheduler)
    exact.set_timesteps(steps, device=x0.device)
    x, velocity = x0, None
    predicts_noise = get_prediction_type(exact) == "epsilon"
    # From the clean sample towards noise: the sampler's timesteps in the other order
    previous = exact.timesteps.new_tensor(exact.final_timestep)
    for i, t in enumerate(progress(exact.timesteps.flip(0))):
        (alpha, _), (alpha_s, _) = alpha_sigma(exact, t, x), alpha_sigma(exact, previous, x)
        cosine, sine = path_turn(exact, t, previous, x)
        # The last step's velocity is nearly this one's
        guess = x if velocity is None else (x + sine * velocity) / cosine
        for _ in range(refinements):
            prediction, _ = split_variance(predict(guess, t), guess)
            velocity = path_velocity(exact, predict_x0(exact, prediction, guess, t), guess, t)
            guess = (x + sine * velocity) / cosine
            if predicts_noise and alpha < MIN_ALPHA:
                # The same equation in terms of the noise: it converges more slowly, but stays bounded where alpha is
                # almost 0, by which the velocity is divided.
                guess = (alpha * x + sine * prediction) / alpha_s
        x, previous = guess if on_step is None else on_step(i, t, guess), t
    return x
