"""The training loop that every stage shares. A stage brings a model, a loss, a data set, and its way to export."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, parse_flag_from_env
from PIL import Image
from t2i.training.common.cpu import choose_short_attention, keep_memory
from t2i.training.common.ema import EMA, gather_full_tensor
from t2i.training.common.health import HealthMonitor
from t2i.training.common.log import MetricsLog, check_trackers, format_duration, measure_peak_memory
from t2i.training.common.state import TrainState, flatten_config, lock_folder
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import Dataset

from t2i.config import TrainConfig
from t2i.data import Batch, iterate_batches
from t2i.errors import RESUMABLE_STATUS, InputError, RunError, RunStopped
from t2i.runtime.devices import choose_training_precision
from t2i.runtime.memory import format_needed_memory, is_out_of_memory, measure_available_memory
from t2i.runtime.processes import ProcessWatch, StopRequest, check_processes_agree, run_on_main_process

LossFunction = Callable[[nn.Module, Batch], dict[str, Tensor]]  # "loss" is minimised; the rest is logged beside it

MAX_FAILED_SAVES = 3  # in a row
DRY_RUN_STEPS = 3


@dataclass
class Critic:
    """A second model that learns beside a stage's and against it: clipped by itself, not averaged, not exported.

    The stage's loss calls it and gives "critic_loss" too. The gradient of that must reach the critic's weights alone,
    and the gradient of "loss" must not reach them: both are taken in one pass.
    """

    model: nn.Module
    betas: tuple[float, float]  # of its Adam; rate and weight decay are the run's
    step: int = 0  # of the run, for the loss to know


@dataclass
class Stage:
    """What a training script brings to the loop."""

    model: nn.Module
    loss: LossFunction
    dataset: Dataset  # gives whole batches, and `key(index)`, the name of a sample
    export: Callable[[nn.Module], None]  # saves the averaged model; on the main process, beside every checkpoint
    made_from: dict[str, str]  # what the run depends on beside its configuration: the data, the models before it
    config: dict[str, Any]  # the stage's whole configuration; what decides about the model must not change in a run
    num_workers: int = 0
    validation: Dataset | None = None  # what is held out
    preview: Callable[[nn.Module], dict[str, Image.Image]] | None = None  # pictures of what the averaged model does
    critic: Critic | None = None


def compute_learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of optimizer step 0, 1, ...: linear warm-up, constant, then a cosine to zero over `decay_steps`."""
    rate = config.learning_rate
    if step + config.schedule_offset < config.warmup_steps:
        rate *= (step + config.schedule_offset + 1) / config.warmup_steps
    if step >= config.steps - config.decay_steps:
        done = (step + 1 - (config.steps - config.decay_steps)) / config.decay_steps
        rate *= (1 + math.cos(math.pi * done)) / 2
    return rate


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Set up devices, precision and seeds."""
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise InputError(f"train.output is {config.output!r}, which is a file; give a folder")
    check_trackers(config.trackers)
    # Said in full, for accelerate takes processes of torchrun on a machine without a GPU for lone ones.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not (torch.cuda.is_available() or torch.mps.is_available())
    device = PartialState(cpu=cpu).device.type
    precision = choose_training_precision(device) if config.mixed_precision == "auto" else config.mixed_precision
    if precision == "fp16" and device == "cpu":
        raise InputError("train.mixed_precision=fp16 needs a GPU, this process runs on the CPU; use bf16, no or auto")
    # Without accumulation gradients lie where they are exchanged from, and are held once.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp])
    if device == "cpu":  # `accelerate launch` leaves each process one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // accelerator.num_processes))
        keep_memory()
    torch.manual_seed(config.seed)  # the same initial weights on every process
    return accelerator


def fit(accelerator: Accelerator, stage: Stage, config: TrainConfig) -> None:
    """Train a stage's model to lower `loss(model, batch)["loss"]`, and export the moving average of its weights.

    Continues from the newest checkpoint in the output folder. A resumed run is the unbroken one, bit for bit: the order
    of the data, the noise and the learning rate are functions of (seed, step, process).

    Raises InputError before the first step for what cannot be done, RunError for a run that fails, and RunStopped after
    SIGTERM or Ctrl-C, when its state is saved.
    """
    check_stage(accelerator, stage, config)
    try:
        if config.dry_run:
            estimate_run(accelerator, stage, prepare_state(accelerator, stage, config))
            return
        with lock_folder(accelerator, Path(config.output)):
            state = prepare_state(accelerator, stage, config)
            state.load_state()
            if state.step < config.steps:
                run_on_main_process(accelerator, state.check_disk_space)
                train(accelerator, stage, state)
            else:
                accelerator.print(f"{config.output} is already trained for {state.step} steps")
                export_ema(accelerator, stage, state)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"out of memory with train.batch_size={config.batch_size}: {format_needed_memory(str(error))}"
        raise RunError(
            f"{what}, {measure_available_memory(accelerator.device)}; {suggest_less_memory(config)}. "
            "The last checkpoint is kept"
        ) from error


def check_stage(accelerator: Accelerator, stage: Stage, config: TrainConfig) -> None:
    """What can be refused before any work."""
    size, world = len(stage.dataset), accelerator.num_processes  # type: ignore[arg-type]
    check_processes_agree(
        accelerator,
        {
            **flatten_config(stage.config),
            **flatten_config({"train": asdict(config)}),
            **stage.made_from,
            "samples": size,
        },
    )
    if size < world:
        raise InputError(f"there are {world} processes for {size} samples; start at most {size}")


def prepare_state(accelerator: Accelerator, stage: Stage, config: TrainConfig) -> TrainState:
    """Model, average and optimizer on their devices, as the newest checkpoint has them."""
    if config.gradient_checkpointing:
        stage.model.enable_gradient_checkpointing()
    if hasattr(stage.model, "peft_config") and accelerator.distributed_type == DistributedType.FSDP:
        raise InputError(
            "lora does not train under FSDP; its adapters are small, use configs/accelerate/gpus.yaml (DDP)"
        )
    if stage.critic is not None and accelerator.distributed_type == DistributedType.FSDP:
        raise InputError("two models do not train under FSDP; use whole copies, configs/accelerate/gpus.yaml (DDP)")
    plain, critic = type(stage.model), stage.critic and stage.critic.model
    optimizer = build_optimizer(stage, config)
    if config.compile:
        stage.model.compile()
    stage.model, optimizer = accelerator.prepare(stage.model, optimizer)
    bare = accelerator.unwrap_model(stage.model, keep_torch_compile=False)
    if stage.critic is not None:
        stage.critic.model = accelerator.prepare(stage.critic.model)
    return TrainState(
        accelerator, config, bare, plain, EMA(bare), optimizer, stage.made_from, stage.config, critic=critic
    )


def train(accelerator: Accelerator, stage: Stage, state: TrainState) -> None:
    """From the state's step to the last one."""
    config, stop = state.config, StopRequest()
    watch = ProcessWatch(accelerator, config.stall_timeout, state.describe_newest_checkpoint)
    log = MetricsLog(accelerator, config, state.step, state.samples_per_step)
    health = HealthMonitor(accelerator, stage.dataset, config.output)
    loader, failed_saves = iterate_training_batches(stage, state), 0
    try:
        with watch.guarded_wait(busy=True):
            run_on_main_process(accelerator, log.open)
        while state.step < config.steps:
            rate = compute_learning_rate(state.step, config)
            norm = compute_gradient(accelerator, stage, state, loader, log, watch, health)
            with watch.guarded_wait():
                healthy, stopping = health.judge_step(state.step + 1, norm, stop.signal)
            update_weights(accelerator, state, rate, healthy, health.loss_was_finite)
            health.check_skipped_steps(state.skipped)
            done = state.step == config.steps
            with watch.guarded_wait():
                log.step(state.step, rate, norm, validate_ema(accelerator, stage, state, health))
            if stopping or done or state.step % config.save_every == 0:
                with watch.guarded_wait(busy=True):
                    failed_saves = save_progress(accelerator, stage, state, failed_saves, must=bool(stopping) or done)
            if stopping and not done:
                what = f"stopped at step {state.step} of {config.steps}, which {config.output} holds"
                status = 128 + stopping if stopping == signal.SIGINT else RESUMABLE_STATUS
                raise RunStopped(f"{what}; the same command goes on from there", status)
            with watch.guarded_wait(busy=True):
                draw_due_preview(accelerator, stage, state, log)
    finally:
        loader.close()
        watch.close()
        stop.close()
        log.close()


