"""How near a prior's z_i come to those of the pictures, measured on a cache."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Generator, Tensor

from t2i.data.cache import CachedPairs
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.sampling_loop import Sampling
from t2i.errors import InputError
from t2i.sampling.embeddings import AnyPrior, sample_image_embeds

BATCH_SIZE = 256


def open_cache_splits(folder: str | Path, prior: AnyPrior | None) -> dict[str, CachedPairs]:
    """The splits of a cache. Raises InputError if it has no captions, or belongs to another CLIP than the prior."""
    first = CachedPairs(folder, latents=False)
    if first.clip is None or not first.text:
        raise InputError(f"the cache {str(folder)!r} was made without clip or text; a prior is measured on both")
    theirs = None if prior is None else prior.config.clip_fingerprint
    if theirs is not None and theirs != first.clip.identity:
        raise InputError(f"the prior was trained with the CLIP {theirs}, the cache has {first.clip.identity}")
    return {split: CachedPairs(folder, split, latents=False) for split in first.splits}


def evaluate_prior_splits(
    prior: AnyPrior | None,
    scheduler: SchedulerMixin | None,
    splits: dict[str, CachedPairs],
    count: int = 512,
    steps: int = 25,
    guidance: float | Guidance | None = None,
    candidates: int = 2,
    temperature: float | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """For each split, of at most `count` captions from all over it, each with its own seed; guidance None is the usual:

    cosine: with the true z_i, the mean. retrieval: how often the true z_i is the nearest of all in the cache.
    text: the dot product with z_t, the mean; that of the true z_i is true_text.
    """
    gallery = F.normalize(torch.cat([collect_image_embeds(pairs) for pairs in splits.values()]), dim=-1)
    first, scores = 0, {}
    for split, pairs in splits.items():
        chosen = list(range(0, len(pairs), -(-len(pairs) // count)))
        drawn, true, z_t = [], [], []
        for start in range(0, len(chosen), BATCH_SIZE):
            part = chosen[start : start + BATCH_SIZE]
            batch = pairs.__getitems__([(index, 0) for index in part])
            assert batch.text is not None and batch.image_embeds is not None
            seeds = [Generator().manual_seed(seed + start + i) for i in range(len(part))]
            sampling = Sampling(steps, seeds, guidance)
            drawn.append(sample_image_embeds(prior, scheduler, batch.text, None, sampling, candidates, temperature))
            true.append(batch.image_embeds)
            z_t.append(batch.text.embedding)
        z_i, truth, text = torch.cat(drawn), torch.cat(true), torch.cat(z_t)
        found = (z_i @ gallery.T).argmax(dim=1) == torch.tensor(chosen) + first
        figures = {
            "cosine": F.cosine_similarity(z_i, truth).mean(),
            "retrieval": found.double().mean(),
            "text": F.cosine_similarity(z_i, text).mean(),
            "true_text": F.cosine_similarity(truth, text).mean(),
        }
        scores[split] = {"captions": len(chosen)} | {name: round(float(value), 4) for name, value in figures.items()}
        first += len(pairs)
    return scores


def collect_image_embeds(pairs: CachedPairs) -> Tensor:
    """(n, D), fp32."""
    return torch.cat([pairs.open_shard(number)["image_embeds"] for number in range(len(pairs.rows))]).float()
