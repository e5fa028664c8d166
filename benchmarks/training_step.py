"""How fast a prior or a decoder trains: real optimizer steps of the real loop, from encodings that are made up.

    python -m benchmarks.training_step configs/base/prior.yaml train.batch_size=64 [--tokens 20] [--steps 10]

Prints one JSON line: samples per second, memory, and the share of the machine's own matrix product rate.
"""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from t2i.condition import TextEncoding
from t2i.config import load_config
from t2i.data import Batch
from t2i.data.cache import AutoencoderFacts, ClipFacts
from t2i.data.dataset import Key
from t2i.health import Health
from t2i.log import peak_memory
from t2i.loop import gradient, prepare, read, start, update
from t2i.processes import Watch

WARM_UP = 3


class MadeUp(Dataset):
    """Encodings of nothing, in the shapes of ViT-L/14's and of a VAE of factor 8."""

    clip = ClipFacts("made up", "0" * 16, embed_dim=768, text_width=768, context_length=77)
    autoencoder = AutoencoderFacts("made up", "0" * 16, channels=4, factor=8)
    validation, made_from = None, {"data": "made up"}

    def __init__(self, batch_size: int, latent_size: int, tokens: int):
        self.dataset = self
        z_i, z_t = (torch.nn.functional.normalize(torch.randn(batch_size, 768), dim=-1) for _ in range(2))
        mask = torch.ones(batch_size, tokens, dtype=torch.bool)
        text = TextEncoding(z_t, torch.randn(batch_size, tokens, 768), mask)
        latents = torch.randn(batch_size, 4, latent_size, latent_size)
        self.batch = Batch(torch.arange(batch_size), image_embeds=z_i, latents=latents, text=text)

    def __len__(self) -> int:
        return 1_000_000

    def __getitems__(self, keys: list[Key]) -> Batch:
        return self.batch

    def key(self, index: int) -> str:
        return str(index)

    def to(self, device: torch.device) -> None:
        pass

    def encode(self, batch: Batch) -> Batch:
        return batch

    def null(self) -> TextEncoding:
        return TextEncoding(torch.zeros(1, 768), torch.zeros(1, 2, 768), torch.ones(1, 2, dtype=torch.bool))

    def statistics(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(768), torch.full((768,), 768**-0.5)


def measure(path: str, overrides: list[str], tokens: int, steps: int) -> dict[str, Any]:
    name = Path(path).stem.split("-")[0]
    script = import_module(f"training.train_{name}")
    more = ["train.output=unused", "train.trackers=[]", "train.sample_every=0", "train.dry_run=true", "cache=null"]
    config = load_config(script.Config, name, [path, *more, *overrides])
    accelerator = start(config.train)
    source = MadeUp(config.train.batch_size, config.data.image_size // 8, tokens)
    stage = script.make_stage(config, source, accelerator.device)
    state = prepare(accelerator, stage, config.train)
    watch, health = Watch(accelerator, 600, str), Health(accelerator, source, "unused")
    loader = read(stage, state)

    def step() -> None:
        norm = gradient(accelerator, stage, state, loader, None, watch, health)
        health.verdict(state.step, norm, 0)
        update(accelerator, state, 1e-5, True)

    step()
    with FlopCounterMode(display=False) as flops:
        step()
    for _ in range(WARM_UP):
        step()
    wait(accelerator.device)
    times = []
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        wait(accelerator.device)
        times.append(time.perf_counter() - begun)
    seconds = sorted(times)[len(times) // 2]
    rate = flops.get_total_flops() / seconds
    limit = matrix_rate(accelerator.device, torch.float32 if accelerator.mixed_precision == "no" else torch.bfloat16)
    return {
        "config": path,
        "overrides": overrides,
        "tokens": tokens,
        "parameters": sum(one.numel() for one in state.model.parameters()),
        "precision": accelerator.mixed_precision,
        "samples_per_second": round(state.samples_per_step / seconds, 1),
        "seconds_a_step": round(seconds, 5),
        "spread": round((max(times) - min(times)) / seconds, 2),
        "tflops": round(rate / 1e12, 2),
        "share_of_matrix_product": round(rate / limit, 2),
        "memory_gb": round(peak_memory(accelerator), 2),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the machine's own limit."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 1e9
    for _ in range(8):
        wait(device)
        begun = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def main(arguments: list[str]) -> None:
    options = {"--tokens": 20, "--steps": 10}
    for option in options:
        if option in arguments:
            at = arguments.index(option)
            options[option] = int(arguments[at + 1])
            del arguments[at : at + 2]
    print(json.dumps(measure(arguments[0], arguments[1:], options["--tokens"], options["--steps"])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