def iterate_training_batches(stage: Stage, state: TrainState) -> Generator[Batch, None, None]:
    """The batches of this process, from the state's position on."""
    return iterate_batches(
        stage.dataset,
        stage.num_workers,
        batch_size=state.config.batch_size,
        seed=state.config.seed,
        position=state.step * state.samples_per_step,
        rank=state.accelerator.process_index,
        world=state.accelerator.num_processes,
    )


def compute_gradient(
    accelerator: Accelerator,
    stage: Stage,
    state: TrainState,
    loader: Iterator[Batch],
    log: MetricsLog | None,
    watch: ProcessWatch,
    health: HealthMonitor,
) -> Tensor | None:
    """Losses and gradients of a step's micro-batches; the norm of the clipped gradient, or a critic's if not finite."""
    config, model, critic = state.config, stage.model, stage.critic
    models = [model] if critic is None else [model, critic.model]
    if critic is not None:
        critic.step = state.step
        critic.model.train()
    model.train()
    for micro in range(config.gradient_accumulation):
        last = micro == config.gradient_accumulation - 1
        batch = next(loader).to(accelerator.device)
        seed_step_noise(config.seed, state.step * config.gradient_accumulation + micro, accelerator)
        with watch.guarded_wait(), contextlib.ExitStack() as within:
            for one in () if last else models:
                within.enter_context(accelerator.no_sync(one))
            repeated = config.compile or config.gradient_checkpointing
            within.enter_context(choose_short_attention(accelerator.device, accelerator.mixed_precision, repeated))
            with accelerator.autocast():
                metrics = stage.loss(model, batch)
            total = metrics["loss"] + metrics.get("critic_loss", 0)
            accelerator.backward(total / config.gradient_accumulation)
        if log is not None:
            log.add_micro_batch(metrics)
        health.add_micro_batch(batch, total)
    with watch.guarded_wait():
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if critic is not None and norm is not None:  # not by accelerate, which under fp16 would unscale a second time
            critic_norm = nn.utils.clip_grad_norm_(critic.model.parameters(), config.max_grad_norm)
            norm = torch.where(torch.isfinite(critic_norm), norm, critic_norm)
        return None if norm is None else gather_full_tensor(norm)


