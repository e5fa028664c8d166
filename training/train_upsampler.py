"""Train an upsampler, from an image in low resolution to the image, on random crops.

accelerate launch training/train_upsampler.py configs/emoji/upsampler.yaml train.steps=1000
"""

import random
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from PIL.Image import Image
from t2i.training.common.effects import (
    CAPTION_SETTINGS,
    COMMON,
    UNREAD_CAPTIONS,
    WEIGHTED_LOSS,
    IdleCases,
    list_preview_cases,
    require_setting,
)
from t2i.training.common.entry import run
from t2i.training.common.finetuning import check_prediction_type, prepare_init_model
from t2i.training.common.loop import Stage, build_accelerator, fit
from t2i.training.common.preview import SampleConfig, read_fixed_records
from torch import Generator, Tensor

from t2i.checks import check_multiple_of
from t2i.config import DataConfig, TrainConfig, build_or_explain, check_fields
from t2i.data import Batch, CaptionedPictures, open_datasets
from t2i.data.buckets import Shape
from t2i.data.cache import CachedPairs
from t2i.data.dataset import SampleIndex
from t2i.data.framing import View
from t2i.data.groups import open_groups
from t2i.data.manifest import Manifest
from t2i.diffusion.flow import get_prediction_type
from t2i.diffusion.loss import check_loss_settings, compute_loss_weight, compute_weighted_mse, predict_noised_batch
from t2i.diffusion.process import build_noise_scheduler
from t2i.diffusion.sampling_loop import Sampling
from t2i.errors import InputError
from t2i.evaluation.contact_sheet import build_labelled_rows, to_pil_images
from t2i.files.fingerprints import compute_weights_fingerprint
from t2i.files.model_folder import load_model, save_model_folder
from t2i.networks.upsampler import (
    LowResolution,
    Upsampler,
    augment_low_resolution,
    enlarge_low_resolution,
    reduce_to_low_resolution,
)
from t2i.sampling.upsampling import sample_upsampler


@dataclass
class Config:
    model: dict[str, Any] = field(default_factory=dict)  # arguments of the Upsampler, but for those below
    factor: int = 4  # side of the high resolution / side of the low resolution: 2 or 4
    crop_size: int = 256  # pixels along a side, in high resolution; data.image_size is that of whole images
    cache: str | None = None  # folder that `t2i data cache` wrote with a CLIP; its z_i become a second condition
    embedding_dropout: float = 0.1  # of z_i
    blur_probability: float = 0.5  # of the low resolution, since decoders draw less sharply than reduced images are
    max_blur: float = 0.6  # largest standard deviation of the blur, in pixels of the low resolution
    init: str | None = None  # folder of a trained upsampler to start from, instead of random weights
    # Arguments of diffusers' DDIMScheduler; or `prediction_type: flow_prediction` and a `shift`
    scheduler: dict[str, Any] = field(default_factory=dict)
    timestep_shift: float = 1.0  # above 1, high noise is drawn more often
    loss_weighting: str = "none"  # or min_snr, which gives timesteps of low noise less weight
    min_snr_gamma: float = 5.0
    logit_mean: float = 0.0  # of flow_prediction's timesteps, which are logit-normal; above 0, more noise
    logit_std: float = 1.0
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(num_inference_steps=8))  # count, seed, steps
    idle: ClassVar[IdleCases] = {
        **COMMON,
        **WEIGHTED_LOSS,
        **list_preview_cases(count=(), seed=(), num_inference_steps=()),
        **dict.fromkeys(CAPTION_SETTINGS, (UNREAD_CAPTIONS,)),
        "embedding_dropout": (require_setting("cache"),),
        "blur_probability": (require_setting("max_blur"),),
        "max_blur": (require_setting("blur_probability"),),
    }

    def __post_init__(self) -> None:
        check_fields(self, crop_size=(8, self.data.image_size), embedding_dropout=(0, 1), blur_probability=(0, 1))
        check_fields(self, max_blur=(0, 10), timestep_shift=(0.01, 100), min_snr_gamma=(0.01, 1000))
        check_fields(self, logit_mean=(-10, 10), logit_std=(0.01, 10))
        scheduler, logit = build_noise_scheduler(self.scheduler), (self.logit_mean, self.logit_std)
        check_loss_settings(scheduler, self.loss_weighting, logit)


