"""What a cache is worth: a prior's training steps with pictures and captions encoded on the fly, and from a cache.

    python -m benchmarks.cached_prior configs/emoji/prior.yaml [key=value ...]

The configuration names the cache. Both ways train the same model in one process, in turns. Prints one JSON line:
samples a second of whole training steps, and of getting the encoded samples alone, the part that a cache takes over.
"""

import json
import statistics
import sys
import time
from typing import Any

import torch
from t2i.training.common.encodings import open_source
from t2i.training.common.health import HealthMonitor
from t2i.training.common.loop import (
    build_accelerator,
    compute_gradient,
    iterate_training_batches,
    prepare_state,
    update_weights,
)
from t2i.training.train_prior import Config, build_stage

from benchmarks.side_by_side import synchronize
from t2i.config import load_config
from t2i.runtime.processes import ProcessWatch

ROUNDS = 5
STEPS = {"live": 4, "cached": 20}  # a round


def measure(arguments: list[str]) -> dict[str, Any]:
    settings = ["train.output=unused", "train.trackers=[]", "train.sample_every=0", "train.dry_run=true"]
    config = load_config(Config, "prior", [*arguments, *settings])
    accelerator = build_accelerator(config.train)
    ways = {}
    for name, cache in {"live": None, "cached": config.cache}.items():
        source = open_source(cache, config.data, config.clip)
        stage = build_stage(config, source, accelerator.device)
        state = prepare_state(accelerator, stage, config.train)
        health = HealthMonitor(accelerator, stage.dataset, "unused")
        ways[name] = (
            source,
            stage,
            state,
            iterate_training_batches(stage, state),
            ProcessWatch(accelerator, 600, str),
            health,
        )

    def run(name: str, what: str) -> float:
        """Samples per second."""
        source, stage, state, loader, watch, health = ways[name]
        synchronize()
        begun = time.perf_counter()
        for _ in range(STEPS[name]):
            if what == "encoded samples":
                source.encode(next(loader).to(accelerator.device))
            else:
                norm = compute_gradient(accelerator, stage, state, loader, None, watch, health)
                health.judge_step(state.step, norm, 0)
                update_weights(accelerator, state, 1e-5, True)
        synchronize()
        return STEPS[name] * state.samples_per_step / (time.perf_counter() - begun)

    result: dict[str, Any] = {}
    for what in ("training steps", "encoded samples"):
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for name in ways:
            run(name, what)  # warm
        for _ in range(ROUNDS):
            for name, found in speeds.items():
                found.append(run(name, what))
        ratios = [cached / live for live, cached in zip(speeds["live"], speeds["cached"])]
        result[what] = {name: round(statistics.median(found), 1) for name, found in speeds.items()}
        result[what] |= {"ratio": round(statistics.median(ratios), 1), "from": round(min(ratios), 1)}
        result[what]["to"] = round(max(ratios), 1)
    return {
        **result,
        "precision": accelerator.mixed_precision,
        "workers": config.data.num_workers,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:])))
