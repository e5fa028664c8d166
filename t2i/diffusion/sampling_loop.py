"""The sampling loop, the same for every denoiser, and its settings."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from diffusers import PNDMScheduler, SchedulerMixin
from torch import Generator, Tensor

from t2i.checks import check_range
from t2i.diffusion.denoiser import Predict, PredictTransform, StepCallback
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.process import split_variance
from t2i.errors import InputError

MAX_STEPS = 1000


@dataclass(frozen=True)
class Sampling:
    """Settings of one sampling of N samples, handed from a pipeline down to `sample_from_noise`.

    steps: 1 to `MAX_STEPS`.
    generators: one a sample, of the noise to start from and of the noise that schedulers add.
    guidance: a scale, where 1 is off, or a `Guidance`; None: the model's default.
    noise: (N, ...), of unit variance, to start from; None: drawn from the generators.
    progress: wraps the timesteps, such as tqdm.
    on_step: `on_step(i, t, x)` runs after step i, at timestep t, and returns x, which it may change.
    transform: a further function of the guided `Predict`, such as steering.
    eta: how much of the noise of ancestral sampling DDIM adds, 0 to 1; None: the scheduler's default.
    original: (N, ...), clean samples to start from instead, noised as far as the last `strength` of the steps undo.
    strength: fraction of the steps that are taken from `original`, in (0, 1].
    """

    steps: int
    generators: list[Generator] = field(default_factory=list)
    guidance: float | Guidance | None = None
    noise: Tensor | None = None
    progress: Callable[[Iterable], Iterable] = iter
    on_step: StepCallback | None = None
    transform: PredictTransform | None = None
    eta: float | None = None
    original: Tensor | None = None
    strength: float = 1.0

    def get_noise(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the noise to start from, (N, *shape), fp32, on a device: the given one, or drawn."""
        noise = generate_noise(shape, self.generators, device) if self.noise is None else self.noise
        return noise.to(device).float()

    @property
    def steps_left(self) -> int:
        """Number of steps that are taken: all, or the last `strength` of them from `original`."""
        return self.steps if self.original is None else count_steps_left(self.steps, self.strength)


@torch.no_grad()
def sample_from_noise(predict: Predict, scheduler: SchedulerMixin, noise: Tensor, sampling: Sampling) -> Tensor:
    """Denoise from `noise`, (N, ...) of unit variance, to samples, step by step, in the noise's dtype."""
    check_eta(scheduler, sampling.eta)
    scheduler.set_timesteps(sampling.steps, device=noise.device)
    # diffusers' schedulers differ in what `step` takes
    accepted = signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": sampling.generators or None} if "generator" in accepted else {}
    if sampling.eta is not None:
        extra["eta"] = sampling.eta
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    if sampling.transform is not None:
        predict = sampling.transform(predict)
    x, timesteps = initialize_sampling(scheduler, noise, sampling)
    for i, t in enumerate(sampling.progress(timesteps)):
        prediction = predict(scheduler.scale_model_input(x, t), t)
        # These schedulers take no variance, which a model may have learned all the same
        if not learned:
            prediction, _ = split_variance(prediction, x)
        x = scheduler.step(prediction, t, x, **extra).prev_sample
        if sampling.on_step is not None:
            x = sampling.on_step(i, t, x)
    return x


def initialize_sampling(scheduler: SchedulerMixin, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return what sampling starts from, like `noise`, and the timesteps that are left."""
    # diffusers' trailing timesteps end, for some numbers of steps, with one too many: -1, where there is no noise.
    timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
    if sampling.original is None:
        return noise * scheduler.init_noise_sigma, timesteps
    check_range("strength", sampling.strength, 0, 1)
    # Samplers of second order have two timesteps a step
    first = (sampling.steps - sampling.steps_left) * getattr(scheduler, "order", 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps = timesteps[first:]
    if isinstance(scheduler, PNDMScheduler) and scheduler.config.skip_prk_steps:
        # Its first step is a step of Heun's method, which evaluates the model at the second timestep once more.
        left = scheduler.timesteps.unique_consecutive()[first:]
        scheduler.timesteps = timesteps = torch.cat([left[:2], left[1:]])
    return scheduler.add_noise(sampling.original.to(noise), noise, timesteps[:1].expand(len(noise))), timesteps


def count_steps_left(steps: int, strength: float) -> int:
    """Return how many of the steps are taken: the last `strength` of them, rounded down as in diffusers; at least 1."""
    return max(1, min(int(steps * strength), steps))


def check_eta(scheduler: SchedulerMixin, eta: float | None) -> None:
    """Refuse an eta that is out of range, or that the scheduler does not take."""
    if eta is None:
        return
    check_range("eta", eta, 0, 1)
    if "eta" not in signature(scheduler.step).parameters:
        raise InputError(f"eta is of the sampler ddim; {type(scheduler).__name__} does not take it, got eta={eta:g}")


def generate_noise(shape: tuple[int, ...], generators: list[Generator], device: torch.device) -> Tensor:
    """Draw (len(generators), *shape), fp32: each sample's noise from its own generator, so that no batch changes it."""
    draws = [torch.randn(shape, generator=generator, device=generator.device) for generator in generators]
    return torch.stack([draw.to(device) for draw in draws])