def update_weights(
    accelerator: Accelerator, state: TrainState, rate: float, healthy: bool, loss_was_finite: bool = True
) -> None:
    """One optimizer step; or none, weights, average and optimizer unchanged, if something was not finite."""
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    scaler = accelerator.scaler
    if healthy:
        state.optimizer.step()
        state.average.update(min(state.config.ema_decay, (state.step + 1) / (state.step + 11)))
    elif scaler is not None:
        scaler.update()  # lowers the scale
    state.optimizer.zero_grad()
    state.step += 1
    searching = scaler is not None and scaler.get_scale() > 1 and loss_was_finite  # fp16's scale starts too large
    state.skipped = 0 if healthy or searching else state.skipped + 1


def save_progress(accelerator: Accelerator, stage: Stage, state: TrainState, failed: int, must: bool) -> int:
    """A checkpoint and the exported average; how often in a row it could not be written."""
    try:
        state.save_state()
        export_ema(accelerator, stage, state)
        return 0
    except OSError as error:
        message = f"step {state.step} could not be saved: {error}. {state.describe_newest_checkpoint()}"
        if must or failed + 1 >= MAX_FAILED_SAVES:
            raise RunError(message) from error
        accelerator.print(f"warning: {message}")
        return failed + 1


def export_ema(accelerator: Accelerator, stage: Stage, state: TrainState) -> None:
    with state.gather_ema_model() as average:
        run_on_main_process(accelerator, lambda: stage.export(average))


def is_step_due(state: TrainState, every: int) -> bool:
    return every > 0 and (state.step % every == 0 or state.step == state.config.steps)


def draw_due_preview(accelerator: Accelerator, stage: Stage, state: TrainState, log: MetricsLog) -> None:
    """Pictures of what the averaged model does, when they are due."""
    if stage.preview is None or not is_step_due(state, state.config.sample_every):
        return
    preview = stage.preview

    def show() -> None:
        try:
            log.save_images(state.step, preview(average))
        except (OSError, RuntimeError, MemoryError) as error:
            if not (isinstance(error, OSError) or is_out_of_memory(error)):  # which are no reason to end a run
                raise
            accelerator.print(f"warning: no sample pictures of step {state.step}: {error}")

    with state.gather_ema_model() as average, torch.no_grad():
        run_on_main_process(accelerator, show)


