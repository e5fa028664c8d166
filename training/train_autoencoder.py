"""Train an autoencoder between images and latents, alone or against a discriminator.

accelerate launch training/train_autoencoder.py configs/emoji/autoencoder.yaml train.steps=1000

docs/explanation/autoencoder.md compares both.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL.Image import Image
from t2i.training.common.effects import (
    CAPTION_SETTINGS,
    COMMON,
    UNREAD_CAPTIONS,
    IdleCases,
    exclude_setting,
    list_preview_cases,
    require_setting,
)
from t2i.training.common.entry import run
from t2i.training.common.finetuning import prepare_init_model
from t2i.training.common.loop import Critic, Stage, build_accelerator, fit
from t2i.training.common.preview import SampleConfig, draw_autoencoder_preview, read_fixed_records
from torch import Tensor

from t2i.config import DataConfig, TrainConfig, build_or_explain, check_fields
from t2i.data import Batch, open_datasets
from t2i.data.buckets import list_image_shapes
from t2i.data.groups import open_groups
from t2i.errors import InputError
from t2i.files.fingerprints import compute_weights_fingerprint
from t2i.files.model_folder import save_model_folder
from t2i.interop.by_name import load_autoencoder, load_clip
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.discriminator import (
    ADAM_BETAS,
    Discriminator,
    compute_adaptive_weight,
    compute_frozen_logits,
    compute_hinge_loss,
)
from t2i.networks.perceptual import PerceptualDistance

MAX_MEASURED_IMAGES = 4096  # images encoded for the mean and std of the latents


NO_CRITIC = require_setting("adversarial_weight")


@dataclass
class Config:
    model: dict[str, Any] = field(default_factory=dict)  # arguments of t2i.networks.autoencoder.Autoencoder
    # Folder of a trained autoencoder to start from, instead of random weights; or the folder or hub name of a diffusers
    # VAE.
    init: str | None = None
    freeze_encoder: bool = False  # train the decoder alone, with init; latents, and all models of them, stay valid
    kl_weight: float = 1e-3  # of the divergence from N(0, 1), in nats per pixel value
    perceptual_weight: float = 0.0  # of the distance in a frozen CLIP's features, added to that of the pixels
    perceptual_clip: str | None = None  # folder of a trained CLIP, or a public one, for these features
    # Weight of the discriminator's verdict: relative to the reconstruction loss, by the ratio of both gradients at the
    # last layer; or, with adversarial_fixed, as it is.
    adversarial_weight: float = 0.0
    adversarial_fixed: bool = False
    adversarial_start: int = 0  # step from which the verdict counts; the discriminator learns from step 0
    discriminator: dict[str, Any] = field(default_factory=dict)  # arguments of t2i.networks.discriminator.Discriminator
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # previews, every train.sample_every steps
    idle: ClassVar[IdleCases] = {
        **COMMON,
        **list_preview_cases(count=()),
        **dict.fromkeys(CAPTION_SETTINGS, (UNREAD_CAPTIONS,)),
        "kl_weight": (exclude_setting("freeze_encoder"),),
        "perceptual_clip": (require_setting("perceptual_weight"),),
        "adversarial_fixed": (NO_CRITIC,),
        "adversarial_start": (NO_CRITIC,),
        "discriminator": (NO_CRITIC,),
    }

    def __post_init__(self) -> None:
        check_fields(self, kl_weight=(0, 1e6), perceptual_weight=(0, 1e6), adversarial_weight=(0, 1e6))
        check_fields(self, adversarial_start=(0, 10**9))
        if self.freeze_encoder and self.init is None:
            raise InputError("freeze_encoder=true needs init, a trained autoencoder")
        if self.perceptual_weight and self.perceptual_clip is None:
            raise InputError(
                f"perceptual_weight={self.perceptual_weight:g} needs perceptual_clip, such as runs/emoji/clip"
            )
        if self.adversarial_weight and not self.adversarial_fixed and self.train.compile:
            # The adaptive weight takes three gradients a step; a compiled model takes only one.
            raise InputError("train.compile=true with adversarial_weight needs adversarial_fixed=true")


class ReconstructionLoss:
    """The loss of VQGAN and latent diffusion: L1, KL divergence, perceptual distance, and a discriminator's verdict.

    Rombach et al. 2022, equation 25, with L1 as the reconstruction loss.
    """

    def __init__(
        self, config: Config, autoencoder: Autoencoder, perceptual: PerceptualDistance | None, critic: Critic | None
    ):
        self.config, self.perceptual, self.critic = config, perceptual, critic
        self.discriminator = None if critic is None else critic.model  # bare: `fit` wraps the critic's
        self.last_layer = autoencoder.coder.decoder.conv_out.weight

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        reconstruction, kl = model(batch.image)
        reconstruction = reconstruction.float()
        likeness = F.l1_loss(reconstruction, batch.image)
        squared = F.mse_loss(reconstruction.detach().clamp(-1, 1), batch.image)
        metrics = {"kl": kl.mean(), "psnr": 10 * torch.log10(4 / squared)}  # dB; images span 2
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(reconstruction, batch.image).mean()
            likeness = likeness + self.config.perceptual_weight * metrics["perceptual"]
        metrics["loss"] = likeness + self.config.kl_weight * kl.float().mean()
        # Validation computes no gradients, which the adaptive weight needs.
        if self.critic is not None and torch.is_grad_enabled():
            metrics |= self.compute_adversarial_terms(likeness, reconstruction, batch.image)
            metrics["loss"] = metrics["loss"] + metrics["adversarial_weight"] * metrics["adversarial"]
        return metrics

    def compute_adversarial_terms(self, likeness: Tensor, reconstruction: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Return the discriminator's loss, the autoencoder's adversarial loss, and the weight of the latter."""
        assert self.critic is not None and self.discriminator is not None
        # Both in one pass, and detached: this loss trains the discriminator alone
        logits = self.critic.model(torch.cat([image, reconstruction.detach()]))
        real, drawn = logits.chunk(2)
        metrics = {"critic_loss": compute_hinge_loss(real, drawn)}
        weight = likeness.new_tensor(self.config.adversarial_weight)
        # The same metrics before the start, so that every row of the log has them
        if self.critic.step < self.config.adversarial_start:
            return metrics | {"adversarial": torch.zeros_like(likeness), "adversarial_weight": 0 * weight}
        metrics["adversarial"] = -compute_frozen_logits(self.discriminator, reconstruction).float().mean()
        if not self.config.adversarial_fixed:
            weight = weight * compute_adaptive_weight(likeness, metrics["adversarial"], self.last_layer)
        return metrics | {"adversarial_weight": weight}


