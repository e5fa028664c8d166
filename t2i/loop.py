"""The training loop that every stage shares. A stage brings a model, a loss, a data set, and its way to export."""

import contextlib
import copy
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import Dataset

from t2i.checkpoint import load_latest, save_checkpoint
from t2i.config import TrainConfig
from t2i.data import Batch, batches
from t2i.errors import InputError
from t2i.log import Log, check_trackers

Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]  # "loss" is minimised; the rest is logged beside it


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of optimizer step 0, 1, ...: linear warm-up, constant, then a cosine to zero over `decay_steps`."""
    rate = config.learning_rate
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    if step >= config.steps - config.decay_steps:
        done = (step + 1 - (config.steps - config.decay_steps)) / config.decay_steps
        rate *= (1 + math.cos(math.pi * done)) / 2
    return rate


def start(config: TrainConfig) -> Accelerator:
    """Set up devices, precision and seeds."""
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise InputError(f"train.output is {config.output!r}, which is a file; give a folder")
    check_trackers(config.trackers)
    # Said in full, for accelerate takes processes of torchrun on a machine without a GPU for lone ones.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not (torch.cuda.is_available() or torch.mps.is_available())
    device = PartialState(cpu=cpu).device.type
    precision = best_precision(device) if config.mixed_precision == "auto" else config.mixed_precision
    if precision == "fp16" and device == "cpu":
        raise InputError("train.mixed_precision=fp16 needs a GPU, this process runs on the CPU; use bf16, no or auto")
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    if device == "cpu":  # `accelerate launch` leaves each process one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // accelerator.num_processes))
    torch.manual_seed(config.seed)  # the same initial weights on every process
    return accelerator


def best_precision(device: str) -> str:
    """bf16 where the hardware computes in it, fp16 on older GPUs, else fp32."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device == "cpu" and torch.cpu._is_avx512_bf16_supported() else "no"


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    loss_fn: Loss,
    dataset: Dataset,
    config: TrainConfig,
    export: Callable[[nn.Module], None],
    num_workers: int,
    made_from: dict[str, str],
) -> nn.Module:
    """Train `model` to lower `loss_fn(model, batch)["loss"]`; return the moving average of its weights.

    Continues from the newest checkpoint in the output folder. `export(average)` runs on the main process beside every
    checkpoint, so that a run can be used before it ends. A resumed run is the unbroken one, bit for bit: the order of
    the data, the noise and the learning rate are functions of (seed, step, process). `made_from` names what the run
    depends on beside its configuration (the data, the models before it); a checkpoint made from anything else is
    refused.
    """
    average = copy.deepcopy(model).eval().requires_grad_(False).to(accelerator.device)
    optimizer: Optimizer = AdamW(parameter_groups(model, config), betas=(0.9, config.adam_beta2), fused=True)
    if config.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    step = resume(accelerator, bare, average, optimizer, config, made_from)
    if step >= config.steps and accelerator.is_main_process:
        accelerator.print(f"{config.output} is already trained for {step} steps")
        export(average)

    per_step = config.batch_size * config.gradient_accumulation * accelerator.num_processes
    log = Log(accelerator, config, step, per_step)
    loader = batches(
        dataset,
        num_workers,
        batch_size=config.batch_size,
        seed=config.seed,
        position=step * per_step,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    model.train()
    finite = torch.ones((), dtype=torch.bool, device=accelerator.device)
    while step < config.steps:
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for micro in range(config.gradient_accumulation):
            last = micro == config.gradient_accumulation - 1
            batch = next(loader).to(accelerator.device)
            seed_noise(config.seed, step * config.gradient_accumulation + micro, accelerator)
            with contextlib.nullcontext() if last else accelerator.no_sync(model), accelerator.autocast():
                metrics = loss_fn(model, batch)
            accelerator.backward(metrics["loss"] / config.gradient_accumulation)
            log.add(metrics)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if accelerator.scaler is None:  # fp16's scaler skips such steps itself
            finite &= torch.isfinite(norm)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        update_average(average, bare, min(config.ema_decay, step / (step + 10)))

        log.step(step, rate, norm)
        if step % config.save_every == 0 or step == config.steps:
            if not finite:
                raise FloatingPointError(
                    f"a gradient was not finite in the last {config.save_every} steps before {step}, which are not "
                    f"saved; lower train.learning_rate or look at the data. {config.output} keeps what was before"
                )
            save(accelerator, step, bare, average, optimizer, config, export, made_from)
    log.close()
    return average


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, in fp32; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for mine, theirs in zip(average.buffers(), model.buffers()):
        mine.copy_(theirs)


def seed_noise(seed: int, micro_step: int, accelerator: Accelerator) -> None:
    """Make the noise of a step a function of the seed, the step and the process alone."""
    torch.manual_seed((seed << 40) + micro_step * accelerator.num_processes + accelerator.process_index)


def save(
    accelerator: Accelerator,
    step: int,
    model: nn.Module,
    average: nn.Module,
    optimizer: Optimizer,
    config: TrainConfig,
    export: Callable[[nn.Module], None],
    made_from: dict[str, str],
) -> None:
    """A checkpoint and the exported average; the other processes wait."""
    if accelerator.is_main_process:
        tensors = {"model": model.state_dict(), "ema": average.state_dict(), "optimizer": flatten(optimizer)}
        state: dict[str, Any] = {"config": asdict(config), "made_from": made_from}
        state["num_processes"] = accelerator.num_processes
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        save_checkpoint(Path(config.output) / "checkpoints", step, tensors, state, config.keep)
        export(average)
    accelerator.wait_for_everyone()


# What decides, with the data, which samples and which noise a step sees.
UNCHANGEABLE = ("batch_size", "gradient_accumulation", "seed")


def resume(
    accelerator: Accelerator,
    model: nn.Module,
    average: nn.Module,
    optimizer: Optimizer,
    config: TrainConfig,
    made_from: dict[str, str],
) -> int:
    """Restore the newest checkpoint that verifies; the number of steps it has done, 0 without one."""
    checkpoint, problems = load_latest(Path(config.output) / "checkpoints")
    for problem in problems:
        accelerator.print(f"skipped: {problem}")
    steps = [checkpoint.state["step"] if checkpoint else 0]
    if broadcast_object_list(steps)[0] != (checkpoint.state["step"] if checkpoint else 0):
        raise InputError(f"the processes see different checkpoints in {config.output!r}; it must be one shared folder")
    if checkpoint is None:
        return 0
    before = {**checkpoint.state["config"], "num_processes": checkpoint.state["num_processes"]}
    now = {**asdict(config), "num_processes": accelerator.num_processes}
    for name in (*UNCHANGEABLE, "num_processes"):
        if before[name] != now[name]:
            raise InputError(
                f"{checkpoint.path} was trained with {name}={before[name]}, now {now[name]}; "
                "keep it, or start in another train.output"
            )
    for name, value in made_from.items():
        if checkpoint.state.get("made_from", made_from).get(name) != value:
            raise InputError(f"{checkpoint.path} was trained with another {name}; start in another train.output")
    try:
        model.load_state_dict(checkpoint.tensors["model"])
        average.load_state_dict(checkpoint.tensors["ema"])
        unflatten(optimizer, checkpoint.tensors["optimizer"])
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{checkpoint.path} is of another model: {error}; start in another train.output") from error
    if accelerator.scaler is not None and "scaler" in checkpoint.state:
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    accelerator.print(f"resuming from {checkpoint.path}")
    return checkpoint.state["step"]


def flatten(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's tensors by "index.name"; its rates and decays belong to the configuration."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def unflatten(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():  # in the parameter's memory format, which fused kernels expect
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)
