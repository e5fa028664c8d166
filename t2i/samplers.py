"""Samplers by name: schedulers that draw from a model with the noise schedule it was trained with."""

from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from t2i.config import check_choice
from t2i.continuous import ProbabilityFlowScheduler, ReverseSDEScheduler
from t2i.ddim import ExactDDIMScheduler, like

SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),  # ancestral (Ho et al. 2020)
    "ddim": (ExactDDIMScheduler, {}),  # Song et al. 2021; takes eta
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),  # Lu et al. 2022, 2M
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),  # Zhao et al. 2023
    "ode": (ProbabilityFlowScheduler, {}),  # Heun's method in continuous time: 2 steps - 1 evaluations
    "sde": (ReverseSDEScheduler, {}),  # the reverse SDE in continuous time
}


def check_sampler(name: str, value: Any) -> None:
    """Refuse what is no sampler, with the list of those that are."""
    check_choice(name, value, tuple(SAMPLERS))


def chosen(name: str | None, scheduler: SchedulerMixin, model: Any) -> SchedulerMixin:
    """The sampler of this name for a model that `scheduler` belongs to; for None that scheduler itself.

    diffusers' plain DDIM becomes the exact one, which is the same where the number of steps divides the training's.
    """
    if name is None:
        return make_sampler("ddim", scheduler) if type(scheduler) is DDIMScheduler else scheduler
    return make_sampler(name, scheduler, bool(model.config.get("learned_variance", False)))


def evaluations(scheduler: SchedulerMixin, steps: int) -> int:
    """How often a sampling of so many steps asks the model."""
    twice = isinstance(scheduler, PNDMScheduler) and steps > 1  # at the second timestep
    return (steps - 1) * getattr(scheduler, "order", 1) + 1 + twice


def make_sampler(name: str, scheduler: SchedulerMixin, learned_variance: bool = False) -> SchedulerMixin:
    """A new scheduler that samples as `name` says, of the noise schedule and prediction type of `scheduler`.

    learned_variance: the model predicts the variance of the reverse steps, which ddpm then uses and the others ignore.
    Raises InputError for an unknown name.
    """
    check_sampler("sampler", name)
    kind, settings = SAMPLERS[name]
    if name == "ddpm" and (learned_variance or scheduler.config.get("variance_type") == "learned_range"):
        settings = {"variance_type": "learned_range"}
    return like(kind, scheduler, **settings)
