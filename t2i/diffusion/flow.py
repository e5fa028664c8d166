"""Rectified flow (Liu et al. 2022; Esser et al. 2024): x_t = (1 - sigma) x0 + sigma noise, and a network that predicts
the velocity noise - x0.

Timesteps are sigma times `num_train_timesteps`, as in diffusers: 0 is the clean sample, 1000 is pure noise. They are
not whole numbers. `t2i.diffusion.process` reads noise levels and predictions of these schedulers as of all others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from t2i.checks import check_integer, check_range
from t2i.config import build_or_explain
from t2i.errors import InputError

FLOW_PREDICTION = "flow_prediction"  # the `prediction_type`, as diffusers' schedulers call it
FLOW_ARGUMENTS = ("num_train_timesteps", "shift", "prediction_type")
# Those that know no other process, and store neither a prediction type nor flow sigmas
FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
# Those that follow given noise levels of a flow. Others of diffusers have the argument, but ignore it or fail.
LEVEL_SCHEDULERS = {
    "timesteps": (FlowMatchEulerDiscreteScheduler, DDIMScheduler),
    "sigmas": (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler),
}
TAKING_FLOW_SCHEDULERS = {
    "timesteps": "for a flow, the sampler ddim and FlowMatchEulerDiscreteScheduler take them",
    "sigmas": "for a flow, the sampler unipc and FlowMatchEulerDiscreteScheduler take them",
}


def build_flow_scheduler(arguments: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler of a flow from its configuration: `num_train_timesteps` and `shift`.

    Raises InputError for the arguments of other processes, such as `beta_schedule`.
    """
    if foreign := sorted(arguments.keys() - set(FLOW_ARGUMENTS)):
        nulls = " ".join(f"scheduler.{name}=null" for name in foreign)
        raise InputError(
            f"scheduler.{foreign[0]} does not go with scheduler.prediction_type={FLOW_PREDICTION}, which takes "
            f"{' and '.join(FLOW_ARGUMENTS[:2])}; leave out with {nulls}"
        )
    check_integer("scheduler.num_train_timesteps", arguments.get("num_train_timesteps", 1000), 1, 100_000)
    check_range("scheduler.shift", arguments.get("shift", 1.0), 0.01, 100)
    own = {name: value for name, value in arguments.items() if name != "prediction_type"}
    return build_or_explain(FlowMatchEulerDiscreteScheduler, "scheduler", own)


def get_prediction_type(scheduler: SchedulerMixin) -> str | None:
    """Return what a scheduler's model predicts: "epsilon", "sample", "v_prediction" or "flow_prediction"."""
    if isinstance(scheduler, FLOW_SCHEDULERS):
        return FLOW_PREDICTION
    return scheduler.config.get("prediction_type")


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Return True if a scheduler samples from models of rectified flow."""
    return get_prediction_type(scheduler) == FLOW_PREDICTION


def get_flow_shift(scheduler: SchedulerMixin) -> float:
    """Return the shift of a flow's timesteps, 1 for even ones; see `shift_fraction`."""
    name = "shift" if isinstance(scheduler, FLOW_SCHEDULERS) else "flow_shift"
    return scheduler.config.get(name, 1.0)


def shift_fraction(fraction: Tensor, shift: float) -> Tensor:
    """Move fractions in [0, 1] towards noise, 1, if shift > 1; 1 keeps them (Esser et al. 2024, eq. 23)."""
    return shift * fraction / (1 + (shift - 1) * fraction)


def space_flow_timesteps(scheduler: SchedulerMixin, count: int) -> Tensor:
    """Return timesteps, (count,), fp32, falling from pure noise in even steps but for the scheduler's shift."""
    fractions = shift_fraction(torch.arange(count, 0, -1, dtype=torch.float64) / count, get_flow_shift(scheduler))
    return (scheduler.config.num_train_timesteps * fractions).float()


def choose_flow_levels(
    scheduler: SchedulerMixin, steps: int, given: dict[str, Sequence[float]]
) -> dict[str, Sequence[float]]:
    """Return the noise levels to set in a flow's scheduler, by the name of the argument; none are the scheduler's own.

    given: those of the caller, "timesteps" or "sigmas". Sigmas are shifted by the scheduler, and end with 0.
    """
    if "sigmas" in given:
        *sigmas, last = given["sigmas"]
        check_range("sigmas of a flow", sigmas[0], 0, 1)
        if last != 0:
            raise InputError(f"sigmas of a flow must end with 0, the clean sample, got {last:g} as the last")
        # diffusers appends the 0 by itself
        return {"sigmas": sigmas}
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return given
    if "timesteps" in given:  # of which diffusers shifts the sigmas alone
        fractions = torch.tensor(given["timesteps"], dtype=torch.float64) / scheduler.config.num_train_timesteps
        return {"sigmas": shift_fraction(fractions, 1 / scheduler.shift).tolist()}
    # Even steps, as Flux's pipeline sets them: diffusers' own leave no more than a thousandth of the way for the last
    return {"sigmas": (torch.arange(steps, 0, -1, dtype=torch.float64) / steps).tolist()}


def draw_flow_timesteps(
    scheduler: SchedulerMixin, like: Tensor, shift: float = 1.0, logit: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Draw timesteps of a training batch, (B,), fp32: logit-normal (Esser et al. 2024, eq. 19), then shifted.

    like: (B, ...). shift: on top of the scheduler's. logit: mean and deviation of the normal distribution whose sigmoid
    the fractions are, before the shift.
    """
    mean, deviation = logit
    fractions = torch.sigmoid(mean + deviation * torch.randn(len(like), device=like.device))
    return scheduler.config.num_train_timesteps * shift_fraction(fractions, shift * get_flow_shift(scheduler))


def build_flow_settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return the settings by which diffusers' solvers of several processes sample from a flow."""
    shift = get_flow_shift(scheduler)
    return {"prediction_type": FLOW_PREDICTION, "use_flow_sigmas": True, "flow_shift": shift, "shift": shift}
