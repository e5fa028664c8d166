"""Train the diffusion prior: a caption's encoding -> image embedding.

accelerate launch training/train_prior.py configs/emoji/prior.yaml train.steps=1000
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from t2i.checkpoint import export_model, load_model, weights_digest
from t2i.config import DataConfig, TrainConfig, build, check_range
from t2i.data import Batch
from t2i.data.cache import ClipFacts
from t2i.data.source import Source, open_source
from t2i.diffusion import check_weighting, diffusion_loss, drop, noise_scheduler
from t2i.finetuning import check_prediction, start_from
from t2i.launch import run
from t2i.loop import Stage, fit, start
from t2i.lora import LoraConfig, add_adapters, check_lora, export_adapted
from t2i.preview import Preview, SampleConfig, choose_columns
from t2i.prior import Prior


@dataclass
class Config:
    clip: str = (
        "???"  # folder of a trained CLIP, or a public one: ViT-L-14:laion2b_s32b_b82k, hf-hub:name, local-dir:path
    )
    cache: str | None = None  # folder that `t2i data cache` wrote; without one, pictures are encoded in every step
    model: dict[str, Any] = field(default_factory=dict)  # arguments of t2i.prior.Prior, but for what CLIP tells
    init: str | None = None  # folder of a trained prior to start from, instead of random weights
    lora: LoraConfig | None = None  # train adapters of this rank on `init`, not its weights: rank, alpha, targets
    scheduler: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' DDIMScheduler
    caption_dropout: float = 0.1
    timestep_shift: float = 1.0  # above 1, high noise is drawn more often
    loss_weighting: str = "none"  # or min_snr, which lets the steps of low noise count less
    min_snr_gamma: float = 5.0
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # what is drawn every train.sample_every steps

    def __post_init__(self) -> None:
        check_range("caption_dropout", self.caption_dropout, 0, 1)
        check_range("timestep_shift", self.timestep_shift, 0.01, 100)
        check_range("min_snr_gamma", self.min_snr_gamma, 0.01, 1000)
        check_weighting(noise_scheduler(self.scheduler), self.loss_weighting)
        check_lora(self.lora, self.init)


def main(config: Config) -> None:
    source = open_source(config.cache, config.data, config.clip)
    accelerator = start(config.train)
    fit(accelerator, make_stage(config, source, accelerator.device), config.train)


def make_stage(config: Config, source: Source, device: torch.device) -> Stage:
    source.to(device)
    scheduler = noise_scheduler(config.scheduler)
    made_from = dict(source.made_from)
    needed = prior_arguments(source.clip)
    if config.init is None:
        prior = build(Prior, "model", config.model, **needed, null_length=source.null().states.shape[1])
        prior.set_encodings(source.null(), *source.statistics())
    else:  # its null and its scale are part of what it learned
        check_prediction(config.init, scheduler)
        prior = start_from(partial(load_model, Prior), config.init, config.model, **needed)
        made_from["init"] = weights_digest(prior)
    if config.lora is not None:
        add_adapters(prior, config.lora)
    prior.to(device)

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        batch = source.encode(batch)
        text, z_i = batch.text, batch.image_embeds
        condition = drop(text, prior.null(len(text)), config.caption_dropout)
        weighting = (config.timestep_shift, config.loss_weighting, config.min_snr_gamma)
        metrics, prediction = diffusion_loss(model, scheduler, prior.scale(z_i), condition, *weighting)
        metrics["cosine_text"] = F.cosine_similarity(text.embedding, z_i).mean()
        if scheduler.config.prediction_type == "sample":
            metrics["cosine"] = F.cosine_similarity(prior.unscale(prediction.detach()), z_i).mean()
        return metrics

    def export(average: torch.nn.Module) -> None:
        export_adapted(average, Path(config.train.output))
        export_model(scheduler, Path(config.train.output), "scheduler")

    preview = None
    if config.train.sample_every:
        drawn = Preview(config.sample, choose_columns(source, config.sample), source.clip.identity)
        preview = partial(drawn.of_prior, scheduler=scheduler)
    workers, held_out = config.data.num_workers, source.validation
    return Stage(prior, loss, source.dataset, export, made_from, asdict(config), workers, held_out, preview)


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
