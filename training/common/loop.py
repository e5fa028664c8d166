"""The training loop of all stages. A stage brings a model, a loss, a data set, and a way to export the model."""

import contextlib
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, parse_flag_from_env
from PIL import Image
from t2i.training.common.cpu import choose_short_attention, count_cores, keep_memory
from t2i.training.common.ema import EMA, gather_full_tensor
from t2i.training.common.health import HealthMonitor
from t2i.training.common.log import MetricsLog, check_trackers, measure_peak_memory
from t2i.training.common.optimizer import Critic, build_optimizer, compute_learning_rate
from t2i.training.common.state import TrainState, flatten_config, lock_folder
from torch import Tensor, nn

from t2i.config import TrainConfig
from t2i.data.dataset import Batch, SampleDataset
from t2i.data.groups import SampleGroups
from t2i.data.loading import format_validation_lines, iterate_batches, iterate_fixed_batches
from t2i.errors import RESUMABLE_STATUS, InputError, RunError, RunStopped
from t2i.runtime.devices import choose_training_precision
from t2i.runtime.launch import check_environment
from t2i.runtime.memory import format_needed_memory, is_out_of_memory, measure_available_memory
from t2i.runtime.processes import ProcessWatch, StopRequest, check_processes_agree, run_on_main_process
from t2i.runtime.wrappers import has_adapters
from t2i.terminal import format_duration, print_note

MAX_FAILED_SAVES = 3  # in a row
DRY_RUN_STEPS = 3


@dataclass
class Stage:
    """The parts of a training run that differ from stage to stage."""

    model: nn.Module
    loss: Callable[[nn.Module, Batch], dict[str, Tensor]]  # "loss" is minimised, all else is logged beside it
    dataset: SampleDataset
    export: Callable[[nn.Module], None]  # saves the averaged model; on the main process, beside every checkpoint
    made_from: dict[str, str]  # identities of what the run depends on beside its configuration: data, frozen models
    config: dict[str, Any]  # the stage's whole configuration
    num_workers: int = 0
    validation: SampleDataset | None = None  # the held-out split
    preview: Callable[[nn.Module], dict[str, Image.Image]] | None = None  # draws with the averaged model
    critic: Critic | None = None
    groups: SampleGroups | None = None  # of the data set, that are drawn equally often


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Set up devices, precision and seeds."""
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise InputError(f"train.output is {config.output!r}, which is a file; give a folder")
    check_trackers(config.trackers)
    # Device and precision. `cpu` is given, because accelerate treats processes that torchrun starts on a machine
    # without a GPU as unrelated ones otherwise.
    check_environment()
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not (torch.cuda.is_available() or torch.mps.is_available())
    device = PartialState(cpu=cpu).device.type
    precision = choose_training_precision(device) if config.mixed_precision == "auto" else config.mixed_precision
    if precision == "fp16" and device == "cpu":
        raise InputError("train.mixed_precision=fp16 needs a GPU, this process runs on the CPU; use bf16, no or auto")
    # Gradients live in the buffers that processes exchange, instead of in a second copy.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp])
    # Threads: `accelerate launch` leaves each process only one
    if device == "cpu":
        torch.set_num_threads(max(1, count_cores() // accelerator.num_processes))
        keep_memory()
    torch.manual_seed(config.seed)  # the same initial weights on every process
    return accelerator


def fit(accelerator: Accelerator, stage: Stage, config: TrainConfig) -> None:
    """Train a stage's model to lower `loss(model, batch)["loss"]`, and export the moving average of its weights.

    Continues from the newest checkpoint in the output folder. A resumed run equals the unbroken run bit for bit: the
    order of the data, the noise and the learning rate are functions of (seed, step, process).

    Raises:
        InputError: before the first step, for a configuration that cannot be trained.
        RunError: for a run that fails.
        RunStopped: after SIGTERM or Ctrl-C, when the run's state is saved.
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
                # Again, because the run may have died between its last checkpoint and the export.
                what = f"{config.output} is already trained for {state.step} steps"
                print_note(what, is_shown=accelerator.is_local_main_process)
                export_ema(accelerator, stage, state)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        needed, available = format_needed_memory(str(error)), measure_available_memory(accelerator.device)
        what = f"out of memory with train.batch_size={config.batch_size}: {needed}, {available}"
        raise RunError(f"{what}; {suggest_less_memory(config)}. The last checkpoint is kept") from error


