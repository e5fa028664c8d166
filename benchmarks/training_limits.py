"""What holds training back: the matrix rate, and the data. Two kinds of rows, of the training loop's own steps:

- a step against matrix products of as many operations, in turns, by the faster of torch's two libraries: the ratio is
  the share of the machine's matrix rate (operations of convolutions, linear layers and attention count; fp32, and bf16
  where the device computes in it); each step has captions of other lengths than the one before;
- steps that read the real cache against steps on the same batches, held in memory: 1 means that reading costs nothing.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from t2i.training import train_decoder, train_prior
from t2i.training.common.encodings import open_source
from t2i.training.common.loop import build_accelerator

from benchmarks.side_by_side import Row, Times, alternate, device, row, run
from benchmarks.training_step import QUIET, Steps, made_up_steps
from t2i.config import load_config
from t2i.data import Batch
from t2i.data.dataset import SampleIndex
from t2i.errors import InputError
from t2i.networks.linear import is_onednn_faster, multiply_by_onednn
from t2i.runtime.devices import choose_training_precision

SCRIPTS: dict[str, Any] = {"prior": train_prior, "decoder": train_decoder}
CACHE = Path("runs/emoji/cache")
HELD = 32  # batches in memory: as many shapes, nearly, as a reader's
STEPS = 4  # a turn
ROUNDS = 5


def main(quick: bool) -> list[Row]:
    if quick:
        return [matrix_share(name, f"configs/tiny/{name}.yaml", [], "no", 1, 1) for name in SCRIPTS]
    rows = []
    for precision in precisions():
        rows += [matrix_share(name, f"configs/emoji/{name}.yaml", [], precision, ROUNDS, STEPS) for name in SCRIPTS]
        # A transformer of 309 M parameters, at a batch that fits into memory here.
        rows.append(matrix_share("decoder", "configs/base/decoder.yaml", ["train.batch_size=4"], precision, 3, 1))
    return rows + readings(ROUNDS)


def readings(rounds: int) -> list[Row]:
    """What reading costs; without a cache of these models a line that says so, and no rows."""
    if not CACHE.is_dir():
        made = "`t2i data cache configs/emoji/cache.yaml` makes it"
        print(f"what reading costs is not measured: {str(CACHE)!r} is not there; {made}", file=sys.stderr)
        return []
    try:
        return [reading(name, rounds) for name in SCRIPTS]
    except InputError as error:  # a cache of other models
        print(f"what reading costs is not measured: {error}", file=sys.stderr)
        return []


def precisions() -> list[str]:
    best = choose_training_precision(device().type)
    return ["no"] if best == "no" else ["no", best]


def matrix_share(name: str, path: str, overrides: list[str], precision: str, rounds: int, steps: int) -> Row:
    """Steps of a configuration, against products of square matrices of the same type with as many operations."""
    settings = [*overrides, f"train.mixed_precision={precision}"]
    step = made_up_steps(path, settings, lambda i: 5 + i % 16)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    step()
    count = step.operations(steps)
    repeated = math.ceil(count / (2 * 2048**3))
    size = math.ceil((count / 2 / repeated) ** (1 / 3) / 16) * 16
    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))

    multiply = multiply_by_onednn if is_onednn_faster(a, b) else torch.matmul  # the machine's limit, not a library's

    def products() -> None:
        for _ in range(repeated):
            multiply(a, b)

    times = alternate(
        {"ours": several(step, steps), "matrix products": several(products, steps)}, rounds=rounds, warm=1
    )
    share = count / (2 * repeated * size**3)
    times = Times(times.seconds | {"matrix products": [one * share for one in times.seconds["matrix products"]]})
    samples, kind = step.state.samples_per_step, "fp32" if precision == "no" else precision
    wanted = 0.5 if name == "decoder" else None
    size_of_model = sum(one.numel() for one in step.state.model.parameters()) / 1e6
    note = f"{size_of_model:.1f} M parameters, {count / 1e9:.1f} GFLOP in products and convolutions"
    return row(f"{steps} {name} training steps of {path}, batch {samples}, {kind}", times, wanted, note=note)


class Held:
    """The first batches of a data set, again and again: what reading would cost nothing with."""

    def __init__(self, dataset: Any):
        self.dataset, self.batches, self.calls = dataset, list[Batch](), 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[SampleIndex]) -> Batch:
        if len(self.batches) < HELD:
            self.batches.append(self.dataset.__getitems__(keys))
            return self.batches[-1]
        self.calls += 1
        return self.batches[self.calls % HELD]

    def sample_key(self, index: int) -> str:
        return self.dataset.sample_key(index)


def reading(name: str, rounds: int) -> Row:
    """Steps from the real cache, against as many on batches of it that are in memory."""
    script, ways = SCRIPTS[name], dict[str, Callable[[], None]]()
    models = ["clip=models/emoji/clip"] + (["autoencoder=models/emoji/autoencoder"] if name == "decoder" else [])
    config = load_config(script.Config, name, [f"configs/emoji/{name}.yaml", *QUIET, *models])
    AcceleratorState._reset_state()
    accelerator = build_accelerator(config.train)
    for way in ("ours", "batches in memory"):
        autoencoder = [config.autoencoder] if name == "decoder" else []
        reads = [] if name == "prior" else [False]
        source = open_source(config.cache, config.data, config.clip, *autoencoder, *reads)
        stage = script.build_stage(config, source, accelerator.device)
        if way != "ours":
            stage = replace(stage, dataset=Held(source.dataset))
        steps = Steps(accelerator, stage, config.train)
        if way != "ours":
            for _ in range(HELD):
                next(steps.loader)
        ways[way] = several(steps, STEPS)
    times = alternate(ways, rounds=rounds)
    title = f"{STEPS} {name} training steps from the cache, batch {config.train.batch_size}"
    return row(title, times, 0.97, note="1 means that reading the data costs nothing")


def several(step: Callable[[], None], steps: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(steps):
            step()

    return work


if __name__ == "__main__":
    run("training_limits", main)
