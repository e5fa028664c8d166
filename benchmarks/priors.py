"""Priors side by side: how near their z_i come to those of the pictures, and what choosing among candidates brings.

    python -m benchmarks.priors CACHE NAME=FOLDER ... [--pictures MODEL DATA]

A FOLDER is that of a trained prior or of a pipeline, or none for the text's own embedding. Each is measured at several
guidance scales and temperatures. --pictures draws the held-out captions with the pipeline MODEL, with one candidate and
with two, and says how near the pictures are to their captions, as the CLIP sees it that the pipeline itself uses.
Prints a JSON line for each measurement.
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from t2i.evaluation.priors import evaluate_prior_splits, open_cache_splits
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.networks.prior import Prior
from t2i.sampling.embeddings import load_prior

SCALES = (1.0, 1.5, 2.0)
TEMPERATURES = (0.0, 0.5, 1.0)
BATCH = 32


def settings_of(prior: Any) -> list[dict[str, Any]]:
    if isinstance(prior, Prior):
        return [{"guidance": scale, "candidates": candidates} for scale in SCALES for candidates in (1, 2)]
    if isinstance(prior, AutoregressivePrior):
        return [
            {"guidance": scale, "temperature": temperature, "candidates": candidates}
            for scale in SCALES
            for temperature in TEMPERATURES
            for candidates in ((1, 2) if temperature else (1,))
        ]
    return [{}]


def measure(cache: str, named: list[str], count: int) -> Iterator[dict[str, Any]]:
    for one in named:
        name, _, folder = one.partition("=")
        prior, scheduler = load_prior(folder)
        prior = None if prior is None else prior.float()
        splits = open_cache_splits(cache, prior)
        for settings in settings_of(prior):
            begun = time.perf_counter()
            scores = evaluate_prior_splits(prior, scheduler, splits, count, **settings)
            yield {"prior": name, **settings, **scores, "seconds": round(time.perf_counter() - begun, 1)}


def pictures(model: str, data: str) -> Iterator[dict[str, Any]]:
    """CLIP scores of the held-out captions' pictures; `gain` is over one candidate, picture by picture."""
    from t2i.pipelines.jobs.generation import load_pipeline

    from t2i.evaluation.emoji import choose_emoji_captions, open_emoji_dataset

    pipeline = load_pipeline(model, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    captions = [record.text for record in choose_emoji_captions(open_emoji_dataset(data)[1])["held_out"]]
    for scale in (1.0, 2.0):
        alone = None
        for candidates in (1, 2, 8):
            scores = clip_scores(pipeline, captions, prior_candidates=candidates, prior_guidance_scale=scale)
            alone = scores if alone is None else alone
            gain, error = scores - alone, (scores - alone).std() / len(scores) ** 0.5
            row = {"guidance": scale, "candidates": candidates, "clip_score": round(float(scores.mean()), 4)}
            yield row | {"gain": round(float(gain.mean()), 4), "error": round(float(error), 4)}


def clip_scores(pipeline: Any, captions: list[str], **settings: Any) -> torch.Tensor:
    """Cosine of each caption with its picture, (N,); picture i has seed i."""
    found = []
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        drawn = pipeline(part, generator=seeds, output_type="pt", num_inference_steps=10, **settings).images
        z_t = pipeline.encode_prompt(part).embedding
        found.append(F.cosine_similarity(pipeline.encode_image(drawn * 2 - 1), z_t))
    return torch.cat(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("priors", nargs="*")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--pictures", nargs=2, metavar=("MODEL", "DATA"))
    given = parser.parse_args()
    for row in measure(given.cache, given.priors, given.count):
        print(json.dumps(row), flush=True)
    for row in pictures(*given.pictures) if given.pictures else ():
        print(json.dumps(row), flush=True)