@torch.no_grad()
def validate_ema(
    accelerator: Accelerator, stage: Stage, state: TrainState, health: HealthMonitor
) -> dict[str, float] | None:
    """When it is due, the averaged model's metrics on held-out samples: the same ones every time, with the same noise
    and timesteps."""
    config, world = state.config, accelerator.num_processes
    if stage.validation is None or not is_step_due(state, config.validate_every):
        return None
    count = min(len(stage.validation), config.validation_samples)  # type: ignore[arg-type]
    batch_size = max(1, min(config.batch_size, count // world))
    loader = iterate_batches(
        stage.validation, 0, batch_size=batch_size, seed=0, rank=accelerator.process_index, world=world
    )
    number = max(1, count // (batch_size * world))
    sums: dict[str, Tensor] = {}
    with state.average.ema_weights() as model:
        for i in range(number):
            seed_step_noise(0, i, accelerator)
            batch = next(loader)
            health.record_rejected_samples(batch)
            with accelerator.autocast():
                metrics = stage.loss(model, batch.to(accelerator.device))
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value.float() / number
    names = sorted(sums)
    means = accelerator.reduce(torch.stack([sums[name] for name in names]), "mean").tolist()
    return {f"validation_{name}": value for name, value in zip(names, means)}


def estimate_run(accelerator: Accelerator, stage: Stage, state: TrainState) -> None:
    """What `train.dry_run` prints: the cost of the run, from a few real steps that nothing is kept of."""
    config = state.config
    watch = ProcessWatch(accelerator, config.stall_timeout, str)
    health, loader, times = (
        HealthMonitor(accelerator, stage.dataset, config.output),
        iterate_training_batches(stage, state),
        [],
    )
    try:
        for _ in range(DRY_RUN_STEPS):
            start = time.perf_counter()
            norm = compute_gradient(accelerator, stage, state, loader, None, watch, health)
            update_weights(accelerator, state, 0.0, healthy=bool(norm is None or torch.isfinite(norm)))
            times.append(time.perf_counter() - start)
    finally:
        loader.close()
        watch.close()
    seconds = min(times[1:])
    trained = sum(one.numel() for one in state.average.parameters.values())
    total = sum(one.numel() for one in state.model.parameters())
    more = 0 if state.critic is None else sum(one.numel() for one in state.critic.parameters())
    size, a_step = len(stage.dataset), state.samples_per_step  # type: ignore[arg-type]
    where = f"{accelerator.num_processes} on {accelerator.device.type}, precision {accelerator.mixed_precision}"
    accelerator.print(
        f"parameters: {trained:,} trained of {total:,}{f', and {more:,} of its critic' if more else ''}\n"
        f"processes: {where}\n"
        f"samples: {size:,}, {a_step} a step; {config.steps:,} steps see each {config.steps * a_step / size:,.1f} x\n"
        f"memory: {measure_peak_memory(accelerator):.2f} GB a process after a step, at the peak on a GPU\n"
        f"disk: {state.count_checkpoint_bytes() / 1e6:,.1f} MB a checkpoint, {config.keep} are kept\n"
        f"time: {seconds:.3g} s a step, {format_duration(seconds * config.steps)} for all; nothing was written"
    )


def build_optimizer(stage: Stage, config: TrainConfig) -> Optimizer:
    """AdamW, fused, with weight decay for matrices and kernels only.

    AdamW knows nothing but single weights, so that one of several groups is as many optimizers, with one scale of the
    gradients in fp16: a critic's weights are groups with betas of their own.
    """
    groups, betas = build_parameter_groups(stage.model, config), (0.9, config.adam_beta2)
    if stage.critic is not None:
        groups += [
            group | {"betas": stage.critic.betas} for group in build_parameter_groups(stage.critic.model, config)
        ]
    if config.optimizer == "adamw":
        return AdamW(groups, betas=betas, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError("train.optimizer=adamw8bit needs bitsandbytes; pip install 't2i[8bit]'") from error
    return AdamW8bit(groups, betas=betas)


def build_parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def seed_step_noise(seed: int, micro_step: int, accelerator: Accelerator) -> None:
    """Make the noise of a step a function of the seed, the step and the process alone."""
    torch.manual_seed((seed << 40) + micro_step * accelerator.num_processes + accelerator.process_index)


def suggest_less_memory(config: TrainConfig) -> str:
    """What to train with in less memory, for as many samples a step."""
    size = config.batch_size
    parts = next((count for count in range(2, size + 1) if size % count == 0), None)
    ways = [] if config.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    if parts is not None:
        accumulation = parts * config.gradient_accumulation
        ways.insert(0, f"train.batch_size={size // parts} train.gradient_accumulation={accumulation}")
    return f"the same samples a step take less with {', or with '.join(ways)}" if ways else "use a smaller model"
