"""The learning rate as a function of the step, and AdamW over a stage's weights."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from t2i.config import TrainConfig
from t2i.errors import InputError


@dataclass
class Critic:
    """A second model that learns beside a stage's and against it: clipped by itself, not averaged, not exported.

    The stage's loss calls it and returns "critic_loss" too. The gradient of "critic_loss" must reach the critic's
    weights alone, and the gradient of "loss" must not reach them: both are computed in one backward pass.
    """

    model: nn.Module
    betas: tuple[float, float]  # of its Adam; rate and weight decay are the run's
    step: int = 0  # of the run, for the loss


def compute_learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of step 0, 1, ...: linear warm-up, constant, then a cosine to zero over `decay_steps`."""
    rate = config.learning_rate
    if step + config.schedule_offset < config.warmup_steps:
        rate *= (step + config.schedule_offset + 1) / config.warmup_steps
    decay_start = config.steps - config.decay_steps
    if step >= decay_start:
        done = (step + 1 - decay_start) / config.decay_steps
        rate *= (1 + math.cos(math.pi * done)) / 2
    return rate


def build_optimizer(config: TrainConfig, model: nn.Module, critic: Critic | None = None) -> Optimizer:
    """Return AdamW over the model's trained weights and, with betas of their own, the critic's."""
    groups, betas = build_parameter_groups(model, config), (0.9, config.adam_beta2)
    if critic is not None:
        # AdamW treats each weight alone, so an optimizer with groups of its own equals a second optimizer. Under fp16
        # both models share one scale of the gradients this way.
        groups += [group | {"betas": critic.betas} for group in build_parameter_groups(critic.model, config)]
    if config.optimizer == "adamw":
        return AdamW(groups, betas=betas, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError("train.optimizer=adamw8bit needs bitsandbytes; pip install 't2i[8bit]'") from error
    return AdamW8bit(groups, betas=betas)


def build_parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return two groups of the trained weights: matrices and kernels with weight decay, all others without."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]
