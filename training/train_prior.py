"""Train a prior: a caption's encoding -> image embedding.

accelerate launch training/train_prior.py configs/emoji/prior.yaml train.steps=1000

`architecture` says which: diffusion, autoregressive, or a regression (linear, mlp) as a baseline.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from t2i.training.common.encodings import Source, open_source
from t2i.training.common.entry import run
from t2i.training.common.finetuning import start_from, starting_scheduler
from t2i.training.common.loop import Stage, fit, start
from t2i.training.common.lora import LoraConfig, add_adapters, check_lora, export_adapted
from t2i.training.common.preview import Preview, SampleConfig, choose_columns
from torch import Tensor
from torch.nn import Module

from t2i.checks import check_choice, check_range
from t2i.config import DataConfig, TrainConfig, build
from t2i.data import Batch
from t2i.data.cache import ClipFacts
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.loss import check_weighting, diffusion_loss, drop
from t2i.diffusion.process import noise_scheduler
from t2i.errors import InputError
from t2i.files.fingerprints import weights_digest
from t2i.files.model_folder import export_model, load_model
from t2i.interop.parts import Found, KnownCLIP, check_trained, find, public_prior
from t2i.networks.autoregressive_prior import AutoregressivePrior, components_for
from t2i.networks.prior import Prior
from t2i.networks.regression_prior import KINDS, RegressionPrior

ARCHITECTURES: dict[str, Any] = {
    "diffusion": Prior,
    "autoregressive": AutoregressivePrior,
    "linear": RegressionPrior,
    "mlp": RegressionPrior,
}

OPTIONS_OF = {
    "caption_dropout": ("diffusion", "autoregressive"),
    "scheduler": ("diffusion",),
    "timestep_shift": ("diffusion",),
    "loss_weighting": ("diffusion",),
    "min_snr_gamma": ("diffusion",),
    "explained_variance": ("autoregressive",),
    "regression": ("autoregressive",),
    "label_smoothing": ("autoregressive",),
    "code_noise": ("autoregressive",),
}


@dataclass
class Config:
    clip: str = (
        "???"  # folder of a trained CLIP, or a public one: ViT-L-14:laion2b_s32b_b82k, hf-hub:name, local-dir:path
    )
    cache: str | None = None  # folder that `t2i data cache` wrote; without one, pictures are encoded in every step
    architecture: str = "diffusion"  # or autoregressive, linear, mlp
    model: dict[str, Any] = field(default_factory=dict)  # arguments of that prior in t2i, but for what CLIP tells
    # Folder of a trained prior to start from, instead of random weights; or Karlo's or Kandinsky's, by the folder or
    # hub name of the pipeline.
    init: str | None = None
    lora: LoraConfig | None = None  # train adapters of this rank on `init`, not its weights: rank, alpha, targets
    caption_dropout: float = 0.1  # of diffusion and autoregressive, whose guidance needs it
    # of diffusion
    scheduler: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' DDIMScheduler; else as of `init`
    timestep_shift: float = 1.0  # above 1, high noise is drawn more often
    loss_weighting: str = "none"  # or min_snr, which lets the steps of low noise count less
    min_snr_gamma: float = 5.0
    # of autoregressive
    explained_variance: float = 0.99  # of z_i, by the components that are drawn, unless model.components says how many
    regression: str | None = None  # folder of a trained linear or mlp prior that it starts from
    label_smoothing: float = 0.0  # standard deviation, in buckets, of the target around the true one
    code_noise: float = 0.0  # standard deviation, in ranges of a component, of noise on the codes that are read
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # what is drawn every train.sample_every steps

    def __post_init__(self) -> None:
        check_choice("architecture", self.architecture, tuple(ARCHITECTURES))
        check_range("caption_dropout", self.caption_dropout, 0, 1)
        check_range("timestep_shift", self.timestep_shift, 0.01, 100)
        check_range("min_snr_gamma", self.min_snr_gamma, 0.01, 1000)
        check_range("explained_variance", self.explained_variance, 0.01, 1)
        check_range("label_smoothing", self.label_smoothing, 0, 100)
        check_range("code_noise", self.code_noise, 0, 1)
        for name, architectures in OPTIONS_OF.items():
            usual = getattr(Config, name, {})  # a factory leaves no attribute
            if self.architecture not in architectures and getattr(self, name) != usual:
                whose = " and ".join(architectures)
                raise InputError(
                    f"{name} is of the {whose} prior, but architecture is {self.architecture}; leave it out"
                )
        if self.regression is not None and self.init is not None:
            raise InputError(
                f"regression={self.regression!r} is for new weights, init={self.init!r} has its own; give one"
            )
        check_weighting(noise_scheduler(self.scheduler), self.loss_weighting)
        check_lora(self.lora, self.init)


def main(config: Config) -> None:
    if config.architecture == "diffusion":
        check_trained(config.init, "prior")
    source = open_source(config.cache, config.data, config.clip)
    accelerator = start(config.train)
    fit(accelerator, make_stage(config, source, accelerator.device), config.train)


def make_stage(config: Config, source: Source, device: torch.device) -> Stage:
    source.to(device)
    diffusion, made_from, public, scheduler = config.architecture == "diffusion", dict(source.made_from), None, None
    if not diffusion and not source.clip.unit_length:
        raise InputError(
            f"architecture={config.architecture} draws embeddings of unit length, those of clip={config.clip!r} have "
            "other lengths; take diffusion"
        )
    if diffusion:
        public = None if config.init is None else find(config.init, ("prior",))
        scheduler = starting_scheduler(config.init, config.scheduler, public and public.other("prior_scheduler"))
        check_weighting(scheduler, config.loss_weighting)
    if config.init is None:
        prior = make_prior(config, source)
        if config.regression is not None:
            made_from["regression"] = weights_digest(prior.regressor)
    else:  # its null and its scale are part of what it learned
        load: Callable[[str], Any] = partial(load_model, ARCHITECTURES[config.architecture])
        if public is not None:
            load = partial(load_public, public, source)
        prior = start_from(load, config.init, stated(config), **prior_arguments(config, source.clip))
        made_from["init"] = weights_digest(prior)
    if config.lora is not None:
        add_adapters(prior, config.lora)
    prior.to(device)

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        batch = source.encode(batch)
        text, z_i = batch.text, batch.image_embeds
        assert text is not None and z_i is not None, "a prior is trained on pairs"
        metrics = {"cosine_text": F.cosine_similarity(text.embedding, z_i).mean()}
        match config.architecture:
            case "diffusion":
                return metrics | denoising_loss(config, model, prior, scheduler, text, z_i)
            case "autoregressive":
                return metrics | autoregressive_loss(config, model, prior, text, z_i)
            case _:
                return metrics | regression_loss(model, prior, text, z_i)

    def export(average: torch.nn.Module) -> None:
        export_adapted(average, Path(config.train.output))
        if scheduler is not None:
            export_model(scheduler, Path(config.train.output), "scheduler")

    preview = None
    if config.train.sample_every:
        drawn = Preview(config.sample, choose_columns(source, config.sample), source.clip.identity)
        preview = partial(drawn.of_prior, scheduler=scheduler)
    workers, held_out = config.data.num_workers, source.validation
    return Stage(prior, loss, source.dataset, export, made_from, asdict(config), workers, held_out, preview)


def make_prior(config: Config, source: Source) -> Any:
    """With random weights, and the data's null and statistics. Bad arguments are refused before the data are read."""
    made, needed = stated(config), prior_arguments(config, source.clip)
    kind = ARCHITECTURES[config.architecture]
    if config.architecture in KINDS:
        prior = build(kind, "model", made, **needed)
        prior.set_encodings(*source.statistics())
        return prior
    needed["null_length"] = source.null().states.shape[1]
    if config.architecture == "diffusion":
        prior = build(kind, "model", made, **needed)
        prior.set_encodings(source.null(), *source.statistics())
        return prior
    regression = None
    if config.regression is not None:
        regression = load_model(RegressionPrior, config.regression)
        check_same_clip(config.regression, regression, source.clip)
        made |= {"regression": {name: regression.config[name] for name in ("kind", "width", "depth")}}
    with torch.device("meta"):
        build(kind, "model", {"components": 1} | made, **needed)
    embeddings = source.embeddings()
    made = {"components": components_for(embeddings, config.explained_variance)} | made
    prior = build(kind, "model", made, **needed)
    prior.set_encodings(source.null(), embeddings)
    if regression is not None:
        prior.regressor.load_state_dict(regression.state_dict())
    return prior


