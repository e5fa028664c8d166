"""A run small enough to break a hundred times: the real loop, on three small layers and numbers instead of images.

    python tests/faults/tiny_run.py OUTPUT [key=value ...] [fault:rank:step ...]

Faults of one process in one step: nan, nans (from then on), spike, raise, die, stop (SIGSTOP), sleep (in reading data),
signal (SIGTERM to itself), memory, disagree, twist; inf and huge (finite, but its gradient's norm is not).
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i.training.common.loop import Stage, build_accelerator, fit

from t2i.config import TrainConfig  # noqa: E402
from t2i.data import Batch  # noqa: E402
from t2i.data.dataset import SampleDataset  # noqa: E402
from t2i.errors import InputError, report_errors  # noqa: E402
from t2i.runtime.launch import end_process_group

SIZE = 40
SETTINGS = {
    "steps": 12,
    "batch_size": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "log_every": 1,
    "save_every": 3,
    "mixed_precision": "no",
    "trackers": [],
    "sample_every": 0,
    "validate_every": 0,
    "ema_decay": 0.9,
}


class Numbers(SampleDataset):
    """Sample i is a vector that i determines."""

    def __init__(self, size: int = SIZE, rejected: float = 0.0):
        self.size, self.rejected = size, rejected
        self.sleeps = 0  # from which position on

    def __len__(self) -> int:
        return self.size

    def get_sample_key(self, index: int) -> str:
        return f"number-{index:02}"

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        if self.sleeps and keys[0][1] >= self.sleeps:
            time.sleep(1000)
        rows = [torch.randn(8, generator=torch.Generator().manual_seed(index)) for index, _ in keys]
        bad = [
            (self.get_sample_key(index), "gone") for index, draw in keys if (draw * 7919 % 1000) / 1000 < self.rejected
        ]
        return Batch(torch.tensor([index for index, _ in keys]), image=torch.stack(rows), rejected=bad)


class Layers(nn.Module):
    config = {"scaled": True}

    def __init__(self, scaled: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.scale = nn.Parameter(torch.ones(() if scaled else 8))  # sharding knows no single numbers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * self.scale

    @classmethod
    def from_config(cls, config: dict) -> "Layers":
        return cls(**config)


def shard(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What accelerate's `prepare` does for FSDP2, which it does on GPUs alone."""
    model.config = {"scaled": False}
    for part in (*model.layers, model):
        if list(part.parameters()):
            fully_shard(part)
    groups = optimizer.param_groups
    weights = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]
    for group, parameters in zip(groups, weights):
        group["params"] = parameters
    return model, optimizer


def run(output: Path, *arguments: str) -> None:
    faults = [argument.split(":") for argument in arguments if ":" in argument]
    pairs = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    sharded, scaler = bool(pairs.pop("sharded", "")), bool(pairs.pop("scaler", ""))
    size, rejected = int(pairs.pop("size", SIZE)), float(pairs.pop("rejected", 0))
    workers, kind = int(pairs.pop("workers", 0)), pairs.pop("kind", "plain")
    types = {name: type(value) for name, value in vars(TrainConfig(output="x")).items()}
    config = TrainConfig(output=str(output), **{**SETTINGS, **{k: types[k](v) for k, v in pairs.items()}})
    accelerator = build_accelerator(config)
    step, data = 0, Numbers(size, rejected)

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        nonlocal step
        step += model.training  # of this process: micro-batches since it started
        value = (model(batch.image + torch.randn_like(batch.image)) - batch.image).square().mean()
        for fault, rank, when in faults if model.training else ():
            if int(rank) == accelerator.process_index and step >= int(when):
                value = broken(fault, value, step == int(when), output)
        return {"loss": value}

    def export(model: nn.Module) -> None:
        torch.manual_seed(0)
        (output / "exported.txt").write_text(str(model(torch.ones(1, 8)).sum().item()))

    made_from = {"data": pairs.get("seed", "0")}
    if any(fault == "disagree" for fault, *_ in faults) and accelerator.process_index == 1:
        made_from = {"data": "other"}
    if faults and faults[0][0] == "sleep" and int(faults[0][1]) == accelerator.process_index:
        data.sleeps = 20
    if sharded:
        accelerator.prepare = shard
    if scaler:
        # fp16's loss scaling, for which there is no GPU here, with the arithmetic left in fp32.
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**20), True
        accelerator.state._mixed_precision, accelerator.autocast = "fp16", contextlib.nullcontext

    def preview(model: nn.Module) -> dict[str, Image.Image]:
        torch.randn(3)
        return {"picture": Image.new("L", (4, 4), int(model(torch.ones(1, 8)).sum().item()) % 256)}

    stage_config = {"twist": int(any(fault == "twist" for fault, *_ in faults) and accelerator.process_index == 1)}
    stage_config["kind"] = kind
    model, held_out = Layers(not sharded), Numbers(7)
    stage = Stage(model, loss, data, export, made_from, stage_config, workers, held_out, preview)
    fit(accelerator, stage, config)


def broken(fault: str, value: torch.Tensor, now: bool, output: Path) -> torch.Tensor:
    """What a fault does in the step that it is for; some go on in the steps after it."""
    match fault:
        case "nan" if now:
            return value * float("nan")
        case "inf" if now:
            return value / 0
        case "nans":
            return value * float("nan")
        case "huge" if now:
            return value * 1e30
        case "spike" if now:
            return value * 100
        case "raise" if now:
            raise InputError("the image of process 1 is bad")
        case "die" if now and not (output / "died").exists():
            (output / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop" if now:
            os.kill(os.getpid(), signal.SIGSTOP)
        case "signal" if now:
            os.kill(os.getpid(), signal.SIGTERM)
        case "memory" if now:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")
        case "allocator" if now:
            torch.empty(2**52, dtype=torch.uint8)
        case "python" if now:
            bytearray(2**52)
        case "kernel" if now:
            raise RuntimeError("could not create a primitive")  # oneDNN's own words
        case "broken" if now:
            raise RuntimeError("a size does not match")
    return value


if __name__ == "__main__":
    with report_errors():
        run(Path(sys.argv[1]), *sys.argv[2:])
        end_process_group()
