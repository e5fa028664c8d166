"""Time real optimizer steps of the training loop of a prior or a decoder on random encodings.

    python -m benchmarks.training_step configs/base/prior.yaml train.batch_size=64 [--tokens 20] [--steps 10]

Prints one JSON line: samples per second, memory, and the fraction of the machine's rate in matrix products.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from t2i.training.common.health import HealthMonitor
from t2i.training.common.log import measure_peak_memory
from t2i.training.common.loop import (
    Stage,
    build_accelerator,
    compute_gradient,
    iterate_training_batches,
    prepare_state,
    update_weights,
)
from torch import Generator, Tensor

from benchmarks.side_by_side import count_operations, measure_matrix_rate, time_in_turns
from t2i.config import TrainConfig, load_config
from t2i.data import Batch
from t2i.data.cache import AutoencoderFacts, ClipFacts
from t2i.data.dataset import SampleDataset, SampleIndex
from t2i.diffusion.condition import TextEncoding
from t2i.runtime.processes import ProcessWatch

WARM_UP = 3
BATCHES = 64  # made ahead, used one after the other
QUIET = ["train.output=unused", "train.trackers=[]", "train.sample_every=0", "train.dry_run=true"]  # writes nothing
QUIET += ["data.balance_by=null", "data.in_sentence=0", "data.sentences=null"]  # and needs no data


class RandomEncodings(SampleDataset):
    """Random encodings in the shapes of a CLIP (ViT-L/14 by default) and of an autoencoder.

    lengths: tokens of each caption of the first batch; every batch has as many samples. If they differ, the captions of
    later batches have random lengths from the shortest to the longest, so that a step has other shapes than the one
    before, as real ones have. Each process draws its own.
    """

    validation, text_encoder_facts, made_from = None, None, {"data": "random"}

    def __init__(self, lengths: list[int], latents: tuple[int, int, int] = (4, 1, 1), width: int = 768):
        self.clip_facts = ClipFacts("random", "0" * 16, embed_dim=width, text_width=width, context_length=77)
        self.autoencoder_facts = AutoencoderFacts("random", "0" * 16, channels=latents[0], factor=8)
        self.dataset, count = self, len(lengths)
        z_i, z_t = (torch.nn.functional.normalize(torch.randn(count, width), dim=-1) for _ in range(2))
        states, latent, shortest = torch.randn(count, max(lengths), width), torch.randn(count, *latents), min(lengths)
        generator = Generator().manual_seed(int(os.environ.get("RANK", "0")))
        self.batches, self.calls = list[Batch](), 0
        for i in range(1 if shortest == max(lengths) else BATCHES):
            own = (
                torch.randint(shortest, max(lengths) + 1, (count,), generator=generator) if i else torch.tensor(lengths)
            )
            mask = torch.arange(int(own.max())) < own[:, None]
            text = TextEncoding(z_t, states[:, : mask.shape[1]] * mask[..., None], mask)
            self.batches.append(Batch(torch.arange(count), image_embeds=z_i, latents=latent, text=text))

    def __len__(self) -> int:
        return 1_000_000

    def __getitems__(self, keys: list[SampleIndex]) -> Batch:
        self.calls += 1
        return self.batches[(self.calls - 1) % len(self.batches)]

    def forget_captions(self) -> None:
        """Make all batches the same and without captions, for a model that reads none."""
        self.batches = [replace(self.batches[0], text=None)]

    def get_sample_key(self, index: int) -> str:
        return str(index)

    def to(self, device: torch.device) -> None:
        pass

    def encode(self, batch: Batch) -> Batch:
        return batch

    def null(self) -> TextEncoding:
        width = self.clip_facts.embed_dim
        return TextEncoding(torch.zeros(1, width), torch.zeros(1, 2, width), torch.ones(1, 2, dtype=torch.bool))

    def compute_statistics(self) -> tuple[Tensor, Tensor]:
        width = self.clip_facts.embed_dim
        return torch.zeros(width), torch.full((width,), width**-0.5)


class Steps:
    """Optimizer steps of the training loop, one for each call, without saving and logging."""

    def __init__(self, accelerator: Accelerator, stage: Stage, config: TrainConfig):
        self.accelerator, self.stage, self.state = accelerator, stage, prepare_state(accelerator, stage, config)
        self.watch, self.health = (
            ProcessWatch(accelerator, 600, str),
            HealthMonitor(accelerator, stage.dataset, "unused"),
        )
        self.loader = iterate_training_batches(stage, self.state)

    def __call__(self) -> None:
        norm = compute_gradient(self.accelerator, self.stage, self.state, self.loader, None, self.watch, self.health)
        healthy, _ = self.health.judge_step(self.state.step, norm, 0)
        update_weights(self.accelerator, self.state, 1e-5, healthy)

    def count_operations(self, steps: int) -> float:
        """Return the floating-point operations of a step, averaged: captions of several lengths differ in cost."""
        return count_operations(lambda: [self() for _ in range(steps)]) / steps


def build_steps(path: str, overrides: list[str], lengths: Callable[[int], int]) -> Steps:
    """Return the steps of a configuration on random encodings; lengths: sample in a batch -> tokens of its caption.

    The emoji's encodings have the shapes of their models, all others those of ViT-L/14 and a VAE of factor 8.
    """
    name = Path(path).stem.split("-")[0]
    script = import_module(f"t2i.training.train_{name}")
    config = load_config(script.Config, name, [path, *QUIET, "cache=null", *overrides])
    AcceleratorState._reset_state()  # another precision than a measurement before it
    accelerator = build_accelerator(config.train)
    size = config.data.image_size
    latents, width = ((16, size // 16, size // 16), 192) if "emoji" in path else ((4, size // 8, size // 8), 768)
    source = RandomEncodings([lengths(i) for i in range(config.train.batch_size)], latents, width)
    if not getattr(config, "reads_captions", True):
        source.forget_captions()
    return Steps(accelerator, script.build_stage(config, source, accelerator.device), config.train)


def measure(path: str, overrides: list[str], tokens: int, steps: int) -> dict[str, Any]:
    step = build_steps(path, overrides, lambda _: tokens)
    accelerator, state = step.accelerator, step.state
    step()
    operations = step.count_operations(1)
    seconds = time_in_turns({"ours": step}, rounds=steps, warm=WARM_UP)["ours"]
    median = statistics.median(seconds)
    limit = measure_matrix_rate(torch.float32 if accelerator.mixed_precision == "no" else torch.bfloat16)
    return {
        "config": path,
        "overrides": overrides,
        "tokens": tokens,
        "parameters": sum(each.numel() for each in state.model.parameters()),
        "precision": accelerator.mixed_precision,
        "samples_per_second": round(state.samples_per_step / median, 1),
        "seconds_a_step": round(median, 5),
        "spread": round((max(seconds) - min(seconds)) / median, 2),
        "tflops": round(operations / median / 1e12, 2),
        "share_of_matrix_product": round(operations / median / limit, 2),
        "memory_gb": round(measure_peak_memory(accelerator), 2),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step")
    parser.add_argument("config", help="such as configs/base/prior.yaml")
    parser.add_argument("overrides", nargs="*", help="such as train.batch_size=64")
    parser.add_argument("--tokens", type=int, default=20, help="of each caption")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    options = parser.parse_intermixed_args()
    result = measure(options.config, options.overrides, options.tokens, options.steps)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
