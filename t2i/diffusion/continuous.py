"""Sampling in continuous time, from the same model: the probability-flow ODE and the reverse SDE (Song et al. 2021).

Noise levels between the trained ones are interpolated in the logarithm of the signal-to-noise ratio, and the model is
evaluated at fractional timesteps. Both are schedulers of diffusers' kind, drop-ins for the saved one.
"""

import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from t2i.checks import check_integer
from t2i.diffusion.ddim import ExactDDIMScheduler
from t2i.diffusion.flow import is_flow, space_flow_timesteps
from t2i.diffusion.process import (
    alpha_bar,
    alpha_sigma,
    path_position,
    path_turn,
    path_velocity,
    posterior_mean_variance,
    predict_x0,
)

ANGLE_EXPONENT = 1.75


# SchedulerMixin is a base by name because diffusers loads a class only from modules that name its mixin.
class ContinuousScheduler(ExactDDIMScheduler, SchedulerMixin):
    """Base of both: fractional timesteps, noise at them, and the index of the present step."""

    def space_timesteps(self, count: int) -> Tensor:
        """Return timesteps, (count,), fp32, falling from the last trained one, denser where noise is low.

        They are even in phi^(1 / ANGLE_EXPONENT), which did best on Gaussian data; see docs/explanation/samplers.md.
        Those of a flow are even in sigma, but for its shift.
        """
        check_integer("the number of steps", count, 1, 100_000)
        if is_flow(self):
            return space_flow_timesteps(self, count)
        trained = self.alphas_cumprod.double().sqrt().acos()
        left = torch.arange(count, 0, -1, dtype=torch.float64) / count
        angles = trained[0] + (trained[-1] - trained[0]) * left**ANGLE_EXPONENT
        # Invert `alpha_sigma`, which interpolates linearly in log(tan), half the log-SNR.
        high = torch.searchsorted(trained, angles).clamp(1, len(trained) - 1)
        low, at, after = (angle.tan().log() for angle in (trained[high - 1], angles, trained[high]))
        return (high - 1 + (at - low) / (after - low)).float()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start in the middle, at this index of the timesteps."""
        self.index = begin_index

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t of clean samples, (B, ...), at timesteps (B,), also fractional ones."""
        alpha, sigma = alpha_sigma(self, timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def find_next_timestep(self, index: int) -> Tensor:
        return self.timesteps[index] if index < len(self.timesteps) else self.timesteps.new_tensor(-1)


class ProbabilityFlowScheduler(ContinuousScheduler):
    """Probability-flow ODE by Heun's method, of second order: 2 steps - 1 evaluations of the model.

    In the angle phi of the noise level (see `t2i.diffusion.ddim`) the ODE is dx / dphi = v, whose right-hand side stays
    of the size of the data at both ends. Euler's method for it is DDIM. The last step, to the clean sample, is Euler's.
    """

    order = 2

    def set_timesteps(  # type: ignore[override]
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Set the timesteps, (2 num_inference_steps - 1,), fp32: each but the first twice, as Heun's method does."""
        self.num_inference_steps = num_inference_steps
        self.timesteps = self.space_timesteps(num_inference_steps).repeat_interleave(2)[1:].to(device)
        self.index = 0

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take half a step of Heun's: to the next timestep, or the same again with the mean of both velocities."""
        t = torch.as_tensor(timestep, device=sample.device)
        x0 = self.clip_x0(predict_x0(self, model_output, sample, t))
        velocity = path_velocity(self, x0, sample, t)
        # Even: Euler's step to the next timestep. Odd: the same step again, with the mean of both velocities
        if self.index % 2 == 0:
            self.last_step = (t, sample, velocity)
            cosine, sine = path_turn(self, t, self.find_next_timestep(self.index + 1), sample)
            x = cosine * sample - sine * velocity
        else:
            # Undo the Euler step: start again from where it started
            t_left, x_left, velocity_left = self.last_step
            half = (path_position(self, t_left, sample) - path_position(self, t, sample)) / 2
            # tan(half), not half: exact where sample and noise stay the same. A flow's path is straight
            half = half if is_flow(self) else half.tan()
            x = x_left - half.to(sample.dtype) * (velocity_left + velocity)
        self.index += 1
        return DDIMSchedulerOutput(x, x0) if return_dict else (x, x0)


class ReverseSDEScheduler(ContinuousScheduler):
    """Reverse SDE by SDE-DPM-Solver++(2M) (Lu et al. 2022) at fractional timesteps: one evaluation a step.

    Each step draws from q(x_s | x_t, x0), which is the SDE's solution for a constant clean sample; from the second
    step on, the clean sample is extrapolated linearly in the log-SNR.
    """

    extrapolates = True

    def set_timesteps(  # type: ignore[override]
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Set the timesteps, (num_inference_steps,), fp32."""
        self.num_inference_steps = num_inference_steps
        self.timesteps = self.space_timesteps(num_inference_steps).to(device)
        self.index = 0
        self.last_step: tuple[Tensor, Tensor] | None = None  # the last step's log-SNR and clean sample

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step, with fresh noise from the generators."""
        t = torch.as_tensor(timestep, device=sample.device)
        previous = self.find_next_timestep(self.index + 1)
        x0 = self.clip_x0(predict_x0(self, model_output, sample, t))
        # The first step, and the one to the clean sample, take the estimate as it is
        extrapolated, log_snr = x0, torch.logit(alpha_bar(self, t, sample))
        if self.extrapolates and self.last_step is not None and previous >= 0:
            last_log_snr, last_x0 = self.last_step
            change = log_snr - last_log_snr
            if change.isfinite():  # pure noise has a log-SNR of minus infinity
                ratio = (torch.logit(alpha_bar(self, previous, sample)) - log_snr) / change
                extrapolated = x0 + (ratio / 2).to(sample.dtype) * (x0 - last_x0)
        mean, variance = posterior_mean_variance(self, extrapolated, sample, t, previous)
        fresh = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        self.last_step, self.index = (log_snr, x0), self.index + 1
        x = mean + variance.sqrt() * fresh
        return DDIMSchedulerOutput(x, x0) if return_dict else (x, x0)


class AncestralScheduler(ReverseSDEScheduler):
    """Ancestral sampling at fractional timesteps: each step draws from q(x_s | x_t, x0) for the estimate of x0.

    DDPM (Ho et al. 2020) of a flow, which diffusers' DDPMScheduler does not know.
    """

    extrapolates = False
