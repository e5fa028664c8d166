"""How near a prior's z_i come to those of the images, measured on a cache."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Generator

from t2i.data.cache import CachedPairs
from t2i.diffusion.sampling_loop import Sampling
from t2i.errors import InputError
from t2i.progress import Progress, follow_steps
from t2i.sampling.embeddings import AnyPrior, sample_image_embeds

BATCH_SIZE = 256


def open_cache_splits(folder: str | Path, prior: AnyPrior | None) -> dict[str, CachedPairs]:
    """Open the splits of a cache. Raises InputError if it has no captions, or another CLIP than the prior."""
    first = CachedPairs(folder, latents=False)
    if first.clip_facts is None or not first.text:
        raise InputError(f"the cache {str(folder)!r} was made without clip or text; a prior is measured on both")
    expected = None if prior is None else prior.config.clip_fingerprint
    if expected is not None and expected != first.clip_facts.identity:
        raise InputError(f"the prior was trained with the CLIP {expected}, the cache has {first.clip_facts.identity}")
    return {split: CachedPairs(folder, split, latents=False) for split in first.splits}


def evaluate_prior_splits(
    prior: AnyPrior | None,
    scheduler: SchedulerMixin | None,
    splits: dict[str, CachedPairs],
    sampling: Sampling,
    count: int = 512,
    candidates: int = 2,
    temperature: float | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Measure z_i for at most `count` captions of each split, spread over it; caption i has the seed `seed + i`.

    sampling: steps and guidance. candidates, temperature: see `sample_image_embeds`. The figures of a split:

    cosine: mean cosine with the true z_i.
    retrieval: fraction of captions to whose z_i the true z_i is the nearest of all splits.
    text: mean cosine with z_t; `true_text` is that of the true z_i.
    """
    # All true z_i of all splits, among which the nearest is searched
    shards = [pairs.open_shard(i)["image_embeds"] for pairs in splits.values() for i in range(len(pairs.rows))]
    gallery = F.normalize(torch.cat(shards).float(), dim=-1)
    first, scores = 0, {}  # first: row of the split's first pair in the gallery
    for split, pairs in splits.items():
        # Evenly spread: every k-th, with the least k that gives at most `count`
        chosen = list(range(0, len(pairs), -(-len(pairs) // count)))
        sampled, true, text = [], [], []
        with Progress(f"sampling for {split}", len(chosen), "captions") as progress:
            for start in range(0, len(chosen), BATCH_SIZE):
                part = chosen[start : start + BATCH_SIZE]
                batch = pairs.__getitems__([(index, 0) for index in part])
                assert batch.text is not None and batch.image_embeds is not None
                generators = [Generator().manual_seed(seed + start + i) for i in range(len(part))]
                settings = replace(sampling, generators=generators, progress=partial(follow_steps, "sampling"))
                with progress.follow_batch(len(part)):
                    z_i = sample_image_embeds(prior, scheduler, batch.text, None, settings, candidates, temperature)
                sampled.append(z_i)
                true.append(batch.image_embeds)
                text.append(batch.text.embedding)
        z_i, true_z_i, z_t = torch.cat(sampled), torch.cat(true), torch.cat(text)
        # By the cosine: the gallery has unit length, and the length of z_i changes no order
        is_nearest = (z_i @ gallery.T).argmax(dim=1) == torch.tensor(chosen) + first
        figures = {
            "cosine": F.cosine_similarity(z_i, true_z_i).mean(),
            "retrieval": is_nearest.double().mean(),
            "text": F.cosine_similarity(z_i, z_t).mean(),
            "true_text": F.cosine_similarity(true_z_i, z_t).mean(),
        }
        scores[split] = {"captions": len(chosen)} | {name: round(float(value), 4) for name, value in figures.items()}
        first += len(pairs)
    return scores
