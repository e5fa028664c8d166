"""The sampling loop, the same for every denoiser, and its settings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMParallelScheduler,
    DDPMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UnCLIPScheduler,
)
from torch import Generator, Tensor

from t2i.checks import check_integer, check_range
from t2i.diffusion.denoiser import Predict, PredictTransform, StepCallback
from t2i.diffusion.flow import LEVEL_SCHEDULERS, TAKING_FLOW_SCHEDULERS, choose_flow_levels, is_flow
from t2i.diffusion.guidance import MAX_GUIDANCE_SCALE, Guidance
from t2i.diffusion.process import own_alpha_sigma, predict_x0, scale_input, split_variance
from t2i.errors import InputError

MAX_STEPS = 1000
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
# Schedulers that sample with a variance from the model. Others carry the setting along, or cut off channels by it.
VARIANCE_READERS = (DDPMScheduler, DDPMParallelScheduler, UnCLIPScheduler)
# What takes given noise levels, for the message of those that do not
TAKING_SCHEDULERS = {
    "timesteps": "the samplers ddim, ddpm and dpmsolver++ take them",
    "sigmas": "EulerDiscreteScheduler takes them",
}


def check_sampling_defaults(default_steps: int, default_guidance_scale: float) -> None:
    """Refuse sampling defaults of a model's configuration that no pipeline would take. Raises InputError."""
    check_integer("default_steps", default_steps, 1, MAX_STEPS)
    check_range("default_guidance_scale", default_guidance_scale, 0, MAX_GUIDANCE_SCALE)


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
    eta: fraction of the noise of ancestral sampling DDIM adds, 0 to 1; None: the scheduler's default.
    use_clipped_model_output: DDIM takes the noise that belongs to a clipped clean sample, not the predicted one.
    timesteps, sigmas: noise levels of the steps, falling, in place of the scheduler's own; for schedulers that take
        them. `steps` is then their number of steps.
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
    use_clipped_model_output: bool = False
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
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
    extra = build_step_arguments(scheduler, sampling)
    set_timesteps(scheduler, sampling, noise.device)
    seed_noise_sampler(scheduler, sampling.generators)
    learned = reads_variance(scheduler)
    if sampling.transform is not None:
        predict = sampling.transform(predict)
    x, timesteps = initialize_sampling(scheduler, noise, sampling)
    last = len(timesteps) - 1 if has_idle_last_step(scheduler) else None
    for i, t in enumerate(sampling.progress(timesteps)):
        prediction = predict(scale_input(scheduler, x, t), t)
        # These schedulers take no variance, which a model may have learned all the same
        if not learned:
            prediction, _ = split_variance(prediction, x)
        if i == last:
            x = predict_x0(scheduler, prediction, x, t)
        else:
            x = scheduler.step(prediction, t, x, **extra).prev_sample
        if sampling.on_step is not None:
            x = sampling.on_step(i, t, x)
    return x


def build_step_arguments(scheduler: SchedulerMixin, sampling: Sampling) -> dict[str, Any]:
    """Return the further arguments of a scheduler's `step`, which differ. Raises InputError for one that it lacks."""
    check_eta(scheduler, sampling.eta)
    accepted = signature(scheduler.step).parameters
    arguments: dict[str, Any] = {"generator": sampling.generators or None} if "generator" in accepted else {}
    if sampling.eta is not None:
        arguments["eta"] = sampling.eta
    if sampling.use_clipped_model_output:
        check_ddim_argument(scheduler, "use_clipped_model_output", True)
        arguments["use_clipped_model_output"] = True
    return arguments


def set_timesteps(scheduler: SchedulerMixin, sampling: Sampling, device: torch.device | None = None) -> None:
    """Set a scheduler's timesteps: the given ones, or as many as there are steps. Raises InputError if it refuses."""
    given = {name: value for name in TAKING_SCHEDULERS if (value := getattr(sampling, name)) is not None}
    kind, flow = type(scheduler).__name__, is_flow(scheduler)
    advice = TAKING_FLOW_SCHEDULERS if flow else TAKING_SCHEDULERS
    for name in given:
        ignores = flow and not isinstance(scheduler, LEVEL_SCHEDULERS[name])
        if ignores or name not in signature(scheduler.set_timesteps).parameters:
            raise InputError(f"{kind} does not take {name}; {advice[name]}")
    if sampling.timesteps is not None:
        last = scheduler.config.num_train_timesteps - (not flow)
        check_range("timesteps", max(sampling.timesteps), 0, last)
    if flow:
        given = choose_flow_levels(scheduler, sampling.steps, given)
    if not given:
        scheduler.set_timesteps(sampling.steps, device=device)
        return
    try:
        # UniPC takes arrays alone, others lists alone
        levels = {name: np.array(values) if flow else list(values) for name, values in given.items()}
        scheduler.set_timesteps(device=device, **levels)
    except (TypeError, ValueError) as error:
        raise InputError(f"{' and '.join(given)} cannot be given to this {kind}: {error}") from error


