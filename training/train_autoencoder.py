"""Train the autoencoder between pictures and latents.

accelerate launch training/train_autoencoder.py configs/emoji/autoencoder.yaml train.steps=1000
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image

from t2i.autoencoder import Autoencoder, load_autoencoder
from t2i.checkpoint import export_model, weights_digest
from t2i.config import DataConfig, TrainConfig, build, check_multiple, check_range
from t2i.data import Batch, CaptionedPictures, held_out_pictures
from t2i.finetuning import start_from
from t2i.launch import run
from t2i.loop import Stage, fit, start
from t2i.preview import SampleConfig, autoencoder_preview, fixed_records

MEASURED = 4096  # pictures that set the scale of the latents, at most


@dataclass
class Config:
    model: dict[str, Any] = field(default_factory=dict)  # arguments of t2i.autoencoder.Autoencoder
    init: str | None = None  # folder of a trained autoencoder to start from, instead of random weights;
    # or a diffusers VAE: a folder or a hub name
    kl_weight: float = 1e-3  # of the divergence from N(0, 1), in nats per pixel value
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # what is drawn every train.sample_every steps

    def __post_init__(self) -> None:
        check_range("kl_weight", self.kl_weight, 0, 1e6)


def main(config: Config) -> None:
    dataset, held_out = CaptionedPictures(config.data), held_out_pictures(config.data)
    accelerator = start(config.train)
    made_from = {"data": dataset.digest()}
    if config.init is None:
        autoencoder = build(Autoencoder, "model", config.model)
    else:
        autoencoder = start_from(load_autoencoder, config.init, config.model)
        made_from["init"] = weights_digest(autoencoder)
    autoencoder.to(memory_format=torch.channels_last)
    check_multiple("data.image_size", config.data.image_size, autoencoder.factor)

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        reconstruction, kl = model(batch.image)
        reconstruction = reconstruction.float()
        absolute = F.l1_loss(reconstruction, batch.image)
        squared = F.mse_loss(reconstruction.detach().clamp(-1, 1), batch.image)
        psnr = 10 * torch.log10(4 / squared)  # dB; pictures span 2
        return {"loss": absolute + config.kl_weight * kl.float().mean(), "kl": kl.mean(), "psnr": psnr}

    def export(average: torch.nn.Module) -> None:
        average.measure(dataset.sample(MEASURED, batch_size=64))
        export_model(average, Path(config.train.output))

    count = config.sample.count if config.train.sample_every else 0
    records = fixed_records(held_out or dataset, count)

    def preview(average: torch.nn.Module) -> dict[str, Image]:
        return {"reconstructions": autoencoder_preview(average, records.image)} if records else {}

    workers = config.data.num_workers
    stage = Stage(autoencoder, loss, dataset, export, made_from, asdict(config), workers, held_out, preview)
    fit(accelerator, stage, config.train)


if __name__ == "__main__":
    run(main, Config, "autoencoder", sys.argv[1:])
