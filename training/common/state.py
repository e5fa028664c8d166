"""The state of a run: what a checkpoint holds, and what has to be the same for a run to go on from it."""

import os
import shutil
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

from t2i.config import TrainConfig
from t2i.errors import InputError, RunError
from t2i.runtime.processes import run_on_main_process

try:
    import fcntl
except ImportError:  # Windows: two trainers in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

FIXED_TRAIN_KEYS = ("seed", "optimizer")  # of TrainConfig
PATH_KEYS = (
    "clip",
    "autoencoder",
    "text_encoder",
    "cache",
    "init",
    "perceptual_clip",
)  # what they are is in `made_from`
MUTABLE_KEYS = ("train.", "sample.", "data.path", "data.num_workers", *PATH_KEYS)
WEIGHT_COPIES = 4  # of the trained weights in a checkpoint: themselves, their average, and AdamW's two moments


@dataclass
class TrainState:
    """Everything that changes while a model learns. Its position in the data is a function of the step."""

    accelerator: Accelerator
    config: TrainConfig
    model: nn.Module  # bare: neither wrapped nor compiled
    model_class: Any  # its class; sharding changes that
    average: EMA
    optimizer: Optimizer
    made_from: dict[str, str]  # what the run depends on beside its configuration: the data, the models before it
    stage_config: dict[str, Any]  # the stage's whole configuration
    step: int = 0
    skipped: int = 0  # steps in a row whose loss or gradient was not finite
    critic: nn.Module | None = None  # bare; its weights are in the optimizer, and not averaged

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.config.output) / "checkpoints"

    @property
    def samples_per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation * self.accelerator.num_processes

    def save_state(self) -> None:
        """Write a checkpoint; every process has to call it. Raises OSError, nothing changed, if it cannot."""
        tensors = {
            "model": gather_full_tensors(self.accelerator, self.model.state_dict()),
            "ema": gather_full_tensors(self.accelerator, self.average.values),
            "optimizer": gather_full_tensors(self.accelerator, flatten_optimizer(self.optimizer)),
        }
        if self.critic is not None:
            tensors["critic"] = gather_full_tensors(self.accelerator, self.critic.state_dict())
        state: dict[str, Any] = {"config": asdict(self.config), "made_from": self.made_from, "skipped": self.skipped}
        state["stage"] = self.stage_config
        state["samples_per_step"] = self.samples_per_step
        state["num_processes"] = self.accelerator.num_processes
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()

        def write() -> None:
            for problem in save_checkpoint(self.checkpoint_folder, self.step, tensors, state, self.config.keep):
                self.accelerator.print(f"warning: {problem}")

        run_on_main_process(self.accelerator, write)

    def load_state(self) -> None:
        """Go on from the newest checkpoint that verifies, or from the one that the configuration names."""
        path = run_on_main_process(self.accelerator, self.find_checkpoint)
        if path is None:
            return
        if not path.is_dir():
            raise InputError(
                f"process {self.accelerator.process_index} does not see {path}; it must be a shared folder"
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
            raise InputError(f"{path} is of another model: {error}; start in another train.output") from error
        if self.accelerator.scaler is not None and "scaler" in checkpoint.state:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.step, self.skipped = checkpoint.state["step"], checkpoint.state["skipped"]
        self.accelerator.print(f"resuming from {path}")

    def find_checkpoint(self) -> Path | None:
        if self.config.resume != "latest":
            asked = self.checkpoint_folder / Path(self.config.resume).name
            if problem := verify_checkpoint(asked):
                raise RunError(f"train.resume asks for {asked}, but {problem}")
            if newer := [path.name for path in find_checkpoints(self.checkpoint_folder) if path.name > asked.name]:
                raise InputError(
                    f"train.resume asks for {asked}, but there are newer ones: {', '.join(newer)}; move them out of "
                    f"{self.checkpoint_folder} to go on from there, or leave train.resume out to go on from the newest"
                )
            return asked
        path, problems = find_newest_checkpoint(self.checkpoint_folder)
        for problem in problems:
            self.accelerator.print(f"skipped: {problem}")
        if path is None and problems:
            raise RunError(
                f"no checkpoint in {self.checkpoint_folder} is whole; delete them to start anew. "
                f"The first: {problems[0]}"
            )
        return path

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Refuse what would make a resumed run another run: other samples, other noise, other data or models."""
        state, config = checkpoint.state, self.config
        before = {
            **select_fixed_settings(state["stage"]),
            **{f"train.{name}": state["config"][name] for name in FIXED_TRAIN_KEYS},
        }
        now = {
            **select_fixed_settings(self.stage_config),
            **{f"train.{name}": getattr(config, name) for name in FIXED_TRAIN_KEYS},
        }
        for name in sorted({**before, **now}):
            if name not in before and "." not in name and not now[name]:
                continue  # an option that came later, and is off
            if before.get(name) != now.get(name):
                raise InputError(
                    f"{checkpoint.path} was trained with {name}={before.get(name)!r}, now {now.get(name)!r}; "
                    "keep it, or start in another train.output"
                )
        if state["samples_per_step"] != self.samples_per_step:
            raise InputError(
                f"{checkpoint.path} was trained with {state['samples_per_step']} samples a step (batch_size "
                f"{state['config']['batch_size']} x gradient_accumulation {state['config']['gradient_accumulation']} x "
                f"{state['num_processes']} processes), now {config.batch_size} x {config.gradient_accumulation} x "
                f"{self.accelerator.num_processes} = {self.samples_per_step}; keep the product, or start in another "
                "train.output"
            )
        for name, value in self.made_from.items():
            if (before := state["made_from"].get(name)) != value:
                raise InputError(
                    f"{checkpoint.path} was trained with another {name} ({before}, now {value}); "
                    "start in another train.output"
                )

    @contextmanager
    def gather_ema_model(self) -> Iterator[nn.Module]:
        """The averaged model, on the main process whole even if training shards it. Every process has to ask for it."""
        with self.average.ema_weights() as model:
            if not any(isinstance(one, DTensor) for one in self.average.values.values()):
                yield model
                return
            weights = gather_full_tensors(self.accelerator, model.state_dict())
        if self.accelerator.is_main_process:
            model = self.model_class.from_config(self.model.config)
            model.load_state_dict(weights)
            model = model.to(self.accelerator.device).eval()
        yield model

    def describe_newest_checkpoint(self) -> str:
        """The newest checkpoint, for messages about a run that fails."""
        found = find_checkpoints(self.checkpoint_folder)
        return f"{found[-1]} is kept, the same command goes on from there" if found else "There is no checkpoint yet"

    def count_checkpoint_bytes(self) -> int:
        trained = sum(one.numel() * one.element_size() for one in self.average.parameters.values())
        critic = 0 if self.critic is None else sum(one.nbytes for one in self.critic.state_dict().values())
        return (WEIGHT_COPIES - 1) * (trained + critic) + self.count_model_bytes()  # a critic has no average

    def count_model_bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in self.model.state_dict().values())

    def check_disk_space(self) -> None:
        """Refuse to start where the checkpoints will not fit."""
        size, keep = self.count_checkpoint_bytes(), self.config.keep
        held = sum(path.stat().st_size for path in self.checkpoint_folder.glob("step-*/*") if path.is_file())
        exported = 2 * self.count_model_bytes()  # for a moment there are two
        needed = max(size, (keep + 1) * size - held) + exported
        free = shutil.disk_usage(self.config.output).free
        if free < needed:
            raise InputError(
                f"too little disk for train.output={self.config.output!r}: {keep + 1} checkpoints of "
                f"{size / 1e6:,.1f} MB and the model need {needed / 1e6:,.1f} MB more, {free / 1e6:,.1f} MB are free; "
                "make room, or lower train.keep"
            )


def gather_full_tensors(accelerator: Accelerator, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the main process, gathered from their shards; nothing on the others."""
    found = {}
    for name, tensor in tensors.items():
        gathered = gather_full_tensor(tensor.detach())
        if accelerator.is_main_process:
            found[name] = gathered.cpu() if isinstance(tensor, DTensor) else gathered
    return found


def restore_tensors(tensors: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Copy saved values into tensors, whole or sharded, of the same names and shapes."""
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
    """A saved tensor on the device of another, and sharded as that is."""
    saved = saved.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return saved
    return distribute_tensor(saved, tensor.device_mesh, tensor.placements, src_data_rank=None)


def flatten_optimizer(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's tensors by "index.name"; its rates and decays belong to the configuration."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, values in state.items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put saved tensors back, each in its parameter's memory format, which fused kernels expect, and sharding."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := [key for key in tensors if int(key.split(".")[0]) >= len(parameters)]:
        raise ValueError(f"its optimizer has {len(unknown)} tensors more than this model needs")
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        state = optimizer.state[parameter]
        if value.ndim == 0:
            state[name] = value.to(parameter.device).clone() if value.is_floating_point() else int(value)
        elif value.shape == parameter.shape:
            state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(shard_like(parameter, value)).detach()
        elif value.numel() == parameter.numel() and name in ("exp_avg", "exp_avg_sq"):
            raise ValueError(f"its optimizer's {key} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        else:
            state[name] = value.to(parameter.device)


def flatten_config(config: dict[str, Any], name: str = "") -> dict[str, Any]:
    """{"data.path": ...} of {"data": {"path": ...}}"""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inside = isinstance(value, dict) and value
        found |= flatten_config(value, f"{name}{key}.") if inside else {f"{name}{key}": value}
    return found


def select_fixed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a stage's configuration that decides what it learns, not where things lie and how it is shown."""
    return {name: value for name, value in flatten_config(config).items() if not name.startswith(MUTABLE_KEYS)}


@contextmanager
def lock_folder(accelerator: Accelerator, folder: Path, setting: str = "train.output") -> Iterator[None]:
    """The folder for this run alone, as long as it lasts: a second one in it is refused."""
    held: list[Any] = []

    def lock() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115  held until the run ends
        except OSError as error:
            raise InputError(
                f"{setting}={str(folder)!r} cannot be written ({error}); give a folder that is yours"
            ) from error
        held.append(file)
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise InputError(f"{setting}={str(folder)!r} is locked by {holder}; wait for it or stop it") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()

    try:
        run_on_main_process(accelerator, lock)
        yield
    finally:
        for file in held:
            file.close()
