"""Bits per dimension of the true latents and image embeddings under a pipeline's two denoisers."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Generator, Tensor

from t2i.checks import check_choice, check_integer
from t2i.config import DataConfig
from t2i.data import CaptionedPictures, open_datasets
from t2i.data.dataset import stack_views
from t2i.data.manifest import SPLITS
from t2i.diffusion.denoiser import Predict, build_conditional_predict
from t2i.diffusion.likelihood import compute_ode_bits, compute_variational_bound
from t2i.errors import InputError
from t2i.evaluation.results import check_result_file, collect_package_versions, write_result_file
from t2i.progress import Progress, follow_batch
from t2i.sampling.sample import build_decoder_condition, build_decoder_predict

MEASURED_STAGES = ("prior", "decoder")
BATCH_SIZE = 16
RESULT_NOTE = (
    "Bits per dimension of a continuous density: of latents, and of image embeddings scaled to unit variance, not of "
    "images. They can be negative: half the standard deviation takes one bit less. The ODE's likelihood is that of "
    "data with the noise of the lowest trained level."
)


@dataclass(frozen=True)
class LikelihoodSettings:
    """Settings of a measurement of each split.

    count: images, spread over the split. terms: number in the variational bound. steps: number for the ODE. seed: of
    the first image, each further one adds 1, and of the bound's timesteps.

    Raises InputError for a value out of range.
    """

    count: int = 32
    terms: int = 100
    steps: int = 25
    seed: int = 0
    stages: tuple[str, ...] = MEASURED_STAGES

    def __post_init__(self) -> None:
        check_integer("count", self.count, 2, 100_000)
        check_integer("terms", self.terms, 2, 100_000)
        check_integer("steps", self.steps, 2, 10_000)
        check_integer("seed", self.seed, 0, 2**62)
        for stage in self.stages:
            check_choice("stage", stage, MEASURED_STAGES)


def evaluate_model_likelihood(
    pipeline: Any, folder: str | Path, out: str | Path, settings: LikelihoodSettings
) -> dict[str, Any]:
    """Measure images of each split; write the result to `out`, a JSON file, and return it.

    Measured are the latents given the true z_i under the decoder, and z_i given the caption under the prior, both
    without guidance. Raises InputError for too few images.
    """
    check_result_file(Path(out))
    # Refuse too few images before anything is measured
    splits = open_datasets(DataConfig(str(folder), pipeline.image_size, 0))
    for split in SPLITS:
        size = len(splits[split]) if split in splits else 0
        if size < settings.count:
            missing = f"count must be at most that, got {settings.count}"
            raise InputError(f"{str(folder)!r} has {size} images in {split}; {missing}")
    result: dict[str, Any] = {
        "what": "likelihood",
        "note": RESULT_NOTE,
        "model": str(pipeline.config.get("_name_or_path")),
        "data": str(folder),
        "settings": {name: value for name, value in asdict(settings).items() if name != "stages"},
        "versions": collect_package_versions(),
    }
    # Measure, and write the result
    for split, dataset in splits.items():
        with Progress(f"measuring {split}", settings.count):
            result[split] = measure_split_likelihood(pipeline, dataset, settings)
    write_result_file(result, Path(out))
    return result


def measure_split_likelihood(pipeline: Any, dataset: CaptionedPictures, settings: LikelihoodSettings) -> dict[str, Any]:
    """Return the figures of one split, by stage."""
    bits: dict[str, dict[str, list[Tensor]]] = {stage: {} for stage in settings.stages}
    dimensions = {}
    chosen = [i * len(dataset) // settings.count for i in range(settings.count)]
    for start in range(0, settings.count, BATCH_SIZE):
        part = chosen[start : start + BATCH_SIZE]
        seeds = [settings.seed + start + i for i in range(len(part))]
        with follow_batch(len(part)):
            for stage in settings.stages:
                x, scheduler, predict = prepare_stage_data(pipeline, dataset, part, stage)
                dimensions[stage] = x[0].numel()
                for name, values in compute_bits_per_dimension(predict, scheduler, x, seeds, settings).items():
                    bits[stage].setdefault(name, []).append(values.double().cpu())
    return {
        stage: {
            "dimensions": dimensions[stage],
            **{name: summarize_bits(torch.cat(rows)) for name, rows in values.items()},
        }
        for stage, values in bits.items()
    }


@torch.no_grad()
def prepare_stage_data(
    pipeline: Any, dataset: CaptionedPictures, indices: list[int], stage: str
) -> tuple[Tensor, SchedulerMixin, Predict]:
    """Return the data of a stage, (B, ...), its scheduler, and its predictions without guidance."""
    dataset.add_clip_view(pipeline.clip)
    pictures, seen = stack_views([dataset.load_view(index) for index in indices])
    z_i = pipeline.encode_image(pictures if seen is None else seen)
    text = pipeline.encode_prompt([dataset.get_record(index).text for index in indices])
    if stage == "decoder":
        condition = build_decoder_condition(pipeline.decoder, z_i, text)
        # Scale 1, because guidance changes the density
        predict = build_decoder_predict(pipeline.decoder, pipeline.decoder_scheduler, condition, 1.0)
        return pipeline.encode_latents(pictures), pipeline.decoder_scheduler, predict
    if pipeline.prior is None or pipeline.prior_scheduler is None:
        raise InputError("this model has no diffusion prior; measure the decoder alone, with --stage decoder")
    prior = pipeline.prior
    return (
        prior.scale_image_embeds(z_i),
        pipeline.prior_scheduler,
        build_conditional_predict(prior, text.to(z_i.device, prior.dtype)),
    )


def compute_bits_per_dimension(
    predict: Predict, scheduler: SchedulerMixin, x: Tensor, seeds: list[int], settings: LikelihoodSettings
) -> dict[str, Tensor]:
    """Return bits per dimension, (B,) each; `gaussian` is N(0, 1), a baseline without a model."""

    # Both measures start from the same generators
    def build_generators() -> list[Generator]:
        return [Generator().manual_seed(picture_seed) for picture_seed in seeds]

    terms, seed = settings.terms, settings.seed
    bound = compute_variational_bound(
        predict, scheduler, x, build_generators(), terms=terms, variance="large", seed=seed
    )
    normal = torch.distributions.Normal(0.0, 1.0)
    return {
        "bound": bound.total_bits,
        "bound_prior": bound.prior,
        "bound_steps": bound.steps.sum(dim=1),
        "bound_data": bound.data,
        "ode": compute_ode_bits(predict, scheduler, x, build_generators(), settings.steps),
        "gaussian": -normal.log_prob(x).flatten(1).mean(dim=1) / torch.tensor(2.0, device=x.device).log(),
    }


def summarize_bits(values: Tensor) -> dict[str, float]:
    return {
        "bits": round(values.mean().item(), 4),
        "standard_error": round(float(values.std() / len(values) ** 0.5), 4),
    }
