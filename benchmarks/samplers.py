"""Samplers x steps x guidance of the decoder on the shipped model, quality against time.

    python -m benchmarks.samplers data/emoji out/samplers [--captions 32]

Every cell draws the same captions from the same embeddings and seeds: those of the prior, drawn once. Measured are the
emoji test (t2i.evaluation.emoji), the cosine of the drawn picture's CLIP embedding with the one that was asked for, the
Frechet distance to all real emoji on the first principal components of that embedding (as many as a covariance of so
few pictures can hold), and the time of the decoder alone. Writes samplers.json, samplers.md and samplers.png.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from t2i.pipelines.options import PriorOptions
from t2i.pipelines.text2image import Text2ImagePipeline
from torch import Generator, Tensor

from benchmarks.plot import Line, Panel, plot
from t2i.commands import SHIPPED_MODEL
from t2i.data import CaptionedPictures, Record
from t2i.diffusion.samplers import SAMPLERS, build_sampler
from t2i.evaluation.emoji import (
    choose_emoji_captions,
    compute_pixel_features,
    iterate_emoji_batches,
    open_emoji_dataset,
    strip_name_modifier,
)
from t2i.evaluation.metrics import compute_feature_moments, compute_frechet_distance
from t2i.sampling.embeddings import default_guidance_scale
from t2i.sampling.sample import sample_decoder, sample_prior, split_generators

STEPS = (5, 10, 25)
GUIDANCE = (1.5, 1.0, 3.0)  # the defaults first: what is measured is reported after each
COMPONENTS = 16  # of the Frechet distance
BASE = ("ddim", 25, 1.5)  # the pipeline's defaults: whose time is 1
HUES = ((40, 90, 160), (200, 50, 40), (20, 140, 60), (150, 90, 170), (230, 140, 20), (90, 90, 90), (0, 160, 180))
COLORS = dict(zip(SAMPLERS, HUES))


class Bench:
    """What all cells share: the captions, their embeddings, and what their pictures are compared with."""

    def __init__(self, folder: Path, captions: int, model: str):
        self.pipeline = Text2ImagePipeline.from_pretrained(model)
        self.dataset: CaptionedPictures
        self.dataset, self.records = open_emoji_dataset(folder)
        self.chosen: list[Record] = choose_emoji_captions(self.records, captions)["train"]
        self.real = torch.cat(
            [compute_pixel_features(batch) for batch in iterate_emoji_batches(self.dataset, self.records)]
        )
        embeds = torch.cat([self.seen(batch) for batch in iterate_emoji_batches(self.dataset, self.records)])
        self.center = embeds.mean(dim=0)
        self.axes = torch.linalg.eigh((embeds - self.center).T.cov()).eigenvectors[:, -COMPONENTS:]
        self.moments = compute_feature_moments(self.project(embeds))
        self.text = self.pipeline.encode_prompt([record.text for record in self.chosen])
        scheduler = self.pipeline.prior_scheduler
        options, (prior, _) = PriorOptions(), self.generators()
        settings = (options.prior_num_inference_steps, default_guidance_scale(self.pipeline.prior), prior)
        self.z_i = sample_prior(self.pipeline.prior, scheduler, self.text, None, *settings)

    def generators(self) -> tuple[list[Generator], ...]:
        return split_generators([Generator().manual_seed(i) for i in range(len(self.chosen))], len(self.chosen))

    @torch.no_grad()
    def seen(self, pictures: Tensor) -> Tensor:
        return F.normalize(self.pipeline.encode_image(pictures), dim=-1)

    def project(self, embeds: Tensor) -> Tensor:
        return (embeds - self.center) @ self.axes

    def cell(self, sampler: str, steps: int, guidance: float) -> dict[str, Any]:
        scheduler = build_sampler(sampler, self.pipeline.decoder_scheduler)
        _, generators = self.generators()
        begun = time.perf_counter()
        latents = sample_decoder(self.pipeline.decoder, scheduler, self.z_i, self.text, steps, guidance, generators)
        seconds = time.perf_counter() - begun
        pictures = torch.cat([self.pipeline.decode(part, "pt") for part in latents.split(16)]).float() * 2 - 1
        nearest = [
            self.records[i] for i in torch.cdist(compute_pixel_features(pictures), self.real).argmin(dim=1).tolist()
        ]
        embeds = self.seen(pictures)
        exact = [one.index == other.index for one, other in zip(self.chosen, nearest)]
        named = [
            strip_name_modifier(one.text) == strip_name_modifier(other.text) for one, other in zip(self.chosen, nearest)
        ]
        return {
            "sampler": sampler,
            "steps": steps,
            "guidance": guidance,
            "seconds": seconds,
            "exact": sum(exact) / len(exact),
            "same_name": sum(named) / len(named),
            "cosine": (embeds * self.z_i).sum(dim=1).mean().item(),
            "frechet": compute_frechet_distance(compute_feature_moments(self.project(embeds)), self.moments),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--model", default=str(SHIPPED_MODEL))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.folder, given.captions, given.model)
    bench.cell("ddim", 2, 1.5)  # warm
    cells: list[dict[str, Any]] = []
    for guidance in GUIDANCE:
        for steps in STEPS:
            for sampler in SAMPLERS:
                cells.append(bench.cell(sampler, steps, guidance))
                print(json.dumps(cells[-1]), flush=True)
        report(given.out, cells, given.captions)


def report(out: Path, cells: list[dict[str, Any]], captions: int) -> None:
    """The figures, the table and the plot."""
    base = next(cell["seconds"] for cell in cells if (cell["sampler"], cell["steps"], cell["guidance"]) == BASE)
    for cell in cells:
        cell["time"] = cell["seconds"] / base
    (out / "samplers.json").write_text(json.dumps({"captions": captions, "cells": cells}, indent=1) + "\n")
    lines = ["| guidance | steps | sampler | time | very emoji | same name | cosine | Fréchet |", "|" + "---|" * 8]
    for cell in cells:
        scores = f"{cell['exact']:.0%} | {cell['same_name']:.0%} | {cell['cosine']:.3f} | {cell['frechet']:.4f}"
        lines.append(f"| {cell['guidance']:g} | {cell['steps']} | {cell['sampler']} | {cell['time']:.2f} | {scores} |")
    (out / "samplers.md").write_text("\n".join(lines) + "\n")
    panels = []
    for guidance in sorted({cell["guidance"] for cell in cells}):
        shown = []
        for name in SAMPLERS:
            row = [cell for cell in cells if (cell["sampler"], cell["guidance"]) == (name, guidance)]
            shown.append(Line(name, COLORS[name], [(cell["time"], cell["cosine"]) for cell in row]))
        panels.append(Panel(f"guidance {guidance:g}", "time (the defaults' = 1)", "cosine with z_i", shown))
    plot(panels, log_x=True).quantize(64).save(out / "samplers.png", optimize=True)


if __name__ == "__main__":
    main()
