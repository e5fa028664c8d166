"""Train a classifier of noisy latents, for classifier guidance and CLIP guidance.

accelerate launch training/train_classifier.py configs/emoji/classifier.yaml train.steps=1000
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from t2i.training.common.effects import CAPTION_SETTINGS, COMMON, UNREAD_CAPTIONS, Idle, IdleCases
from t2i.training.common.encodings import EncodingSource, open_encodings
from t2i.training.common.entry import run
from t2i.training.common.loop import Stage, build_accelerator, fit
from torch import Tensor

from t2i.config import DataConfig, TrainConfig, build_or_explain, check_fields
from t2i.data import Batch
from t2i.data.dataset import SampleDataset, SampleIndex
from t2i.data.groups import open_groups
from t2i.data.labels import Labels
from t2i.data.manifest import find_manifest
from t2i.diffusion.flow import is_flow
from t2i.diffusion.process import add_noise, build_noise_scheduler, preserve_variance
from t2i.files.model_folder import save_model_folder
from t2i.networks.classifier import LatentClassifier, compute_noise_level

ACCURACY_LEVELS = 4  # parts of the noise schedule whose accuracies are logged


@dataclass
class Config:
    clip: str = "???"  # folder of a trained CLIP, or a public one; the same as the decoder's
    autoencoder: str = "???"  # folder of a trained autoencoder, or a diffusers VAE; the same as the decoder's
    cache: str | None = None  # folder that `t2i data cache` wrote; null encodes images in every step
    model: dict[str, Any] = field(default_factory=dict)  # arguments of t2i.networks.classifier.LatentClassifier
    scheduler: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' DDIMScheduler
    embedding_weight: float = 1.0  # of 1 - cosine to z_i, added to the cross-entropy; 0 trains the classes alone
    data: DataConfig = field(default_factory=DataConfig)  # with labels.parquet beside the manifest
    train: TrainConfig = field(default_factory=TrainConfig)
    idle: ClassVar[IdleCases] = {
        **COMMON,
        **dict.fromkeys(CAPTION_SETTINGS, (UNREAD_CAPTIONS,)),
        "train.sample_every": (Idle(": this stage draws no previews"),),
    }

    def __post_init__(self) -> None:
        check_fields(self, embedding_weight=(0, 1000))
        build_noise_scheduler(self.scheduler)


class LabelledDataset(SampleDataset):
    """Images or cached encodings, in whole batches, with a class for each sample."""

    def __init__(self, dataset: SampleDataset, labels: Labels):
        self.dataset, self.numbers = dataset, labels.find_classes(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def buckets(self) -> np.ndarray | None:
        return self.dataset.buckets

    def format_shape_lines(self, step_size: int = 0) -> list[str]:
        return self.dataset.format_shape_lines(step_size)

    def format_left_out_lines(self) -> list[str]:
        return self.dataset.format_left_out_lines()

    def __getitems__(self, keys: list[SampleIndex]) -> Batch:
        batch = self.dataset.__getitems__(keys)
        # By `batch.index`: the samples that were read may replace bad ones among `keys`.
        return replace(batch, labels=self.numbers[batch.index])

    def get_sample_key(self, index: int) -> str:
        return self.dataset.get_sample_key(index)


def main(config: Config) -> None:
    labels = Labels(find_manifest(Path(config.data.path)))
    source = open_encodings(config.cache, config.data, config.clip, config.autoencoder, reads_captions=False)
    accelerator = build_accelerator(config.train)
    fit(accelerator, build_stage(config, source, labels, accelerator.device), config.train)


def build_stage(config: Config, source: EncodingSource, labels: Labels, device: torch.device) -> Stage:
    """Build the stage: a classifier of noisy latents by these labels."""
    source.to(device)
    assert source.autoencoder_facts is not None
    config.data.check_sides(source.autoencoder_facts.factor)
    scheduler = build_noise_scheduler(config.scheduler)
    dataset = LabelledDataset(source.dataset, labels)
    validation = None if source.validation is None else LabelledDataset(source.validation, labels)
    # A resumed run must have the same labels
    content = json.dumps([labels.classes, dataset.numbers.tolist()])
    made_from = {**source.made_from, "labels": hashlib.sha256(content.encode()).hexdigest()[:16]}
    needed = {
        "classes": labels.classes,
        "latent_channels": source.autoencoder_facts.channels,
        "latent_size": config.data.image_size // source.autoencoder_facts.factor,
        "embed_dim": source.clip_facts.embed_dim,
        "autoencoder_fingerprint": source.autoencoder_facts.identity,
        "clip_fingerprint": source.clip_facts.identity,
    }
    classifier = build_or_explain(LatentClassifier, "model", config.model, **needed).to(device)

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of classes and embeddings at random noise levels, and the share of right classes."""
        batch = source.encode(batch)
        assert batch.latents is not None and batch.image_embeds is not None and batch.labels is not None
        x, count = batch.latents.float(), len(batch.index)
        # One timestep from each of `count` equal parts of the schedule, so that every batch has every noise level
        fraction = (torch.arange(count, device=x.device) + torch.rand(count, device=x.device)) / count
        steps = scheduler.config.num_train_timesteps
        t = fraction * steps if is_flow(scheduler) else (fraction * steps).long().clamp(max=steps - 1)
        # The classifier sees samples of unit variance, whatever the process is
        noisy = preserve_variance(scheduler, add_noise(scheduler, x, torch.randn_like(x), t), t)
        logits, embedding = model(noisy, compute_noise_level(scheduler, t, x))
        entropy = F.cross_entropy(logits.float(), batch.labels)
        cosine = F.cosine_similarity(embedding.float(), batch.image_embeds).mean()
        correct = (logits.argmax(dim=1) == batch.labels).float()
        metrics = {"loss": entropy + config.embedding_weight * (1 - cosine), "cross_entropy": entropy.detach()}
        metrics |= {"accuracy": correct.mean(), "cosine": cosine.detach()}
        return metrics | compute_level_accuracies(correct)

    def export(average: torch.nn.Module) -> None:
        save_model_folder(average, Path(config.train.output))
        save_model_folder(scheduler, Path(config.train.output), "scheduler")

    return Stage(
        model=classifier,
        loss=loss,
        dataset=dataset,
        export=export,
        made_from=made_from,
        config=asdict(config),
        num_workers=config.data.num_workers,
        groups=open_groups(config.data, source.dataset),
        validation=validation,
    )


def compute_level_accuracies(correct: Tensor) -> dict[str, Tensor]:
    """Return the accuracy of each part of the schedule that has samples; part 1 has the least noise.

    correct: (B,), 1 for samples whose class was found, sorted by rising noise.
    """
    parts = correct.tensor_split(ACCURACY_LEVELS)
    return {f"accuracy_level_{i}": part.mean() for i, part in enumerate(parts, 1) if len(part)}


if __name__ == "__main__":
    run(main, Config, "classifier", sys.argv[1:])