def check_stage(accelerator: Accelerator, stage: Stage, config: TrainConfig) -> None:
    """Refuse, before any work, processes that were started with different things, or too many of them."""
    size, processes = len(stage.dataset), accelerator.num_processes
    settings = flatten_config(stage.config) | flatten_config({"train": asdict(config)}) | stage.made_from
    check_processes_agree(accelerator, {**settings, "samples": size})
    if size < processes:
        raise InputError(f"there are {processes} processes for {size} samples; start at most {size}")
    lines = stage.dataset.format_shape_lines(config.batch_size * config.gradient_accumulation * processes)
    for line in lines + format_validation_lines(stage.validation, config, processes):
        accelerator.print(line)


def prepare_state(accelerator: Accelerator, stage: Stage, config: TrainConfig) -> TrainState:
    """Move the stage's model to its device, wrap it there, and return the state of a run at step 0."""
    # What cannot be sharded
    if accelerator.distributed_type == DistributedType.FSDP:
        remedy = "use configs/accelerate/gpus.yaml (DDP)"
        if has_adapters(stage.model):
            raise InputError(f"lora cannot be trained under FSDP; adapters are small, {remedy}")
        if stage.critic is not None:
            raise InputError(f"a discriminator cannot be trained under FSDP; {remedy}")
    if config.gradient_checkpointing:
        stage.model.enable_gradient_checkpointing()
    # From here on stage.model may be wrapped or compiled; `bare` is neither.
    model_class, optimizer = type(stage.model), build_optimizer(config, stage.model, stage.critic)
    if config.compile:
        stage.model.compile()
    stage.model, optimizer = accelerator.prepare(stage.model, optimizer)
    bare = accelerator.unwrap_model(stage.model, keep_torch_compile=False)
    bare_critic = None
    if stage.critic is not None:
        bare_critic, stage.critic.model = stage.critic.model, accelerator.prepare(stage.critic.model)
    return TrainState(
        accelerator,
        config,
        model=bare,
        model_class=model_class,
        average=EMA(bare),
        optimizer=optimizer,
        made_from=stage.made_from | ({} if stage.groups is None else {"groups": stage.groups.compute_digest()}),
        stage_config=stage.config,
        critic=bare_critic,
    )


def train(accelerator: Accelerator, stage: Stage, state: TrainState) -> None:
    """Train from the state's step to the last one."""
    config, stop = state.config, StopRequest()
    watch = ProcessWatch(accelerator, config.stall_timeout, state.describe_newest_checkpoint)
    log = MetricsLog(accelerator, config, state.step, state.samples_per_step)
    health = HealthMonitor(accelerator, stage.dataset, config.output)
    loader, failed_saves = iterate_training_batches(stage, state), 0
    try:
        with watch.guard_wait(busy=True):
            run_on_main_process(accelerator, log.open)
        while state.step < config.steps:
            # The step
            rate = compute_learning_rate(state.step, config)
            norm = compute_gradient(accelerator, stage, state, loader, log, watch, health)
            with watch.guard_wait():
                healthy, stop_signal = health.judge_step(state.step + 1, norm, stop.signal)
            update_weights(accelerator, state, rate, healthy, health.loss_was_finite)
            health.check_skipped_steps(state.skipped)
            # Log, save, and stop if asked to. A preview comes after the checkpoint, for it may take long or fail.
            with watch.guard_wait():
                log.step(state.step, rate, norm, validate_ema(accelerator, stage, state, health))
            must_save = bool(stop_signal) or state.step == config.steps
            if must_save or state.step % config.save_every == 0:
                with watch.guard_wait(busy=True):
                    failed_saves = save_progress(accelerator, stage, state, failed_saves, must_save)
            if stop_signal and state.step < config.steps:
                what = f"stopped at step {state.step} of {config.steps}, which is saved in {config.output}"
                status = 128 + stop_signal if stop_signal == signal.SIGINT else RESUMABLE_STATUS
                raise RunStopped(f"{what}; the same command continues from there", status)
            with watch.guard_wait(busy=True):
                draw_due_preview(accelerator, stage, state, log)
    finally:
        loader.close()
        watch.close()
        stop.close()
        log.close()


