"""What a run says of itself: a line of numbers now and then, and a progress bar."""

import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from t2i.config import TrainConfig


class Log:
    """Means between two lines of `metrics.jsonl`, and a progress bar on the main process."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, step: int, samples_per_step: int):
        self.accelerator, self.config, self.samples_per_step = accelerator, config, samples_per_step
        self.sums: dict[str, Tensor] = {}
        self.count, self.logged, self.time = 0, step, time.perf_counter()
        shown = accelerator.is_main_process
        self.bar = tqdm(total=config.steps, initial=step, disable=not shown, mininterval=5, dynamic_ncols=True)
        self.bar.set_description(Path(config.output).name)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Sums stay on the device: no step waits for the host."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.count += 1

    def step(self, step: int, rate: float, norm: Tensor | None) -> None:
        self.bar.update()
        if step % self.config.log_every and step != self.config.steps:
            return
        names = sorted(self.sums)
        means = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]) / self.count, "mean")
        now = time.perf_counter()
        speed = (step - self.logged) * self.samples_per_step / (now - self.time)
        row = {"step": step, **dict(zip(names, means.tolist())), "learning_rate": rate, "samples_per_second": speed}
        if norm is not None:
            row["gradient_norm"] = float(norm)
        if self.accelerator.is_main_process:
            Path(self.config.output).mkdir(parents=True, exist_ok=True)
            with open(Path(self.config.output) / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({name: float(f"{value:.6g}") for name, value in row.items()}) + "\n")
            self.bar.set_postfix({name: f"{row[name]:.4g}" for name in names})
        self.sums, self.count, self.logged, self.time = {}, 0, step, now

    def close(self) -> None:
        self.bar.close()