class RandomCrops(CaptionedPictures):
    """Random squares of the images, with z_i of the whole images if there is a cache.

    The squares are a function of the seed and the position in the data.
    """

    def __init__(self, config: Config, split: str = "train", manifest: Manifest | None = None):
        super().__init__(config.data, split, manifest)
        self.crop_size, self.embeddings = config.crop_size, None
        if self.crop_size > (side := min(min(shape) for shape in self.shapes)):
            raise InputError(
                f"crop_size must be at most {side}, the shortest side of data.buckets, got {self.crop_size}"
            )
        if config.cache is not None:
            self.embeddings = CachedPairs(config.cache, split, latents=False, text=False)
            if (
                self.embeddings.clip_facts is None
                or self.embeddings.made_from["data"].get(split) != self.compute_digest()
            ):
                raise InputError(
                    f"the cache {config.cache!r} has no image embeddings of the split {split} of {config.data.path!r}"
                )
            # z_i is that of the image as it is drawn: mirrored or not, and cropped as it was encoded
            config.data.check_center_crops()
            if (before := self.embeddings.made_from.get("flip", False)) != config.data.flip:
                raise InputError(
                    f"the cache {config.cache!r} was made with data.flip={before}, now {config.data.flip}; "
                    "make a new cache, or use what it was made with"
                )

    @property
    def buckets(self) -> None:  # type: ignore[override]
        """None: the squares have one shape, whatever images they are of."""
        return None

    def read_view(self, index: int, draw: int = 0, shape: Shape | None = None) -> View:
        return View(self.crop_image(super().read_view(index, draw, shape).image, draw), None)

    def __getitems__(self, keys: list[SampleIndex]) -> Batch:
        batch = super().__getitems__(keys)
        z_i = None
        if self.embeddings is not None:
            # By `batch.index`, because a sample that cannot be read is replaced by another
            read = [(index, draw) for index, (_, draw) in zip(batch.index.tolist(), keys)]
            z_i = self.embeddings.__getitems__(read).image_embeds
        return replace(batch, image_embeds=z_i)

    def crop_image(self, image: Tensor, draw: int) -> Tensor:
        # A function of the draw alone, so that a resumed run sees the same squares
        rng = random.Random(draw)
        top, left = (rng.randint(0, side - self.crop_size) for side in image.shape[-2:])
        return image[:, top : top + self.crop_size, left : left + self.crop_size]


def main(config: Config) -> None:
    """Train an upsampler on crops of the images of a data folder."""
    datasets = open_datasets(config.data)
    crops = {split: RandomCrops(config, split, pictures.manifest) for split, pictures in datasets.items()}
    dataset, held_out = crops["train"], crops.get("held_out")
    dataset.left_out = datasets["train"].left_out  # for the line about it; its manifest has none of them
    accelerator = build_accelerator(config.train)
    # The model
    scheduler = build_noise_scheduler(config.scheduler)
    made_from = {"data": dataset.compute_digest()}
    clip = None if dataset.embeddings is None else dataset.embeddings.clip_facts
    needed = {
        "factor": config.factor,
        "low_size": config.crop_size // config.factor,
        "adds_detail": get_prediction_type(scheduler) == "sample",
        "embed_dim": None if clip is None else clip.embed_dim,
        "clip_fingerprint": None if clip is None else clip.identity,
    }
    if config.init is None:
        upsampler = build_or_explain(Upsampler, "model", config.model, **needed)
    else:
        check_prediction_type(config.init, scheduler)
        upsampler = prepare_init_model(load_model(Upsampler, config.init), config.init, config.model, **needed)
        made_from["init"] = compute_weights_fingerprint(upsampler)
    check_multiple_of("crop_size", config.crop_size, max(upsampler.image_size_multiple, config.factor))
    upsampler.to(accelerator.device, memory_format=torch.channels_last)

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert batch.image is not None
        condition = degrade_images(config, upsampler, batch.image, batch.image_embeds)
        shift, logit = config.timestep_shift, (config.logit_mean, config.logit_std)
        prediction, target, t = predict_noised_batch(model, scheduler, batch.image, condition, shift, logit)
        weight = compute_loss_weight(scheduler, t, config.loss_weighting, config.min_snr_gamma)
        return {"loss": compute_weighted_mse(prediction, target, weight)}

    def export(average: torch.nn.Module) -> None:
        save_model_folder(average, Path(config.train.output))
        save_model_folder(scheduler, Path(config.train.output), "scheduler")

    preview = None
    count = config.sample.count if config.train.sample_every else 0
    records = read_fixed_records(datasets.get("held_out", datasets["train"]), count)
    if records is not None:
        preview = partial(draw_upsampler_preview, pictures=records.image, scheduler=scheduler, config=config.sample)

    stage = Stage(
        model=upsampler,
        loss=loss,
        dataset=dataset,
        export=export,
        made_from=made_from,
        config=asdict(config),
        num_workers=config.data.num_workers,
        groups=open_groups(config.data, dataset),
        validation=held_out,
        preview=preview,
    )
    fit(accelerator, stage, config.train)


