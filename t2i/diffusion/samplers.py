"""Samplers by name: schedulers that sample from a model with the noise schedule it was trained with."""

import copy
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from t2i.checks import check_choice
from t2i.diffusion.continuous import ProbabilityFlowScheduler, ReverseSDEScheduler
from t2i.diffusion.ddim import ExactDDIMScheduler, build_scheduler_like
from t2i.diffusion.sampling_loop import Sampling, sample_from_noise
from t2i.errors import InputError
from t2i.files.untrusted import format_error

TRIAL_STEPS = 4
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
FIXED_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
# Allowed settings, which not all schedulers check. The first is assumed where a scheduler has no such setting.
CONFIG_CHOICES = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "variance_type": (None, *FIXED_VARIANCE_TYPES, *LEARNED_VARIANCE_TYPES),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}

SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),  # ancestral (Ho et al. 2020)
    "ddim": (ExactDDIMScheduler, {}),  # Song et al. 2021; takes eta
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),  # Lu et al. 2022, 2M
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),  # Zhao et al. 2023
    "ode": (ProbabilityFlowScheduler, {}),  # Heun's method in continuous time: 2 steps - 1 evaluations
    "sde": (ReverseSDEScheduler, {}),  # the reverse SDE in continuous time
}


def resolve_sampler(name: str | None, scheduler: SchedulerMixin, model: Any) -> SchedulerMixin:
    """Return the sampler of this name for the model that `scheduler` belongs to; None is that scheduler itself.

    diffusers' plain DDIM becomes the exact one, which is the same where the number of steps divides the training's.
    """
    if name is None:
        return build_sampler("ddim", scheduler) if type(scheduler) is DDIMScheduler else scheduler
    return build_sampler(name, scheduler, bool(model.config.get("learned_variance", False)))


def count_model_evaluations(scheduler: SchedulerMixin, steps: int) -> int:
    """Return how often a sampling of so many steps evaluates the model."""
    repeated = isinstance(scheduler, PNDMScheduler) and steps > 1  # at the second timestep
    return (steps - 1) * getattr(scheduler, "order", 1) + 1 + repeated


def build_sampler(name: str, scheduler: SchedulerMixin, learned_variance: bool = False) -> SchedulerMixin:
    """Build the sampler of this name with the noise schedule and prediction type of `scheduler`.

    learned_variance: the model predicts the variance of the reverse steps, which ddpm then uses and the others ignore.
    Raises InputError for an unknown name.
    """
    check_choice("sampler", name, tuple(SAMPLERS))
    kind, settings = SAMPLERS[name]
    # The other samplers take no variance from the model
    if name == "ddpm" and (learned_variance or scheduler.config.get("variance_type") == "learned_range"):
        settings = {"variance_type": "learned_range"}
    return build_scheduler_like(kind, scheduler, **settings)


def check_scheduler_sampling(name: str, scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that `sample_from_noise` cannot sample with, by sampling four numbers in a few steps.

    name: of the scheduler in the message.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    for key, allowed in CONFIG_CHOICES.items():
        if (value := config.get(key, allowed[0])) not in allowed:
            raise InputError(f"the {name}, a {kind}, has {key} {value!r:.80}; it may be {', '.join(map(str, allowed))}")
    # A copy, for sampling sets the scheduler's timesteps
    trial = copy.deepcopy(scheduler)
    learned = config.get("variance_type") in LEARNED_VARIANCE_TYPES
    noise, generators = torch.ones(1, 1, 2, 2), [torch.Generator().manual_seed(0)]
    try:
        sampling = Sampling(min(TRIAL_STEPS, config.num_train_timesteps), generators)
        drawn = sample_from_noise(lambda x, _: torch.cat([x, x], 1) / 2 if learned else x / 2, trial, noise, sampling)
        # A schedule that rises would add noise instead of removing it
        falls = trial.timesteps[0] >= trial.timesteps[-1] and trial.alphas_cumprod.isfinite().all()
    except Exception as error:  # a library raises anything for a configuration that it did not check
        raise InputError(f"the {name}, a {kind}, cannot sample ({format_error(error)})") from error
    if not drawn.isfinite().all():
        raise InputError(f"the {name}, a {kind}, cannot sample: its samples are not finite")
    if not falls:
        raise InputError(f"the {name}, a {kind}, cannot sample: its timesteps do not fall")
