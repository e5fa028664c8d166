"""Train the decoder: image embedding -> latents.

accelerate launch training/train_decoder.py configs/emoji/decoder.yaml train.steps=1000
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from t2i.checkpoint import export_model
from t2i.condition import ImageCondition
from t2i.config import DataConfig, TrainConfig, build, check_choice, check_multiple, check_range
from t2i.data import Batch
from t2i.data.cache import AutoencoderFacts, ClipFacts
from t2i.data.source import open_source
from t2i.decoder import Decoder
from t2i.diffusion import denoise, drop
from t2i.launch import run
from t2i.loop import fit, start
from t2i.unet_decoder import UNetDecoder

ARCHITECTURES = {"transformer": Decoder, "unet": UNetDecoder}


@dataclass
class Config:
    clip: str = (
        "???"  # folder of a trained CLIP, or a public one: ViT-L-14:laion2b_s32b_b82k, hf-hub:name, local-dir:path
    )
    autoencoder: str = "???"  # folder of a trained autoencoder, or a diffusers VAE: a folder or a hub name
    cache: str | None = None  # folder that `t2i data cache` wrote; without one, pictures are encoded in every step
    architecture: str = "unet"  # or transformer
    model: dict[str, Any] = field(default_factory=dict)  # its arguments, but for what CLIP and the autoencoder tell
    scheduler: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' DDIMScheduler
    reads_captions: bool = False  # caption tokens as a second condition
    embedding_dropout: float = 0.1
    caption_dropout: float = 0.5
    timestep_shift: float = 1.0  # above 1, high noise is drawn more often
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_choice("architecture", self.architecture, tuple(ARCHITECTURES))
        check_range("embedding_dropout", self.embedding_dropout, 0, 1)
        check_range("caption_dropout", self.caption_dropout, 0, 1)
        check_range("timestep_shift", self.timestep_shift, 0.01, 100)


def main(config: Config) -> None:
    source = open_source(config.cache, config.data, config.clip, config.autoencoder, config.reads_captions)
    accelerator = start(config.train)
    source.to(accelerator.device)
    check_multiple("data.image_size", config.data.image_size, source.autoencoder.factor)
    scheduler = build(DDIMScheduler, "scheduler", config.scheduler)
    architecture = ARCHITECTURES[config.architecture]
    arguments = decoder_arguments(config, source.clip, source.autoencoder)
    decoder = build(architecture, "model", config.model, **arguments).to(accelerator.device)

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        batch = source.encode(batch)
        z_i, x, text = batch.image_embeds, batch.latents, batch.text
        null = decoder.null(len(x))
        if text is not None:
            text = drop(text, null.text, config.caption_dropout)
        condition = drop(ImageCondition(z_i), ImageCondition(null.embedding), config.embedding_dropout)
        condition = ImageCondition(condition.embedding, text)
        prediction, target = denoise(model, scheduler, x, condition, config.timestep_shift)
        return {"loss": F.mse_loss(prediction, target)}

    def export(average: torch.nn.Module) -> None:
        export_model(average, Path(config.train.output))
        export_model(scheduler, Path(config.train.output), "scheduler")

    fit(accelerator, decoder, loss, source.dataset, config.train, export, config.data.num_workers, source.made_from)


def decoder_arguments(config: Config, clip: ClipFacts, autoencoder: AutoencoderFacts) -> dict[str, Any]:
    """What a decoder takes over from the models that it is trained with."""
    return {
        "embed_dim": clip.embed_dim,
        "latent_channels": autoencoder.channels,
        "latent_size": config.data.image_size // autoencoder.factor,
        "text_width": clip.text_width if config.reads_captions else None,
        "clip_fingerprint": clip.identity,
    }


if __name__ == "__main__":
    run(main, Config, "decoder", sys.argv[1:])
