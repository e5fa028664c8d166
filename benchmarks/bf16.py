"""The shipped emoji model in bf16 against itself in fp32: the time, and whether the pictures show the same emoji.

    python -m benchmarks.bf16

Two choices: the decoder and the autoencoder alone, which is where the time goes, and everything. In both, networks
alone compute in bf16: latents, z_i, the schedulers' steps and the guidance are fp32
(`t2i.diffusion.denoiser.build_conditional_predict`,
`t2i.diffusion.guidance.build_guided_predict`). 200 captions, half of them held out, each with its own seed; a
picture shows the
real emoji
that is nearest by `t2i.evaluation.emoji.compute_pixel_features`.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from t2i.pipelines import Text2ImagePipeline
from torch import Generator, Tensor

from benchmarks.side_by_side import Row, alternate, device, row, run
from t2i.evaluation.emoji import (
    choose_emoji_captions,
    compute_pixel_features,
    iterate_emoji_batches,
    open_emoji_dataset,
)
from t2i.runtime.devices import check_bf16_support

ROOT = Path(__file__).resolve().parents[1]
EMOJI, PICTURES = ROOT / "models" / "emoji", ROOT / "data" / "emoji"
EACH, BATCH, SEED = 100, 20, 1000  # captions of each split
CHOICES = {
    "decoder and autoencoder in bf16": {"decoder": torch.bfloat16, "autoencoder": torch.bfloat16},
    "all in bf16": torch.bfloat16,
}
WANTED = 0.99


def load(dtype: torch.dtype | dict[str, torch.dtype] = torch.float32) -> Text2ImagePipeline:
    pipeline = Text2ImagePipeline.from_pretrained(EMOJI, dtype=dtype).to(device())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Text2ImagePipeline, texts: list[str], first: int = 0, steps: int | None = None) -> Tensor:
    """(N, 3, H, W) in [0, 1], fp32, on the CPU; text i has the seed first + i. steps: None is the pipeline's own."""
    own = [Generator().manual_seed(first + number) for number in range(len(texts))]
    settings = {} if steps is None else {"num_inference_steps": steps, "prior_num_inference_steps": steps}
    return pipeline(texts, generator=own, output_type="pt", **settings).images.float().cpu()


def same_emoji(pipelines: dict[str, Text2ImagePipeline], peer: str) -> dict[str, str]:
    """What each pipeline's pictures have in common with the peer's, in words."""
    dataset, records = open_emoji_dataset(PICTURES)
    real = torch.cat([compute_pixel_features(batch) for batch in iterate_emoji_batches(dataset, records)])
    texts = [one.text for part in choose_emoji_captions(records).values() for one in part[:EACH]]
    same, mean = dict.fromkeys(pipelines, 0), dict.fromkeys(pipelines, 0.0)
    largest, other = dict.fromkeys(pipelines, 0.0), {name: list[str]() for name in pipelines}
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        drawn = {name: draw(one, part, SEED + start) for name, one in pipelines.items()}
        nearest = {
            name: torch.cdist(compute_pixel_features(2 * one - 1), real).argmin(dim=1) for name, one in drawn.items()
        }
        for name in pipelines:
            agree, error = nearest[name] == nearest[peer], (drawn[name] - drawn[peer]).abs()
            same[name] += int(agree.sum())
            other[name] += [text for text, kept in zip(part, agree) if not kept]
            mean[name] += float(error.mean()) * len(part) / len(texts)
            largest[name] = max(largest[name], float(error.max()))
    return {
        name: f"the same emoji for {same[name]} of {len(texts)} captions"
        + (f" (not for {', '.join(other[name])})" if other[name] else "")
        + f", {'as' if same[name] >= WANTED * len(texts) else 'not as'} wanted"
        + f"; pixels in [0, 1] differ by {mean[name]:.4f}, at most {largest[name]:.3f}"
        for name in pipelines
    }


def pictures_are_there() -> bool:
    """Whether the emoji are; if not, says so, and only the time is measured."""
    if found := (PICTURES / "metadata.jsonl").exists():
        return found
    made = "`t2i data emoji data/emoji` makes them"
    print(f"which emoji pictures show is not measured: {PICTURES} is not there; {made}", file=sys.stderr)
    return found


def main(quick: bool) -> list[Row]:
    check_bf16_support(device().type)
    pipelines = {name: load(dtype) for name, dtype in CHOICES.items()} | {"fp32": load()}
    prompts = ["red apple", "grinning face", "blue heart", "dog face"] * 4
    prompts = prompts[:2] if quick else prompts
    works = {name: partial(draw, one, prompts, 0, 2 if quick else None) for name, one in pipelines.items()}
    if quick:
        fp32 = works["fp32"]()
        for name in CHOICES:
            assert (works[name]() - fp32).abs().mean() < 0.02, f"{name} is another picture"
    times = alternate(works, 2 if quick else 5)
    notes = same_emoji(pipelines, "fp32") if not quick and pictures_are_there() else {}
    rows = []
    for name in CHOICES:
        what = f"emoji, {len(prompts)} prompts, {name}"
        rows.append(row(what, times.of(name, "fp32"), 1.4, note=notes.get(name, "")))
    return rows


if __name__ == "__main__":
    run("bf16", main)
