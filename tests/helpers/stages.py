"""Training of stages at tiny sizes, and generators."""

from pathlib import Path

import torch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def arguments(stage: str, data: Path, runs: Path, steps: int = 3, **overrides: object) -> list[str]:
    """Return the command-line arguments that train a stage's tiny configuration on `data` into `runs/stage`."""
    frozen = {"prior": ["clip"], "decoder": ["clip", "autoencoder"]}.get(stage, [])
    settings = {"data.path": data, "train.output": runs / stage, "train.steps": steps, "train.decay_steps": 0}
    settings |= {"train.trackers": [], "train.sample_every": 0, "train.validate_every": 0}
    settings |= {"train.warmup_steps": 0, "train.batch_size": 8, "train.save_every": 1000}
    settings |= {part: runs / part for part in frozen} | overrides
    return [str(CONFIGS / "tiny" / f"{stage}.yaml"), *(f"{key}={value}" for key, value in settings.items())]


def train(stage: str, data: Path, runs: Path, steps: int = 3, **overrides: object) -> None:
    """Train a stage in this process, into `runs/stage`."""
    from importlib import import_module

    from t2i.config import load_config

    script = import_module(f"t2i.training.train_{stage}")
    script.main(load_config(script.Config, stage, arguments(stage, data, runs, steps, **overrides)))


def seeds(*numbers: int) -> list[torch.Generator]:
    """Return a generator for each seed."""
    return [torch.Generator().manual_seed(number) for number in numbers]
