"""The scheduler that Karlo and Kandinsky were published with, as `t2i.diffusion.sampling_loop.sample_from_noise` drives
schedulers."""

from typing import Any

import torch
from diffusers import SchedulerMixin, UnCLIPScheduler
from torch import Generator, Tensor

from t2i.checks import check_integer


class UnCLIPRespacedScheduler(
    UnCLIPScheduler, SchedulerMixin
):  # named: diffusers loads what has its mixin in the module
    """diffusers' UnCLIPScheduler, which knows where each of its steps leads to. Same arguments.

    DDPM (Ho et al. 2020) over a few of the timesteps, from the last to 0: what a step takes away is computed from the
    two timesteps that it lies between (Nichol and Dhariwal 2021, section 4). diffusers' own has to be told the second
    one, and takes the neighbour where it is not; and it divides by zero for a single step.

    How far it clamps clean samples is the configuration's word: diffusers' files of Karlo's prior say 5, where Karlo's
    own code has 10.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Timesteps (num_inference_steps,), int64, falling; a single step leads from pure noise to the sample."""
        check_integer("the number of steps", num_inference_steps, 1, self.config.num_train_timesteps)
        if num_inference_steps > 1:
            super().set_timesteps(num_inference_steps, device)
        else:
            self.num_inference_steps = 1
            self.timesteps = torch.tensor([self.config.num_train_timesteps - 1], device=device)

    def previous_timestep(self, timestep: Tensor | int) -> int:
        """The timestep that a step from this one leads to; -1, the clean sample, from the last."""
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
        """One step, to `prev_timestep` or, if that is left out, to the next of the timesteps.

        model_output: like `sample`, (B, ...), or with twice its channels for a variance that was learned. generator:
        one, or one a sample.
        """
        t = int(timestep)
        previous = self.previous_timestep(t) if prev_timestep is None else int(prev_timestep)
        moved = super().step(model_output, t, sample, previous, generator)
        if previous < 0 < t:  # the clean sample itself: no noise is left, and its logarithm says nothing
            moved.prev_sample = moved.pred_original_sample
        return moved if return_dict else (moved.prev_sample, moved.pred_original_sample)