def iterate_training_batches(stage: Stage, state: TrainState) -> Generator[Batch, None, None]:
    """Yield the batches of this process, from the state's position on."""
    return iterate_batches(
        stage.dataset,
        stage.num_workers,
        batch_size=state.config.batch_size,
        seed=state.config.seed,
        position=state.step * state.samples_per_step,
        step_size=state.samples_per_step,
        rank=state.accelerator.process_index,
        world=state.accelerator.num_processes,
        groups=stage.groups,
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
    """Accumulate the gradient of a step's micro-batches, and clip it.

    Returns the norm before clipping, (); of a critic's gradient instead, if that is not finite.
    """
    config, model, critic = state.config, stage.model, stage.critic
    models = [model] if critic is None else [model, critic.model]
    if critic is not None:
        critic.step = state.step
    for trained in models:
        trained.train()
    # Neither a compiler nor the second forward pass of checkpointing runs under the replaced attention.
    attention_replaceable = not (config.compile or config.gradient_checkpointing)
    for micro in range(config.gradient_accumulation):
        batch = next(loader).to(accelerator.device)
        seed_step_noise(config.seed, state.step * config.gradient_accumulation + micro, accelerator)
        with watch.guard_wait(), contextlib.ExitStack() as contexts:
            # Processes exchange gradients once, in the last micro-batch.
            if micro < config.gradient_accumulation - 1:
                for trained in models:
                    contexts.enter_context(accelerator.no_sync(trained))
            if attention_replaceable:
                contexts.enter_context(choose_short_attention(accelerator.device, accelerator.mixed_precision))
            with accelerator.autocast():
                metrics = stage.loss(model, batch)
            total = metrics["loss"] + metrics.get("critic_loss", 0)
            accelerator.backward(total / config.gradient_accumulation)
        if log is not None:
            log.add_micro_batch(metrics)
        health.add_micro_batch(batch, total)
    with watch.guard_wait():
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        # A critic's gradient is not clipped by accelerate, which would unscale fp16's gradients a second time.
        if critic is not None and norm is not None:
            critic_norm = nn.utils.clip_grad_norm_(critic.model.parameters(), config.max_grad_norm)
            norm = torch.where(torch.isfinite(critic_norm), norm, critic_norm)
        return None if norm is None else gather_full_tensor(norm)


def update_weights(
    accelerator: Accelerator, state: TrainState, rate: float, healthy: bool, loss_was_finite: bool = True
) -> None:
    """Take an optimizer step; leave weights, average and optimizer as they are if the step is not `healthy`."""
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    scaler = accelerator.scaler
    if healthy:
        state.optimizer.step()
        # The decay rises from 1/11, so that the average soon forgets the initial weights.
        state.average.update(min(state.config.ema_decay, (state.step + 1) / (state.step + 11)))
    elif scaler is not None:
        scaler.update()  # lowers the scale
    state.optimizer.zero_grad()
    state.step += 1
    # fp16's scale starts too large, and the first steps overflow until it is low enough.
    scale_too_large = scaler is not None and scaler.get_scale() > 1 and loss_was_finite
    state.skipped = 0 if healthy or scale_too_large else state.skipped + 1


def save_progress(accelerator: Accelerator, stage: Stage, state: TrainState, failed: int, must: bool) -> int:
    """Save a checkpoint and export the averaged model. Returns the number of failures in a row.

    Raises RunError if saving fails and `must` succeed, or has failed too often.
    """
    try:
        state.save_state()
        export_ema(accelerator, stage, state)
        return 0
    except OSError as error:
        message = f"step {state.step} could not be saved: {error}. {state.describe_newest_checkpoint()}"
        if must or failed + 1 >= MAX_FAILED_SAVES:
            raise RunError(message) from error
        print_note(f"warning: {message}", is_shown=accelerator.is_local_main_process)
        return failed + 1


def export_ema(accelerator: Accelerator, stage: Stage, state: TrainState) -> None:
    with state.gather_ema_model() as model:
        run_on_main_process(accelerator, lambda: stage.export(model))


def is_step_due(state: TrainState, every: int) -> bool:
    return every > 0 and (state.step % every == 0 or state.step == state.config.steps)


def draw_due_preview(accelerator: Accelerator, stage: Stage, state: TrainState, log: MetricsLog) -> None:
    """Draw and log preview images with the averaged model, every `sample_every` steps and at the end."""
    if stage.preview is None or not is_step_due(state, state.config.sample_every):
        return
    preview = stage.preview

    def draw() -> None:
        try:
            log.save_images(state.step, preview(model))
        except (OSError, RuntimeError, MemoryError) as error:
            # A full disk or little memory must not end a run; any other error is a defect.
            if not (isinstance(error, OSError) or is_out_of_memory(error)):
                raise
            print_note(f"warning: no sample images of step {state.step}: {error}")

    with state.gather_ema_model() as model, torch.no_grad():
        run_on_main_process(accelerator, draw)


@torch.no_grad()
def validate_ema(
    accelerator: Accelerator, stage: Stage, state: TrainState, health: HealthMonitor
) -> dict[str, float] | None:
    """Return the averaged model's metrics on held-out samples and noise, the same each time; None if it is not due."""
    if stage.validation is None or not is_step_due(state, state.config.validate_every):
        return None
    place = accelerator.process_index, accelerator.num_processes
    # Their means, over batches here and over processes at the end
    sums: dict[str, Tensor] = {}
    with state.average.ema_weights() as model:
        for i, (batch, weight) in enumerate(iterate_fixed_batches(stage.validation, state.config, *place)):
            seed_step_noise(0, i, accelerator)
            health.record_rejected_samples(batch)
            with accelerator.autocast():
                metrics = stage.loss(model, batch.to(accelerator.device))
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value.float() * weight
    names = sorted(sums)
    means = accelerator.reduce(torch.stack([sums[name] for name in names]), "mean").tolist()
    return {f"validation_{name}": value for name, value in zip(names, means)}


def estimate_run(accelerator: Accelerator, stage: Stage, state: TrainState) -> None:
    """Take a few real steps and print the cost of the run; nothing is written (`train.dry_run`)."""
    # Time some steps, with a learning rate of zero
    config = state.config
    watch = ProcessWatch(accelerator, config.stall_timeout, str)
    health = HealthMonitor(accelerator, stage.dataset, config.output)
    loader, times = iterate_training_batches(stage, state), []
    try:
        for _ in range(DRY_RUN_STEPS):
            start = time.perf_counter()
            norm = compute_gradient(accelerator, stage, state, loader, None, watch, health)
            update_weights(accelerator, state, 0.0, healthy=bool(norm is None or torch.isfinite(norm)))
            times.append(time.perf_counter() - start)
    finally:
        loader.close()
        watch.close()
    # Print what the whole run costs
    seconds = min(times[1:])  # the first step also warms up
    trained, total = count_elements(state.average.parameters.values()), count_elements(state.model.parameters())
    critic = "" if state.critic is None else f", and {count_elements(state.critic.parameters()):,} of its critic"
    size, per_step = len(stage.dataset), state.samples_per_step
    passes, device = config.steps * per_step / size, accelerator.device.type
    accelerator.print(
        f"parameters: {trained:,} trained of {total:,}{critic}\n"
        f"processes: {accelerator.num_processes} on {device}, precision {accelerator.mixed_precision}\n"
        f"samples: {size:,}, {per_step} a step; {config.steps:,} steps see each {passes:,.1f} x\n"
        f"memory: {measure_peak_memory(accelerator):.2f} GB a process after a step, at the peak on a GPU\n"
        f"disk: {state.count_checkpoint_bytes() / 1e6:,.1f} MB a checkpoint, {config.keep} are kept\n"
        f"time: {seconds:.3g} s a step, {format_duration(seconds * config.steps)} for all; nothing was written"
    )


def count_elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def seed_step_noise(seed: int, micro_step: int, accelerator: Accelerator) -> None:
    """Make the noise of a step a function of the seed, the step and the process alone."""
    torch.manual_seed((seed << 40) + micro_step * accelerator.num_processes + accelerator.process_index)


def suggest_less_memory(config: TrainConfig) -> str:
    """Return settings that train with the same number of samples a step in less memory."""
    size = config.batch_size
    parts = next((count for count in range(2, size + 1) if size % count == 0), None)
    ways = []
    if parts is not None:
        accumulation = parts * config.gradient_accumulation
        ways.append(f"train.batch_size={size // parts} train.gradient_accumulation={accumulation}")
    if not config.gradient_checkpointing:
        ways.append("train.gradient_checkpointing=true")
    return f"the same samples a step take less with {', or with '.join(ways)}" if ways else "use a smaller model"