def load_public(found: Found, source: Source, init: str) -> Prior:
    """A public prior; what its null is the source knows, perhaps without the CLIP."""
    clip = source.clip
    return public_prior(found, KnownCLIP(clip.embed_dim, clip.text_width, clip.unit_length, source.null()))


def check_same_clip(folder: str, regression: RegressionPrior, clip: ClipFacts) -> None:
    theirs = regression.config.clip_fingerprint
    if theirs is not None and theirs != clip.identity:
        raise InputError(f"regression={folder!r} was trained with the CLIP {theirs}, this run has {clip.identity}")


def denoising_loss(
    config: Config, model: Module, prior: Prior, scheduler: Any, text: TextEncoding, z_i: Tensor
) -> dict[str, Tensor]:
    condition = drop(text, prior.null(len(text)), config.caption_dropout)
    weighting = (config.timestep_shift, config.loss_weighting, config.min_snr_gamma)
    metrics, prediction = diffusion_loss(model, scheduler, prior.scale(z_i), condition, *weighting)
    if scheduler.config.prediction_type == "sample":
        metrics["cosine"] = F.cosine_similarity(prior.unscale(prediction.detach()), z_i).mean()
    return metrics


def autoregressive_loss(
    config: Config, model: Module, prior: AutoregressivePrior, text: TextEncoding, z_i: Tensor
) -> dict[str, Tensor]:
    """Cross-entropy of each code given the true ones before it, in nats a code."""
    codes = prior.quantise(text.embedding, z_i)
    condition = drop(text, prior.null(len(text)), config.caption_dropout)
    read = codes
    if config.code_noise and model.training:  # drawn codes are never as true as those of the data
        noise = config.code_noise * prior.config.buckets * torch.randn(codes.shape, device=codes.device)
        read = (codes + noise.round().long()).clamp(0, prior.config.buckets - 1)
    logits = model(condition, read).float()
    losses = cross_entropy(logits, codes, config.label_smoothing if model.training else 0.0)
    return {
        "loss": losses.mean(),
        "loss_dot": losses[:, 0].mean().detach(),
        "loss_first": losses[:, 1:9].mean().detach(),
    }


