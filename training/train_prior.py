"""Train the diffusion prior: a caption's encoding -> image embedding.

accelerate launch training/train_prior.py configs/emoji/prior.yaml train.steps=1000
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from t2i.checkpoint import export_model
from t2i.config import DataConfig, TrainConfig, build, check_range
from t2i.data import Batch
from t2i.data.cache import ClipFacts
from t2i.data.source import open_source
from t2i.diffusion import denoise, drop
from t2i.launch import run
from t2i.loop import fit, start
from t2i.prior import Prior


@dataclass
class Config:
    clip: str = (
        "???"  # folder of a trained CLIP, or a public one: ViT-L-14:laion2b_s32b_b82k, hf-hub:name, local-dir:path
    )
    cache: str | None = None  # folder that `t2i data cache` wrote; without one, pictures are encoded in every step
    model: dict[str, Any] = field(default_factory=dict)  # arguments of t2i.prior.Prior, but for what CLIP tells
    scheduler: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' DDIMScheduler
    caption_dropout: float = 0.1
    timestep_shift: float = 1.0  # above 1, high noise is drawn more often
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_range("caption_dropout", self.caption_dropout, 0, 1)
        check_range("timestep_shift", self.timestep_shift, 0.01, 100)


def main(config: Config) -> None:
    source = open_source(config.cache, config.data, config.clip)
    accelerator = start(config.train)
    source.to(accelerator.device)
    scheduler = build(DDIMScheduler, "scheduler", config.scheduler)
    nothing = source.null()
    prior = build(Prior, "model", config.model, **prior_arguments(source.clip), null_length=nothing.states.shape[1])
    prior.null_embedding.copy_(nothing.embedding[0])
    prior.null_states.copy_(nothing.states[0])
    mean, std = source.statistics()
    prior.mean.copy_(mean)
    prior.std.copy_(std.clamp(min=1e-6))
    prior.to(accelerator.device)

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        batch = source.encode(batch)
        text, z_i = batch.text, batch.image_embeds
        condition = drop(text, prior.null(len(text)), config.caption_dropout)
        prediction, target = denoise(model, scheduler, prior.scale(z_i), condition, config.timestep_shift)
        metrics = {
            "loss": F.mse_loss(prediction, target),
            "cosine_text": F.cosine_similarity(text.embedding, z_i).mean(),
        }
        if scheduler.config.prediction_type == "sample":
            metrics["cosine"] = F.cosine_similarity(prior.unscale(prediction.detach()), z_i).mean()
        return metrics

    def export(average: torch.nn.Module) -> None:
        export_model(average, Path(config.train.output))
        export_model(scheduler, Path(config.train.output), "scheduler")

    fit(accelerator, prior, loss, source.dataset, config.train, export, config.data.num_workers, source.made_from)


def prior_arguments(clip: ClipFacts) -> dict[str, Any]:
    """What a prior takes over from the CLIP that it is trained with."""
    return {
        "embed_dim": clip.embed_dim,
        "text_width": clip.text_width,
        "context_length": clip.context_length,
        "clip_fingerprint": clip.identity,
    }


if __name__ == "__main__":
    run(main, Config, "prior", sys.argv[1:])