def seed_noise_sampler(scheduler: Any, generators: list[Generator]) -> None:
    """Give a scheduler that draws noise without generators, DPMSolverSDE, the seed of each sample."""
    if generators and hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = [
            int(torch.randint(2**62, (1,), generator=item, device=item.device)) for item in generators
        ]


def reads_variance(scheduler: SchedulerMixin) -> bool:
    """Return True if a scheduler samples with a variance that the model predicts."""
    return isinstance(scheduler, VARIANCE_READERS) and scheduler.config.get("variance_type") in LEARNED_VARIANCE_TYPES


def initialize_sampling(scheduler: SchedulerMixin, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return what sampling starts from, like `noise`, and the timesteps that are left."""
    # diffusers' trailing timesteps end, for some numbers of steps, with one too many: -1, where there is no noise.
    timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
    # Samplers of second order have two timesteps a step
    first = (sampling.steps - sampling.steps_left) * getattr(scheduler, "order", 1)
    if hasattr(scheduler, "set_begin_index"):  # by itself it starts at the second of two equal timesteps
        scheduler.set_begin_index(first)
    if sampling.original is None:
        return noise * get_initial_scale(scheduler), timesteps
    check_range("strength", sampling.strength, 0, 1)
    timesteps = timesteps[first:]
    if isinstance(scheduler, PNDMScheduler):
        if first and not scheduler.config.skip_prk_steps:
            raise InputError("strength below 1 needs a PNDMScheduler with skip_prk_steps=True: others start with noise")
        # PNDM's first step is Heun's: it evaluates the second timestep twice.
        elif scheduler.config.skip_prk_steps:
            left = scheduler.timesteps.unique_consecutive()[first:]
            scheduler.timesteps = timesteps = torch.cat([left[:2], left[1:]])
    original = sampling.original.to(noise)
    if is_flow(scheduler):  # diffusers' FlowMatch schedulers have no `add_noise`
        alpha, sigma = own_alpha_sigma(scheduler, timesteps[0], original)
        return alpha * original + sigma * noise, timesteps
    return scheduler.add_noise(original, noise, timesteps[:1].expand(len(noise))), timesteps


def has_idle_last_step(scheduler: SchedulerMixin) -> bool:
    """Return True if the last step of a flow leads nowhere: diffusers' DEIS and SASolver leave the last noise."""
    if not is_flow(scheduler) or not hasattr(scheduler, "sigmas"):
        return False
    return bool(scheduler.sigmas[-1] == scheduler.sigmas[-2])


def get_initial_scale(scheduler: SchedulerMixin) -> Tensor | float:
    """Return the deviation of the noise that a scheduler starts from; diffusers' FlowMatch schedulers store no 1."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def count_steps_left(steps: int, strength: float) -> int:
    """Return how many of the steps are taken: the last `strength` of them, rounded down as in diffusers; at least 1."""
    return max(1, min(int(steps * strength), steps))


def check_eta(scheduler: SchedulerMixin, eta: float | None) -> None:
    """Refuse an eta that is out of range, or that the scheduler does not take."""
    if eta is None:
        return
    check_range("eta", eta, 0, 1)
    check_ddim_argument(scheduler, "eta", eta)


def check_ddim_argument(scheduler: SchedulerMixin, name: str, value: float) -> None:
    """Refuse an argument that the scheduler's `step` does not take."""
    if name not in signature(scheduler.step).parameters:
        kind = type(scheduler).__name__
        raise InputError(f"{name} needs the sampler ddim; {kind} does not take it, got {name}={value!r}")


def generate_noise(shape: tuple[int, ...], generators: list[Generator], device: torch.device) -> Tensor:
    """Draw (len(generators), *shape), fp32: each sample's noise from its own generator, so that no batch changes it."""
    draws = [torch.randn(shape, generator=generator, device=generator.device) for generator in generators]
    return torch.stack([draw.to(device) for draw in draws])