def cross_entropy(logits: Tensor, codes: Tensor, smoothing: float) -> Tensor:
    """(B, L, buckets), (B, L) -> (B, L); the target is spread over the neighbours of the true bucket."""
    if smoothing == 0:
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
    distance = (torch.arange(logits.shape[-1], device=codes.device) - codes[..., None]) / smoothing
    return -((-0.5 * distance.square()).softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)


def regression_loss(model: Module, prior: RegressionPrior, text: TextEncoding, z_i: Tensor) -> dict[str, Tensor]:
    prediction = model(text).float()
    cosine = F.cosine_similarity(prior.unscale(prediction.detach()), z_i).mean()
    return {"loss": F.mse_loss(prediction, prior.scale(z_i)), "cosine": cosine}


def stated(config: Config) -> dict[str, Any]:
    """What the configuration says of the model."""
    return config.model | ({"kind": config.architecture} if config.architecture in KINDS else {})


def prior_arguments(config: Config, clip: ClipFacts) -> dict[str, Any]:
    """What a prior takes over from the CLIP that it is trained with."""
    arguments = {
        "embed_dim": clip.embed_dim,
        "text_width": clip.text_width,
        "clip_fingerprint": clip.identity,
    }
    if config.architecture in KINDS:
        return arguments
    arguments |= {"context_length": clip.context_length}
    return arguments | ({"unit_length": clip.unit_length} if config.architecture == "diffusion" else {})


if __name__ == "__main__":
    run(main, Config, "prior", sys.argv[1:])
