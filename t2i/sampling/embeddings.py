"""Priors of every kind, or none: how they are loaded, and one function that draws z_i with any of them."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Generator, Tensor

from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.denoiser import PredictTransform, StepCallback
from t2i.diffusion.guidance import Guidance
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

PRIORS_WITHOUT_SCHEDULER = (AutoregressivePrior, RegressionPrior, EclipsePrior)  # priors that have no scheduler
PRIOR_CLASSES = (Prior, *PRIORS_WITHOUT_SCHEDULER, DALLE2Prior)  # what a pipeline's prior may be, or none at all
MAX_CANDIDATES = 64

AnyPrior = Prior | DALLE2Prior | AutoregressivePrior | RegressionPrior | EclipsePrior


def load_prior(folder: str | Path) -> tuple[AnyPrior | None, SchedulerMixin | None]:
    """The prior of a run or of a pipeline, with its scheduler if it has one; of "none" neither."""
    if str(folder) == "none":
        return None, None
    path = Path(folder)
    in_pipeline = is_folder(path) and (path / "model_index.json").is_file()
    prior = load_model(PRIOR_CLASSES, path / "prior" if in_pipeline else path).eval()
    if isinstance(prior, PRIORS_WITHOUT_SCHEDULER):
        return prior, None
    return prior, load_scheduler(path / ("prior_scheduler" if in_pipeline else "scheduler"))


def default_guidance_scale(prior: AnyPrior | None) -> float:
    """What a prior is guided by if nothing is said: what its configuration says, or 2; or 1, which is off, for one of a
    single pass, which is never guided, and for one that starts from a regression: guidance takes it too far
    (docs/priors.md)."""
    if isinstance(prior, AutoregressivePrior):
        return 1.0 if prior.config.regression is not None else 2.0
    if isinstance(prior, PRIORS_WITHOUT_SCHEDULER):
        return 1.0
    return 2.0 if prior is None else prior.config.get("usual_guidance", 2.0)


@torch.no_grad()
def sample_image_embeds(
    prior: AnyPrior | None,
    scheduler: SchedulerMixin | None,
    text: TextEncoding,
    negative: TextEncoding | None,
    steps: int,
    guidance: float | Guidance | None,
    generators: list[Generator],
    candidates: int = 1,
    noise: Tensor | None = None,
    temperature: float | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    on_step: StepCallback | None = None,
    wrap: PredictTransform | None = None,
) -> Tensor:
    """z_i for captions, (N, D), fp32, by any prior, of unit length unless the prior's `unit_length` is False; without
    one, the captions' own z_t.

    Of `candidates` drawn for each caption the one nearest to z_t is taken (DALL-E 2, section 2.2). The first of them is
    the one that is drawn alone; a regression knows one only.

    scheduler, steps, noise, wrap: of the diffusion prior, see `sample_prior`; the candidates of a given noise (also of
    an EclipsePrior) are that one alone. guidance: None is the usual one. temperature: of the autoregressive prior. What
    has no effect on a prior is said in the log. on_step(i, t, x): x has a row for each candidate, those of a caption
    together, and is of the autoregressive prior z_i as far as it is known.
    """
    if prior is None:
        return text.expand().embedding.float()
    guidance = default_guidance_scale(prior) if guidance is None else guidance
    warn_unused_options(prior, negative, guidance, noise, temperature)
    if isinstance(prior, RegressionPrior):
        return prior.sample_image_embeds(text)
    candidates = count_candidates(prior, candidates, noise)
    several = text.repeat(candidates)
    away = None if negative is None else negative.repeat(candidates)
    streams = [stream for one in generators for stream in build_candidate_generators(one, candidates)]
    if isinstance(prior, AutoregressivePrior):
        check_scale_only(guidance)
        scale = Guidance.from_value(guidance).scale

        def after(i: int, z_i: Tensor) -> None:
            if on_step is not None:
                on_step(i, torch.tensor(prior.codes_per_embedding - 1 - i), z_i)

        z_i = prior.sample_image_embeds(several, away, scale, streams, temperature, progress, after)
    elif isinstance(prior, EclipsePrior):
        z_i = prior.sample_image_embeds(several, streams, noise)
    else:
        assert scheduler is not None, "a diffusion prior has a scheduler"
        z_i = sample_prior(prior, scheduler, several, away, steps, guidance, streams, noise, progress, on_step, wrap)
    return select_nearest_candidates(z_i, text.expand().embedding)


def count_candidates(prior: AnyPrior, candidates: int, noise: Tensor | None) -> int:
    """Of so many that were asked for; a given noise is that of one."""
    return 1 if noise is not None and not isinstance(prior, AutoregressivePrior) else candidates


def warn_unused_options(
    prior: AnyPrior,
    negative: TextEncoding | None,
    guidance: float | Guidance,
    noise: Tensor | None,
    temperature: float | None,
) -> None:
    """Say in the log, as a pipeline calls them, which options do nothing with this prior."""
    of_one_pass = isinstance(prior, RegressionPrior | EclipsePrior)
    unused = {
        "prior_latents": (
            noise is not None and isinstance(prior, AutoregressivePrior | RegressionPrior),
            "is the noise of a diffusion prior",
        ),
        "prior_temperature": (
            temperature is not None and not isinstance(prior, AutoregressivePrior),
            "is of an autoregressive prior",
        ),
        "prior_guidance_scale": (
            of_one_pass and not Guidance.from_value(guidance).is_off,
            "cannot guide a prior of one pass",
        ),
        "negative_prompt": (
            of_one_pass and negative is not None,
            "cannot guide a prior of one pass (decoder_negative_prompt is for the decoder)",
        ),
    }
    for name, (given, reason) in unused.items():
        if given:
            logger.warning("%s has no effect: it %s; this prior is a %s", name, reason, type(prior).__name__)


def build_candidate_generators(generator: Generator, candidates: int) -> list[Generator]:
    """The picture's own for the first candidate, and one for each other, seeded from a copy of its state."""
    copy = generator.clone_state()
    seeds = [int(torch.randint(2**62, (1,), generator=copy, device=copy.device)) for _ in range(candidates - 1)]
    return [generator, *(Generator().manual_seed(seed) for seed in seeds)]


def select_nearest_candidates(z_i: Tensor, z_t: Tensor) -> Tensor:
    """Of the candidates of each caption, (N * candidates, D), the one of the largest cosine with z_t, (N, D)."""
    groups = z_i.view(len(z_t), -1, z_i.shape[-1])
    best = F.cosine_similarity(groups, z_t.to(groups)[:, None], dim=-1).argmax(dim=1)
    return groups[torch.arange(len(groups), device=groups.device), best]


def check_scale_only(guidance: float | Guidance) -> None:
    """Refuse what is of noise levels and samples for a prior that has neither."""
    if Guidance.from_value(guidance) != Guidance(Guidance.from_value(guidance).scale):
        raise InputError(f"prior_guidance_scale of an autoregressive prior must be a scale alone, got {guidance}")
