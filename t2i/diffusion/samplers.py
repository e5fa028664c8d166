"""Samplers by name: schedulers that sample from a model with the noise schedule it was trained with."""

import copy
import logging
from inspect import signature
from typing import Any

import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from t2i.checks import check_choice
from t2i.diffusion.continuous import AncestralScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler
from t2i.diffusion.ddim import ExactDDIMScheduler, build_scheduler_like
from t2i.diffusion.denoiser import Predict
from t2i.diffusion.flow import FLOW_PREDICTION, get_prediction_type, is_flow
from t2i.diffusion.process import x0_to_prediction
from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.sampling_loop import (
    LEARNED_VARIANCE_TYPES,
    Sampling,
    reads_variance,
    sample_from_noise,
)
from t2i.errors import InputError
from t2i.files.untrusted import format_error

logger = logging.getLogger(__name__)

TRIAL_STEPS = 10
MAX_LEVEL_CHANGE = 0.1  # of the factor of the sample, between two schedules that count as the same
# Schedulers of diffusers that sample here, for the message of those that do not. A test runs all of diffusers'
SAMPLING_SCHEDULERS = (
    "DDIM",
    "DDIMParallel",
    "DDPM",
    "DDPMParallel",
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverSDE",
    "DPMSolverSinglestep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "KDPM2AncestralDiscrete",
    "KDPM2Discrete",
    "LMSDiscrete",
    "PNDM",
    "SASolver",
    "TCD",
    "UnCLIP",
    "UniPCMultistep",
)
# Those that sample from a flow
FLOW_SAMPLING_SCHEDULERS = (
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "FlowMatchEulerDiscrete",
    "FlowMatchHeunDiscrete",
    "SASolver",
    "UniPCMultistep",
)
# Those of them that read no such prediction
BLIND_SCHEDULERS = {
    "sample": ("DPMSolverSDE", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "PNDM"),
    "v_prediction": ("UnCLIP",),
}
FIXED_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
# Allowed settings, which not all schedulers check. The first is assumed where a scheduler has no such setting.
CONFIG_CHOICES = {
    "prediction_type": ("epsilon", "sample", "v_prediction", FLOW_PREDICTION),
    "variance_type": (None, *FIXED_VARIANCE_TYPES, *LEARNED_VARIANCE_TYPES),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "timestep_type": ("discrete",),
    "snr_shift_scale": (1.0,),
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

    Some of diffusers' have a better form: plain DDIM becomes the exact one, which is the same where the number of steps
    divides the training's, UnCLIPScheduler the one that finds its previous timestep by itself. Those that cannot read
    a learned variance, but cut off channels by that setting, go without it.
    """
    if name is not None:
        return build_sampler(name, scheduler, bool(model.config.get("learned_variance", False)))
    kind = type(scheduler)
    if kind in (DDIMScheduler, DDIMParallelScheduler):
        return build_sampler("ddim", scheduler)
    if kind is UnCLIPScheduler:
        return UnCLIPRespacedScheduler.from_config(scheduler.config)
    is_foreign = scheduler.config.get("variance_type") in LEARNED_VARIANCE_TYPES and not reads_variance(scheduler)
    if is_foreign and "variance_type" in signature(kind.__init__).parameters:
        return kind.from_config(scheduler.config, variance_type=None)
    return scheduler


def count_model_evaluations(scheduler: SchedulerMixin, steps: int) -> int:
    """Return how often a sampling of so many steps evaluates the model."""
    repeated = 0
    if isinstance(scheduler, PNDMScheduler):  # at the second timestep; or Runge-Kutta steps at the start
        repeated = (steps > 1) if scheduler.config.skip_prk_steps else 9
    return (steps - 1) * getattr(scheduler, "order", 1) + 1 + repeated


def build_sampler(name: str, scheduler: SchedulerMixin, learned_variance: bool = False) -> SchedulerMixin:
    """Build the sampler of this name with the noise schedule and prediction type of `scheduler`.

    learned_variance: the model predicts the variance of the reverse steps, which ddpm then uses and the others ignore.
    Raises InputError for an unknown name.
    """
    check_choice("sampler", name, tuple(SAMPLERS))
    kind, settings = SAMPLERS[name]
    if is_flow(scheduler):
        return build_scheduler_like(AncestralScheduler if name == "ddpm" else kind, scheduler, **settings)
    # The other samplers take no variance from the model
    if name == "ddpm" and (learned_variance or scheduler.config.get("variance_type") == "learned_range"):
        settings = {"variance_type": "learned_range"}
    return build_scheduler_like(kind, scheduler, **settings)


def check_scheduler_sampling(name: str, scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that `sample_from_noise` cannot sample with, by sampling from an exact model in a few steps.

    name: of the scheduler in the message, which names the schedulers that work.
    """
    kind = type(scheduler).__name__
    if reason := find_sampling_fault(scheduler):
        works = ", ".join(list_sampling_schedulers(get_prediction_type(scheduler)))
        raise InputError(f"the {name}, a {kind}, {reason}; these schedulers of diffusers work: {works}")


def list_sampling_schedulers(prediction_type: str | None) -> list[str]:
    """Return the names, without "Scheduler", of those of diffusers that sample from such predictions."""
    if prediction_type == FLOW_PREDICTION:
        return list(FLOW_SAMPLING_SCHEDULERS)
    return [name for name in SAMPLING_SCHEDULERS if name not in BLIND_SCHEDULERS.get(prediction_type or "", ())]


def warn_of_other_levels(name: str, scheduler: Any, before: Any) -> None:
    """Log that a scheduler has other noise levels than the one that it replaces, which are those of the model."""
    new, old = (getattr(one, "alphas_cumprod", None) for one in (scheduler, before))
    if new is None or old is None:
        return
    # Schedules that end in pure noise are rescaled a little
    if len(new) != len(old) or (new.sqrt() - old.sqrt()).abs().max() > MAX_LEVEL_CHANGE:
        kind = type(scheduler).__name__
        logger.warning(
            "the new %s, a %s, has other noise levels than the one before, by which the model was trained; "
            "%s.from_config(pipeline.%s.config) takes them over",
            name,
            kind,
            kind,
            name,
        )


def find_sampling_fault(scheduler: SchedulerMixin) -> str | None:
    """Return why a scheduler cannot sample; None if it can."""
    # They draw the noise of each step anew, which samples from the data's distribution only if the model maps it there
    if isinstance(scheduler, LCMScheduler | FlowMatchLCMScheduler) or scheduler.config.get("stochastic_sampling"):
        return "is for consistency models, which this is not"
    for key, allowed in CONFIG_CHOICES.items():
        if (value := scheduler.config.get(key, allowed[0])) not in allowed:
            return f"has {key} {value!r:.80}; it may be {', '.join(map(str, allowed))}"
    flow = is_flow(scheduler)
    if scheduler.config.get("use_flow_sigmas", flow) != flow:
        kind = get_prediction_type(scheduler)
        return (
            f"has use_flow_sigmas {not flow} with prediction_type {kind}; {FLOW_PREDICTION} needs it, others exclude it"
        )
    generators = [torch.Generator().manual_seed(0)]
    try:
        # A copy, for sampling sets the scheduler's timesteps
        trial = copy.deepcopy(resolve_sampler(None, scheduler, None))
        sampling = Sampling(min(TRIAL_STEPS, trial.config.num_train_timesteps), generators)
        drawn = sample_from_noise(build_trial_predict(trial), trial, torch.ones(1, 1, 2, 2), sampling)
        # A schedule that rises would add noise instead of removing it
        falls = trial.timesteps[0] >= trial.timesteps[-1] and (flow or trial.alphas_cumprod.isfinite().all())
        left = 0 if flow else 3 * (1 - trial.alphas_cumprod[0]).sqrt()
        # The sigmas of a flow are in [0, 1]; those of other processes have no bound
        strays = flow and getattr(trial, "sigmas", drawn).max() > 1
    except Exception as error:  # a library raises anything for a configuration that it did not check
        return f"cannot sample ({format_error(error)})"
    if not drawn.isfinite().all():
        return "cannot sample: its samples are not finite"
    if not falls:
        return "cannot sample: its timesteps do not fall"
    if strays:
        return "cannot sample: its sigmas are not those of a flow"
    if (miss := drawn.abs().max()) > 0.1 + left:
        return f"cannot sample: from an exact model it is {miss:.2g} away"
    return None


def build_trial_predict(scheduler: SchedulerMixin) -> Predict:
    """Return the prediction of an exact model of one sample, 0, which nothing clips."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        prediction = x0_to_prediction(scheduler, torch.zeros_like(x), x, t)
        # The smallest variance that can be learned
        return torch.cat([prediction, -torch.ones_like(x)], 1) if reads_variance(scheduler) else prediction

    return predict
