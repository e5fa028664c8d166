"""The state of a run: the content of its checkpoints, and the settings that a resumed run must share with them."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from t2i.training.common.checkpoint import (
    Checkpoint,
    find_checkpoints,
    find_newest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from t2i.training.common.ema import EMA, gather_full_tensor
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from t2i.config import DataConfig, TrainConfig
from t2i.errors import InputError, RunError
from t2i.files.file_systems import lock_file, measure_free_bytes
from t2i.runtime.processes import run_on_main_process
from t2i.terminal import print_note

# Settings that may change between a run and its resumption. Paths are among them, because `made_from` identifies what
# lies there.
PATH_KEYS = ("clip", "autoencoder", "text_encoder", "cache", "init", "perceptual_clip", "data.path")
# Values of options that checkpoints may be older than, with which a run is as it was without them
NEW_OPTIONS = {f"data.{name}": value for name, value in asdict(DataConfig()).items()} | {"logit_std": 1.0}
MUTABLE_KEYS = ("train.", "sample.", "data.num_workers", *PATH_KEYS)
FIXED_TRAIN_KEYS = ("seed", "optimizer")  # of TrainConfig, whose other settings may differ
WEIGHT_COPIES = 4  # copies of the trained weights in a checkpoint: they, their average, and AdamW's two moments


@dataclass
class TrainState:
    """Everything that changes while a model learns. The position in the data is a function of the step."""

    accelerator: Accelerator
    config: TrainConfig
    model: nn.Module  # bare: neither wrapped nor compiled
    model_class: Any  # the class before sharding, which changes it
    average: EMA
    optimizer: Optimizer
    made_from: dict[str, str]  # as in `Stage`
    stage_config: dict[str, Any]  # the stage's whole configuration
    step: int = 0
    skipped: int = 0  # steps in a row whose loss or gradient was not finite
    critic: nn.Module | None = None  # bare; the optimizer holds its weights too, and no average exists of them

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.config.output) / "checkpoints"

    @property
    def samples_per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation * self.accelerator.num_processes

    def save_state(self) -> None:
        """Write a checkpoint; all processes must call this. Raises OSError, with nothing changed, if writing fails."""
        # Tensors, a file for each group
        optimizer = flatten_optimizer(self.optimizer)
        groups = {"model": self.model.state_dict(), "ema": self.average.values, "optimizer": optimizer}
        if self.critic is not None:
            groups["critic"] = self.critic.state_dict()
        tensors = {name: gather_full_tensors(self.accelerator, group) for name, group in groups.items()}
        # All else, as JSON
        state: dict[str, Any] = {
            "config": asdict(self.config),
            "made_from": self.made_from,
            "skipped": self.skipped,
            "stage": self.stage_config,
            "samples_per_step": self.samples_per_step,
            "num_processes": self.accelerator.num_processes,
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()

        def write() -> None:
            for problem in save_checkpoint(self.checkpoint_folder, self.step, tensors, state, self.config.keep):
                print_note(f"warning: {problem}")

        run_on_main_process(self.accelerator, write)

    def load_state(self) -> None:
        """Load the newest checkpoint that verifies, or the one in `train.resume`; do nothing if there is none."""
        path = run_on_main_process(self.accelerator, self.find_checkpoint)
        if path is None:
            return
        # The main process has found it; on another machine the same path may lead elsewhere.
        if not path.is_dir():
            rank = self.accelerator.process_index
            raise InputError(
                f"process {rank} cannot find {path}; train.output must be a folder that all processes share"
            )
        checkpoint = load_checkpoint(path)
        self.check_checkpoint(checkpoint)
        try:
            restore_tensors(dict(self.model.state_dict()), checkpoint.tensors["model"])
            restore_tensors(self.average.values, checkpoint.tensors["ema"])
            if self.critic is not None:
                restore_tensors(self.critic.state_dict(), checkpoint.tensors["critic"])
            restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"])
        except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{path} belongs to another model: {error}; use another train.output") from error
        if self.accelerator.scaler is not None and "scaler" in checkpoint.state:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.step, self.skipped = checkpoint.state["step"], checkpoint.state["skipped"]
        print_note(f"resuming from {path}", is_shown=self.accelerator.is_local_main_process)

    def find_checkpoint(self) -> Path | None:
        """Return the checkpoint to resume from, None for a new run. Raises if it is damaged or not the newest."""
        # The one that is named. It must be the newest, or the log and the next checkpoints would mix two runs.
        if self.config.resume != "latest":
            path = self.checkpoint_folder / Path(self.config.resume).name
            if problem := verify_checkpoint(path):
                raise RunError(f"train.resume is {path}, but {problem}")
            if newer := [other.name for other in find_checkpoints(self.checkpoint_folder) if other.name > path.name]:
                raise InputError(
                    f"train.resume is {path}, but there are newer checkpoints: {', '.join(newer)}; move them out of "
                    f"{self.checkpoint_folder}, or leave train.resume out to resume from the newest"
                )
            return path
        # The newest that is whole. Damaged ones alone are refused, for a new run would delete them.
        newest, problems = find_newest_checkpoint(self.checkpoint_folder)
        for problem in problems:
            print_note(f"skipped: {problem}", is_shown=self.accelerator.is_local_main_process)
        if newest is None and problems:
            raise RunError(
                f"all checkpoints in {self.checkpoint_folder} are damaged; delete them to start anew. "
                f"The first: {problems[0]}"
            )
        return newest

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Refuse settings that would make the resumed run another run: other samples, noise, data or models."""
        state, path = checkpoint.state, checkpoint.path
        remedy = "or use another train.output"
        before = select_fixed_settings(state["stage"], state["config"])
        now = select_fixed_settings(self.stage_config, asdict(self.config))
        for name in sorted({**before, **now}):
            # An option that is newer than the checkpoint, and off
            if name not in before and is_off(name, now[name]):
                continue
            if before.get(name) != now.get(name):
                raise InputError(
                    f"{path} was trained with {name}={before.get(name)!r}, now {now.get(name)!r}; keep it, {remedy}"
                )
        # Samples of a step
        if state["samples_per_step"] != self.samples_per_step:
            old = state["config"]
            raise InputError(
                f"{path} was trained with {state['samples_per_step']} samples a step (batch_size {old['batch_size']} x "
                f"gradient_accumulation {old['gradient_accumulation']} x {state['num_processes']} processes), now "
                f"{self.config.batch_size} x {self.config.gradient_accumulation} x {self.accelerator.num_processes} = "
                f"{self.samples_per_step}; keep the product, {remedy}"
            )
        # Data and frozen models
        for name, identity in self.made_from.items():
            old_identity = state["made_from"].get(name)
            if old_identity != identity:
                raise InputError(
                    f"{path} was trained with another {name} ({old_identity}, now {identity}); use the same, {remedy}"
                )

    @contextmanager
    def gather_ema_model(self) -> Iterator[nn.Module]:
        """Return the averaged model; on the main process it is whole, even if training shards it.

        All processes must enter this context.
        """
        with self.average.ema_weights() as model:
            if not any(isinstance(tensor, DTensor) for tensor in self.average.values.values()):
                yield model
                return
            weights = gather_full_tensors(self.accelerator, model.state_dict())
        # A second model, since a sharded one runs on all processes only
        if self.accelerator.is_main_process:
            model = self.model_class.from_config(self.model.config)
            model.load_state_dict(weights)
            model = model.to(self.accelerator.device).eval()
        yield model

    def describe_newest_checkpoint(self) -> str:
        """Return a sentence about the newest checkpoint, for messages about a run that fails."""
        paths = find_checkpoints(self.checkpoint_folder)
        return f"{paths[-1]} is kept, the same command continues from there" if paths else "There is no checkpoint yet"

    def count_checkpoint_bytes(self) -> int:
        trained = count_bytes(self.average.parameters)
        critic = 0 if self.critic is None else count_bytes(self.critic.state_dict())
        # The model is stored whole, frozen weights too; of a critic there is no average.
        return (WEIGHT_COPIES - 1) * (trained + critic) + count_bytes(self.model.state_dict())

    def check_disk_space(self) -> None:
        """Raise InputError if the checkpoints and the exported model will not fit on the disk."""
        size, keep = self.count_checkpoint_bytes(), self.config.keep
        present = sum(path.stat().st_size for path in self.checkpoint_folder.glob("step-*/*") if path.is_file())
        exported = 2 * count_bytes(self.model.state_dict())  # the new one is written before the old one goes
        needed = max(size, (keep + 1) * size - present) + exported
        free = measure_free_bytes(self.config.output)
        if free < needed:
            raise InputError(
                f"too little disk for train.output={self.config.output!r}: {keep + 1} checkpoints of "
                f"{size / 1e6:,.1f} MB and the model need {needed / 1e6:,.1f} MB more, {free / 1e6:,.1f} MB are free; "
                "make room, or lower train.keep"
            )


