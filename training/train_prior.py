"""Train the diffusion prior: a caption's encoding -> image embedding.

accelerate launch training/train_prior.py configs/emoji/prior.yaml train.steps=1000
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from t2i.checkpoint import export_model, load_model, weights_digest
from t2i.clip import CLIP, load_clip
from t2i.config import DataConfig, TrainConfig, build, check_choice, check_range
from t2i.data import Batch, CaptionedPictures, encode_all
from t2i.diffusion import WEIGHTINGS, denoise, drop, loss_weight, noise_scheduler, weighted_mse
from t2i.finetuning import check_prediction, start_from
from t2i.launch import run
from t2i.loop import Stage, fit, start
from t2i.lora import LoraConfig, add_adapters, check_lora, export_adapted
from t2i.prior import Prior


@dataclass
class Config:
    clip: str = (
        "???"  # folder of a trained CLIP, or a public one: ViT-L-14:laion2b_s32b_b82k, hf-hub:name, local-dir:path
    )
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

    def __post_init__(self) -> None:
        check_range("caption_dropout", self.caption_dropout, 0, 1)
        check_range("timestep_shift", self.timestep_shift, 0.01, 100)
        check_choice("loss_weighting", self.loss_weighting, WEIGHTINGS)
        check_range("min_snr_gamma", self.min_snr_gamma, 0.01, 1000)
        noise_scheduler(self.scheduler)
        check_lora(self.lora, self.init)


def main(config: Config) -> None:
    dataset = CaptionedPictures(config.data)
    clip = load_clip(config.clip)
    accelerator = start(config.train)
    clip = clip.to(accelerator.device).eval().requires_grad_(False)
    scheduler = noise_scheduler(config.scheduler)
    made_from = {"data": dataset.digest(), "clip": clip.identity}
    if config.init is None:
        nothing = clip.encode_text([""])
        prior = build(Prior, "model", config.model, **prior_arguments(clip), null_length=nothing.states.shape[1])
        prior.null_embedding.copy_(nothing.embedding[0])
        prior.null_states.copy_(nothing.states[0])
    else:  # its null and its scale are part of what it learned
        check_prediction(config.init, scheduler)
        prior = start_from(partial(load_model, Prior), config.init, config.model, **prior_arguments(clip))
        made_from["init"] = weights_digest(prior)
    embeddings = encode_all(dataset, clip.encode_image, accelerator, "image embeddings")
    if config.init is None:
        prior.mean.copy_(embeddings.mean(dim=0))
        prior.std.copy_(embeddings.std(dim=0, correction=0).clamp(min=1e-6))
    if config.lora is not None:
        add_adapters(prior, config.lora)
        made_from["lora"] = str(config.lora)
    prior.to(accelerator.device)
    dataset.pictures = False  # from here on the embeddings stand for them

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        text, z_i = clip.encode_text(batch.captions), embeddings[batch.index].to(accelerator.device)
        condition = drop(text, prior.null(len(text)), config.caption_dropout)
        prediction, target, t = denoise(model, scheduler, prior.scale(z_i), condition, config.timestep_shift)
        weight = loss_weight(scheduler, t, config.loss_weighting, config.min_snr_gamma)
        metrics = {
            "loss": weighted_mse(prediction, target, weight),
            "cosine_text": F.cosine_similarity(text.embedding, z_i).mean(),
        }
        if scheduler.config.prediction_type == "sample":
            metrics["cosine"] = F.cosine_similarity(prior.unscale(prediction.detach()), z_i).mean()
        return metrics

    def export(average: torch.nn.Module) -> None:
        export_adapted(average, Path(config.train.output))
        export_model(scheduler, Path(config.train.output), "scheduler")

    stage = Stage(prior, loss, dataset, export, made_from, config.data.num_workers)
    fit(accelerator, stage, config.train)


def prior_arguments(clip: CLIP) -> dict[str, Any]:
    """What a prior takes over from the CLIP that it is trained with."""
    return {
        "embed_dim": clip.embed_dim,
        "text_width": clip.text_width,
        "context_length": clip.context_length,
        "clip_fingerprint": clip.identity,
    }


if __name__ == "__main__":
    run(main, Config, "prior", sys.argv[1:])
