"""Samplers by name: schedulers that sample from a model with the noise schedule it was trained with."""

import copy
import logging
import warnings
from contextlib import suppress
from inspect import signature
from typing import Any

import diffusers
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
from diffusers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error
from torch import Tensor

from t2i.checks import check_choice
from t2i.diffusion.continuous import AncestralScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler
from t2i.diffusion.ddim import ExactDDIMScheduler, build_scheduler_like
from t2i.diffusion.denoiser import Predict
from t2i.diffusion.flow import FLOW_PREDICTION, FLOW_SCHEDULERS, build_flow_settings, get_prediction_type, is_flow
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
from t2i.runtime.wrappers import unwrap_compiled

logger = logging.getLogger(__name__)

TRIAL_STEPS = 10
FEW_STEPS = 5  # at which rounding makes roots negative on some processors, and not at more
MAX_LEVEL_CHANGE = 0.1  # of the factor of the sample, between two schedules that count as the same
# Schedulers of diffusers that sample here, with the noise levels and predictions that they can have. A test runs all
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
FIXED_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
# Allowed settings, which not all schedulers check. The first is assumed where a scheduler has no such setting.
CONFIG_CHOICES = {
    "prediction_type": ("epsilon", "sample", "v_prediction", FLOW_PREDICTION),
    "variance_type": (None, *FIXED_VARIANCE_TYPES, *LEARNED_VARIANCE_TYPES),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "timestep_type": ("discrete",),
    "snr_shift_scale": (1.0,),
    "noise_sampler_seed": (None,),  # each sample's own generator is its seed
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
    """Return the sampler of this name for the model that `scheduler` belongs to; None is a copy of that scheduler.

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
    # Sampling changes it, and calls in several threads may share it
    return copy.deepcopy(scheduler)


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


def check_scheduler_sampling(name: str, scheduler: SchedulerMixin, trained: SchedulerMixin | None = None) -> None:
    """Refuse a scheduler that `sample_from_noise` cannot sample with, by sampling from an exact model in a few steps.

    name: of the scheduler in the message, which names the schedulers that work for the noise levels and predictions of
    the model. trained: the scheduler that has those; None is this one.
    """
    if reason := find_sampling_fault(scheduler):
        works = ", ".join(list_sampling_schedulers(trained or scheduler))
        advice = f"; these schedulers of diffusers work: {works}" if works else ""
        raise InputError(f"the {name}, a {type(scheduler).__name__}, {reason}{advice}")


def list_sampling_schedulers(like: SchedulerMixin) -> list[str]:
    """Return the names, without "Scheduler", of those of diffusers that sample with the configuration of one.

    Without noise levels in that one, as for EDM, with those that are diffusers' default.
    """
    flow = is_flow(like)
    if not flow and not hasattr(like, "alphas_cumprod"):
        like = DDIMScheduler()
    names, level = FLOW_SAMPLING_SCHEDULERS if flow else SAMPLING_SCHEDULERS, get_verbosity()
    try:
        set_verbosity_error()  # some say how they read their settings
        return [name for name in names if samples_like(name, like)]
    finally:
        set_verbosity(level)


def samples_like(name: str, like: SchedulerMixin) -> bool:
    """Return whether diffusers' scheduler of this name can have the noise levels of another one, and sample."""
    with warnings.catch_warnings(), suppress(Exception):  # a library raises and warns of anything
        warnings.simplefilter("ignore")
        scheduler = build_scheduler_like(getattr(diffusers, f"{name}Scheduler"), like)
        return find_sampling_fault(scheduler) is None and not has_other_levels(scheduler, like)
    return False


# The scheduler that a model was trained with


def remember_training(model: Any, scheduler: SchedulerMixin | None) -> None:
    """Note the scheduler that a model was trained with, which has its noise levels and its kind of prediction."""
    if model is not None and scheduler is not None:
        unwrap_compiled(model).training_scheduler = scheduler


def find_training_scheduler(model: Any) -> SchedulerMixin | None:
    """Return the scheduler that a model was trained with; None if that is not known."""
    return getattr(unwrap_compiled(model), "training_scheduler", None)


def check_prediction_type(name: str, scheduler: SchedulerMixin, trained: SchedulerMixin) -> None:
    """Refuse a scheduler that reads other predictions than the model makes. trained: see `find_training_scheduler`."""
    read, made = (get_prediction_type(one) or "epsilon" for one in (scheduler, trained))
    if read != made:
        kind, model = type(scheduler).__name__, name.removesuffix("_scheduler")
        advice = f"{kind}.from_config(pipeline.{name}.config) takes it over"
        if made == FLOW_PREDICTION and "use_flow_sigmas" in signature(type(scheduler).__init__).parameters:
            keys = ("prediction_type", "use_flow_sigmas", "flow_shift")
            flow = ", ".join(f"{key}={build_flow_settings(trained)[key]!r}" for key in keys)
            advice = f"{kind}.from_config(pipeline.{name}.config, {flow}) reads it"
        elif isinstance(scheduler, FLOW_SCHEDULERS) or made == FLOW_PREDICTION:  # some have no such setting
            advice = f"these schedulers of diffusers work: {', '.join(list_sampling_schedulers(trained))}"
        raise InputError(
            f"the {name}, a {kind}, has the prediction_type {read}, but the {model} was trained with {made}; {advice}"
        )


def warn_of_other_levels(name: str, scheduler: SchedulerMixin, trained: SchedulerMixin) -> None:
    """Log that a scheduler has other noise levels than its model was trained with."""
    if has_other_levels(scheduler, trained):
        kind, model = type(scheduler).__name__, name.removesuffix("_scheduler")
        # UnCLIPScheduler has one shape of levels, and no settings of it
        betas = "" if "beta_schedule" in trained.config else f", trained_betas=pipeline.{name}.betas.tolist()"
        logger.warning(
            "the %s, a %s, has other noise levels than the %s was trained with; "
            "%s.from_config(pipeline.%s.config%s) takes them over",
            name,
            kind,
            model,
            kind,
            name,
            betas,
        )


def has_other_levels(scheduler: Any, trained: Any) -> bool:
    """Return whether the noise levels of two schedulers differ; False for those without any."""
    if is_flow(scheduler) or is_flow(trained):  # whose levels are the timesteps themselves
        return scheduler.config.num_train_timesteps != trained.config.num_train_timesteps
    new, old = (getattr(one, "alphas_cumprod", None) for one in (scheduler, trained))
    if new is None or old is None:
        return False
    # Schedules that end in pure noise are rescaled a little
    return len(new) != len(old) or bool((new.sqrt() - old.sqrt()).abs().max() > MAX_LEVEL_CHANGE)


def find_sampling_fault(scheduler: SchedulerMixin) -> str | None:
    """Return why a scheduler cannot sample; None if it can."""
    # They draw the noise of each step anew, which samples from the data's distribution only if the model maps it there
    if isinstance(scheduler, LCMScheduler | FlowMatchLCMScheduler) or scheduler.config.get("stochastic_sampling"):
        return "is for consistency models, which this is not"
    # Its settings, which explain a fault better than a failed trial does
    for key, allowed in CONFIG_CHOICES.items():
        if (value := scheduler.config.get(key, allowed[0])) not in allowed:
            return f"has {key} {value!r:.80}; it may be {', '.join(map(str, allowed))}"
    # A configuration of another scheduler, by which the model makes other predictions
    if isinstance(scheduler, FLOW_SCHEDULERS):
        predicted = scheduler.config.get("prediction_type", FLOW_PREDICTION)
        if predicted != FLOW_PREDICTION:
            return f"cannot sample from predictions of the type {predicted}"
    flow = is_flow(scheduler)
    if scheduler.config.get("use_flow_sigmas", flow) != flow:
        kind = get_prediction_type(scheduler)
        return (
            f"has use_flow_sigmas {not flow} with prediction_type {kind}; {FLOW_PREDICTION} needs it, others exclude it"
        )
    # A trial with a model that knows the answer
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
        few = Sampling(min(FEW_STEPS, trial.config.num_train_timesteps), generators)
        also = sample_from_noise(build_trial_predict(trial), copy.deepcopy(trial), torch.ones(1, 1, 2, 2), few)
        finite = drawn.isfinite().all() and also.isfinite().all()
    except Exception as error:  # a library raises anything for a configuration that it did not check
        return f"cannot sample ({format_error(error)})"
    if not finite:
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