def degrade_images(config: Config, upsampler: Upsampler, picture: Tensor, z_i: Tensor | None) -> LowResolution:
    """Return the condition of a training step: images reduced, some of them blurred, all noised by a random level."""
    count, device = len(picture), picture.device
    # Images of a decoder are less sharp than reduced ones.
    sigma = config.max_blur * torch.rand(count, device=device)
    sigma = sigma * (torch.rand(count, device=device) < config.blur_probability)
    low = blur_images(reduce_to_low_resolution(picture, config.factor), sigma)
    level = upsampler.config.max_level * torch.rand(count, device=device)
    if z_i is not None:
        z_i = z_i * (torch.rand(count, 1, device=device) >= config.embedding_dropout)  # the null is zero
    return LowResolution(augment_low_resolution(low, level, torch.randn_like(low)), level, z_i)


def blur_images(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Blur images, (B, C, h, w), by Gaussians with a standard deviation for each, (B,), in pixels; 0 is no blur."""
    count, channels, height, width = pictures.shape
    # Three deviations hold nearly all of a Gaussian
    radius = max(1, round(3 * float(sigma.max())))
    offset = torch.arange(-radius, radius + 1, device=pictures.device)
    # A deviation of 0 becomes one so small that the middle has all weight
    kernel = torch.exp(-offset.square() / (2 * sigma.clamp(min=1e-3)[:, None].square()))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)[:, None]
    # One group a channel of an image, so that each image has its own kernel; first along rows, then along columns
    groups = count * channels
    padded = F.pad(pictures, (radius,) * 4, mode="replicate")
    padded = padded.view(1, groups, height + 2 * radius, width + 2 * radius)
    blurred = F.conv2d(F.conv2d(padded, kernel[:, :, None], groups=groups), kernel[..., None], groups=groups)
    return blurred.view(pictures.shape)


@torch.no_grad()
def draw_upsampler_preview(
    upsampler: Upsampler, pictures: Tensor, scheduler: SchedulerMixin, config: SampleConfig
) -> dict[str, Image]:
    """Draw images, (K, 3, H, W) in [-1, 1], from low resolution: resized and upsampled, with the PSNR of both."""
    factor = upsampler.config.factor
    side = pictures.shape[-1] // factor * factor
    pictures = pictures[..., :side, :side]
    low = reduce_to_low_resolution(pictures, factor)
    generators = [Generator().manual_seed(config.seed + i) for i in range(len(low))]
    drawn = sample_upsampler(upsampler, scheduler, low, Sampling(config.num_inference_steps, generators)).cpu()
    rows = {"bicubic": enlarge_low_resolution(low, factor).clamp(-1, 1), "upsampled": drawn}
    psnr = {name: 10 * torch.log10(4 / (row - pictures).square().mean(dim=(1, 2, 3))) for name, row in rows.items()}
    pairs = zip(psnr["bicubic"].tolist(), psnr["upsampled"].tolist())
    labels = [f"{resized:.1f} dB, {upsampled:.1f} dB" for resized, upsampled in pairs]
    images = {name: to_pil_images(row) for name, row in (rows | {"image": pictures}).items()}
    return {"upsampled": build_labelled_rows(images, labels)}


if __name__ == "__main__":
    run(main, Config, "upsampler", sys.argv[1:])
