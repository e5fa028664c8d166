"""The scheduler that Karlo and Kandinsky were published with, for `t2i.diffusion.sampling_loop.sample_from_noise`."""

from typing import Any

import torch
from diffusers import SchedulerMixin, UnCLIPScheduler
from torch import Generator, Tensor

from t2i.checks import check_integer


# SchedulerMixin is a base by name because diffusers loads a class only from modules that name its mixin.
class UnCLIPRespacedScheduler(UnCLIPScheduler, SchedulerMixin):
    """diffusers' UnCLIPScheduler with steps that lead to the next of its timesteps. Same arguments.

    DDPM (Ho et al. 2020) over a few of the timesteps, from the last to 0: a step's coefficients come from the two
    timesteps that it lies between (Nichol and Dhariwal 2021, section 4). diffusers' own takes the neighbour as the
    second timestep unless it is given, and divides by zero for a single step.

    Clean samples are clamped to the configuration's `clip_sample_range`: diffusers' files of Karlo's prior have 5,
    where Karlo's own code has 10.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps, (num_inference_steps,), int64, falling; a single step leads to the clean sample."""
        check_integer("the number of steps", num_inference_steps, 1, self.config.num_train_timesteps)
        # diffusers' spacing divides by the number of steps minus one
        if num_inference_steps > 1:
            super().set_timesteps(num_inference_steps, device)
        else:
            self.num_inference_steps = 1
            self.timesteps = torch.tensor([self.config.num_train_timesteps - 1], device=device)

    def previous_timestep(self, timestep: Tensor | int) -> int:
        """Return the timestep that a step from this one leads to; -1, the clean sample, from the last."""
        after = int((self.timesteps == timestep).nonzero()[-1, 0]) + 1
        return int(self.timesteps[after]) if after < len(self.timesteps) else -1

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        prev_timestep: Tensor | int | None = None,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take one step to `prev_timestep`; None is the next of the timesteps.

        model_output: like `sample`, (B, ...), or with twice its channels for a learned variance. generator: one, or one
        a sample.
        """
        t = int(timestep)
        previous = self.previous_timestep(t) if prev_timestep is None else int(prev_timestep)
        moved = super().step(model_output, t, sample, previous, generator)
        if previous < 0 < t:  # the variance of a step to the clean sample is 0, and its logarithm is infinite
            moved.prev_sample = moved.pred_original_sample
        return moved if return_dict else (moved.prev_sample, moved.pred_original_sample)