def count_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())  # of a DTensor, all its shards


# torch.distributed.checkpoint.state_dict does not fit here: it takes no averages, and no optimizer over two models; it
# takes an optimizer step to create missing moments, and it loses their memory format.
def gather_full_tensors(accelerator: Accelerator, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors gathered from their shards on the main process, and nothing on the others."""
    result = {}
    for name, tensor in tensors.items():
        gathered = gather_full_tensor(tensor.detach())
        if accelerator.is_main_process:
            result[name] = gathered.cpu() if isinstance(tensor, DTensor) else gathered
    return result


def restore_tensors(tensors: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Copy saved values into tensors, whole or sharded. Raises ValueError if names or shapes differ."""
    missing, unknown = sorted(set(tensors) - set(saved)), sorted(set(saved) - set(tensors))
    shapes = [
        f"{name} {tuple(saved[name].shape)} instead of {tuple(tensors[name].shape)}"
        for name in sorted(set(tensors) & set(saved))
        if saved[name].shape != tensors[name].shape
    ]
    for what, names in {"it lacks": missing, "it has unknown": unknown, "it has": shapes}.items():
        if names:
            raise ValueError(f"{what} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(shard_like(tensor, saved[name]))


def shard_like(tensor: Tensor, saved: Tensor) -> Tensor:
    """Move a saved tensor to the device of `tensor`, and shard it in the same way."""
    saved = saved.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return saved
    return distribute_tensor(saved, tensor.device_mesh, tensor.placements, src_data_rank=None)


def flatten_optimizer(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's tensors by "index.name", where the index counts its parameters.

    Learning rates and weight decays are left out; they come from the configuration.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, values in state.items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the tensors of `flatten_optimizer`. Raises ValueError if they do not fit the parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := [key for key in tensors if int(key.split(".")[0]) >= len(parameters)]:
        raise ValueError(f"its optimizer has {len(unknown)} tensors too many")
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        state = optimizer.state[parameter]
        if value.ndim == 0:
            state[name] = value.to(parameter.device).clone() if value.is_floating_point() else int(value)
        elif value.shape == parameter.shape:
            # With the memory format of the parameter, which fused kernels expect
            state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(shard_like(parameter, value)).detach()
        elif value.numel() == parameter.numel() and name in ("exp_avg", "exp_avg_sq"):
            raise ValueError(f"its optimizer's {key} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        else:
            # The scales and tables of an 8-bit optimizer
            state[name] = value.to(parameter.device)


def flatten_config(config: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Turn {"data": {"path": ...}} into {"data.path": ...}."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        result |= flatten_config(value, f"{name}{key}.") if nested else {f"{name}{key}": value}
    return result


def is_off(name: str, value: Any) -> bool:
    """Return whether an option is as if it did not exist."""
    return value == NEW_OPTIONS[name] if name in NEW_OPTIONS else "." not in name and not value


def select_fixed_settings(stage: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a stage and of TrainConfig that decide what a model learns."""
    fixed = {name: value for name, value in flatten_config(stage).items() if not name.startswith(MUTABLE_KEYS)}
    return fixed | {f"train.{name}": train[name] for name in FIXED_TRAIN_KEYS}


@contextmanager
def lock_folder(accelerator: Accelerator, folder: Path, setting: str = "train.output") -> Iterator[None]:
    """Lock a folder for this run until the context ends. Raises InputError if another run has locked it."""
    files: list[Any] = []

    def lock() -> None:
        """Create the folder and lock it. Raises InputError if that fails, or another process has locked it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115  open until the run ends
        except OSError as error:
            raise InputError(f"{setting}={str(folder)!r} cannot be written ({error}); give another folder") from error
        # The lock ends with the process, so that a killed run leaves none behind
        files.append(file)
        if not lock_file(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(f"{setting}={str(folder)!r} is locked by {holder}; wait for it or stop it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()

    try:
        run_on_main_process(accelerator, lock)
        yield
    finally:
        for file in files:
            file.close()
