"""Priors of every kind, or none: loading them, and sampling z_i with any of them."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Generator, Tensor

from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.samplers import remember_training
from t2i.diffusion.sampling_loop import Sampling
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.files.model_folder import load_model
from t2i.files.untrusted import is_folder
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.networks.dalle2.prior import DALLE2Prior
from t2i.networks.prior import Prior
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.regression_prior import RegressionPrior
from t2i.sampling.sample import sample_prior

logger = logging.getLogger(__name__)

PRIOR_CLASSES = (Prior, AutoregressivePrior, RegressionPrior, EclipsePrior, DALLE2Prior)
MAX_CANDIDATES = 64

AnyPrior = Prior | DALLE2Prior | AutoregressivePrior | RegressionPrior | EclipsePrior


def load_prior(folder: str | Path) -> tuple[AnyPrior | None, SchedulerMixin | None]:
    """Load the prior of a run or of a pipeline, with its scheduler if it has one; "none" is neither."""
    if str(folder) == "none":
        return None, None
    path = Path(folder)
    # A run's folder has `model` and `scheduler`, a pipeline's has `prior` and `prior_scheduler`
    in_pipeline = is_folder(path) and (path / "model_index.json").is_file()
    prior = load_model(PRIOR_CLASSES, path / "prior" if in_pipeline else path).eval()
    if not prior.needs_scheduler:
        return prior, None
    scheduler = load_scheduler(path / ("prior_scheduler" if in_pipeline else "scheduler"))
    remember_training(prior, scheduler)
    return prior, scheduler


def get_default_guidance_scale(prior: AnyPrior | None) -> float:
    """Return the guidance scale of a prior where none is given; 2 where there is no prior."""
    return 2.0 if prior is None else prior.default_guidance_scale


def get_default_steps(prior: AnyPrior | None) -> int:
    """Return the denoising steps of a prior where none are given; 25 where there is no prior."""
    return 25 if prior is None else prior.default_steps


@torch.no_grad()
def sample_image_embeds(
    prior: AnyPrior | None,
    scheduler: SchedulerMixin | None,
    text: TextEncoding,
    negative: TextEncoding | None,
    sampling: Sampling,
    candidates: int = 1,
    temperature: float | None = None,
) -> Tensor:
    """Sample z_i for captions, (N, D), fp32, by any prior; without a prior, return the captions' own z_t.

    Of unit length, unless the prior's `unit_length` is False. Of `candidates` drawn for each caption the one nearest to
    z_t is taken (DALL-E 2, section 2.2). The first candidate is the one that is drawn alone; a regression, and a given
    noise, have one only. Options that have no effect on a prior are logged.

    scheduler: that of a diffusion prior. sampling: see `sample_prior`; `on_step` gets a row for each candidate, those
    of a caption together: z_i as far as it is known for an autoregressive prior. temperature: spread of an
    autoregressive prior.
    """
    if prior is None:
        return text.expand().embedding.float()
    guidance = Guidance.from_value(
        get_default_guidance_scale(prior) if sampling.guidance is None else sampling.guidance
    )
    warn_unused_options(prior, negative, guidance, sampling.noise, temperature)
    # A regression has one answer: neither guidance nor candidates
    if isinstance(prior, RegressionPrior):
        return prior.sample_image_embeds(text)
    candidates = count_candidates(prior, candidates, sampling.noise)
    # Candidates of one caption are neighbours, as `select_nearest_candidates` expects
    generators = [new for given in sampling.generators for new in build_candidate_generators(given, candidates)]
    sampling = replace(sampling, guidance=guidance, generators=generators)
    captions, negative = text.repeat(candidates), None if negative is None else negative.repeat(candidates)
    if isinstance(prior, AutoregressivePrior):
        check_scale_only(guidance)
        z_i = prior.sample_image_embeds(captions, negative, sampling, temperature)
    elif isinstance(prior, EclipsePrior):
        z_i = prior.sample_image_embeds(captions, sampling)
    else:
        assert scheduler is not None, "a diffusion prior has a scheduler"
        z_i = sample_prior(prior, scheduler, captions, negative, sampling)
    return select_nearest_candidates(z_i, text.expand().embedding)


def count_candidates(prior: AnyPrior, candidates: int, noise: Tensor | None) -> int:
    """Return the number of candidates that are sampled: 1 if the noise is given."""
    return 1 if noise is not None and prior.takes_noise else candidates


def warn_unused_options(
    prior: AnyPrior, negative: TextEncoding | None, guidance: Guidance, noise: Tensor | None, temperature: float | None
) -> None:
    """Log which options, by their names in a pipeline, have no effect with this prior."""
    unused = []
    if noise is not None and not prior.takes_noise:
        unused.append(("prior_latents", "is the noise of a diffusion prior"))
    if temperature is not None and not prior.takes_temperature:
        unused.append(("prior_temperature", "is for an autoregressive prior"))
    if not prior.takes_guidance and not guidance.is_off:
        unused.append(("prior_guidance_scale", "cannot guide a prior of one pass"))
    if not prior.takes_guidance and negative is not None:
        reason = "cannot guide a prior of one pass (decoder_negative_prompt is for the decoder)"
        unused.append(("negative_prompt", reason))
    for name, reason in unused:
        logger.warning("%s has no effect: it %s; this prior is a %s", name, reason, type(prior).__name__)


def build_candidate_generators(generator: Generator, candidates: int) -> list[Generator]:
    """Return the image's generator for the first candidate, and new ones for the others.

    Their seeds are drawn from a copy, so that the first candidate is the one that is sampled alone.
    """
    copy = generator.clone_state()
    seeds = [int(torch.randint(2**62, (1,), generator=copy, device=copy.device)) for _ in range(candidates - 1)]
    return [generator, *(Generator().manual_seed(seed) for seed in seeds)]


def select_nearest_candidates(z_i: Tensor, z_t: Tensor) -> Tensor:
    """Select for each caption the candidate of (N * candidates, D) with the largest cosine with z_t, (N, D)."""
    groups = z_i.view(len(z_t), -1, z_i.shape[-1])
    best = F.cosine_similarity(groups, z_t.to(groups)[:, None], dim=-1).argmax(dim=1)
    return groups[torch.arange(len(groups), device=groups.device), best]


def check_scale_only(guidance: float | Guidance) -> None:
    """Refuse guidance settings that need noise levels or clean samples, which an autoregressive prior lacks."""
    if Guidance.from_value(guidance) != Guidance(Guidance.from_value(guidance).scale):
        raise InputError(f"prior_guidance_scale of an autoregressive prior must be a number alone, got {guidance}")