def main(config: Config) -> None:
    """Train an autoencoder on the images of a data folder."""
    datasets = open_datasets(config.data)
    dataset, held_out = datasets["train"], datasets.get("held_out")
    accelerator = build_accelerator(config.train)
    # The model
    made_from = {"data": dataset.compute_digest()}
    if config.init is None:
        autoencoder = build_or_explain(Autoencoder, "model", config.model)
    else:
        autoencoder = prepare_init_model(load_autoencoder(config.init), config.init, config.model)
        made_from["init"] = compute_weights_fingerprint(autoencoder)
    autoencoder.to(memory_format=torch.channels_last)
    config.data.check_sides(autoencoder.factor)
    if config.freeze_encoder:
        autoencoder.freeze_encoder()
    # The loss
    critic = Critic(build_discriminator(config), ADAM_BETAS) if config.adversarial_weight else None
    perceptual = None
    if config.perceptual_weight:
        clip = load_clip(str(config.perceptual_clip))
        made_from["perceptual_clip"] = clip.identity
        perceptual = PerceptualDistance(clip.float()).to(accelerator.device)
    loss = ReconstructionLoss(config, autoencoder, perceptual, critic)

    def export(average: torch.nn.Module) -> None:
        # A frozen encoder keeps its latents, and so their statistics.
        if not config.freeze_encoder:
            average.set_latent_statistics(dataset.iterate_images(MAX_MEASURED_IMAGES, batch_size=64))
        save_model_folder(average, Path(config.train.output))

    records = read_fixed_records(held_out or dataset, config.sample.count if config.train.sample_every else 0)

    def preview(average: torch.nn.Module) -> dict[str, Image]:
        return {"reconstructions": draw_autoencoder_preview(average, records.image)} if records else {}

    stage = Stage(
        model=autoencoder,
        loss=loss,
        dataset=dataset,
        export=export,
        made_from=made_from,
        config=asdict(config),
        num_workers=config.data.num_workers,
        groups=open_groups(config.data, dataset),
        validation=held_out,
        preview=preview,
        critic=critic,
    )
    fit(accelerator, stage, config.train)


def build_discriminator(config: Config) -> Discriminator:
    """Build the discriminator. Raises InputError for bad arguments, and for images smaller than a patch."""
    discriminator = build_or_explain(Discriminator, "discriminator", config.discriminator)
    smallest, side = discriminator.min_image_size, min(min(shape) for shape in list_image_shapes(config.data))
    if side < smallest:
        name = "the shortest side of data.buckets, " if config.data.buckets else "data.image_size="
        raise InputError(
            f"{name}{side} is smaller than a patch of this discriminator; use at least {smallest}, or a smaller "
            "discriminator.depth"
        )
    return discriminator.to(memory_format=torch.channels_last)


if __name__ == "__main__":
    run(main, Config, "autoencoder", sys.argv[1:])
