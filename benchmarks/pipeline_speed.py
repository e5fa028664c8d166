"""From text to picture: a folder shaped as Kandinsky 2.2's, at reduced width, against diffusers' own two pipelines on
the same weights and noise; several pictures of one prompt; the shipped emoji model in bf16.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline
from torch import Generator, Tensor

from benchmarks.decoder_speed import EMBED, kandinsky_scheduler, kandinsky_unet
from benchmarks.side_by_side import Row, alternate, device, difference, row, run
from pipelines import Text2ImagePipeline
from t2i.devices import computes_in_bf16
from t2i.evaluation.emoji import choose, features, read_emoji, stacked
from t2i.sampling import split_generators
from tests import interop_folders as public
from tests.interop_kandinsky_folders import kandinsky_decoder_parts, kandinsky_prior_parts

ROOT = Path(__file__).resolve().parents[1]
EMOJI, PICTURES = ROOT / "models" / "emoji", ROOT / "data" / "emoji"
PROMPTS = ["a red cat", "a dog", "the red dog and a cat", "a cat and a red cat and a dog"]
PRIOR = {  # the public one has 32 heads of 64 and 20 layers
    False: {"num_attention_heads": 8, "attention_head_dim": 32, "num_layers": 6},
    True: {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2},
}


def parts_of_kandinsky(quick: bool) -> dict[str, tuple[str, Any]]:
    """Its components at reduced width, with random weights, as `tests.interop_folders.save_parts` takes them."""
    parts = kandinsky_prior_parts("2.2", "prior_") | kandinsky_decoder_parts("2.2")
    return parts | {
        "prior_prior": ("diffusers", public.tiny_prior_transformer(EMBED, **PRIOR[quick])),
        "prior_text_encoder": ("transformers", public.tiny_text_tower(EMBED, EMBED)),
        "prior_image_encoder": ("transformers", public.tiny_image_tower(EMBED)),
        "unet": ("diffusers", kandinsky_unet(quick)),
        "scheduler": ("diffusers", kandinsky_scheduler()),
    }


def generators(count: int) -> list[Generator]:
    return [Generator().manual_seed(number) for number in range(count)]


def ours(pipeline: Text2ImagePipeline, prompts: list[str], steps: int, each: int = 1) -> Tensor:
    settings = {"prior_num_inference_steps": 25, "prior_guidance_scale": 4.0, "prior_candidates": 1}
    own = generators(each * len(prompts))
    settings |= {"num_inference_steps": steps, "guidance_scale": 4.0, "num_images_per_prompt": each}
    return pipeline(prompts, generator=own, output_type="pt", **settings).images


def theirs(parts: dict[str, tuple[str, Any]], side: int) -> Callable[[list[str], int], Tensor]:
    of_prior = {name[len("prior_") :]: part for name, (_, part) in parts.items() if name.startswith("prior_")}
    of_decoder = {name: part for name, (_, part) in parts.items() if not name.startswith("prior_")}
    prior, decoder = KandinskyV22PriorPipeline(**of_prior), KandinskyV22Pipeline(**of_decoder)
    for one in (prior, decoder):
        one.set_progress_bar_config(disable=True)
        one.to(device())

    def draw(prompts: list[str], steps: int) -> Tensor:
        first, second = split_generators(generators(len(prompts)), len(prompts))
        z_i, away = prior(prompts, num_inference_steps=25, guidance_scale=4.0, generator=first, return_dict=False)
        settings: dict[str, Any] = {"height": side, "width": side, "guidance_scale": 4.0, "output_type": "pt"}
        images = decoder(z_i, away, num_inference_steps=steps, generator=second, **settings).images
        return (images / 2 + 0.5).clamp(0, 1)  # which it leaves to who takes tensors

    return draw


@contextmanager
def timed(part: Any, name: str) -> Iterator[list[float]]:
    """Seconds that a method takes, call by call."""
    method, seconds = getattr(part, name), []

    def wrapped(*arguments: Any, **settings: Any) -> Any:
        begun = time.perf_counter()
        out = method(*arguments, **settings)
        seconds.append(time.perf_counter() - begun)
        return out

    setattr(part, name, wrapped)
    try:
        yield seconds
    finally:
        delattr(part, name)


def against_diffusers(quick: bool) -> list[Row]:
    steps, rounds = (2, 2) if quick else (50, 3)
    parts = parts_of_kandinsky(quick)
    with tempfile.TemporaryDirectory() as folder:
        public.save_parts(Path(folder), "KandinskyV22CombinedPipeline", **parts)
        pipeline = Text2ImagePipeline.from_pretrained(folder).to(device())
        pipeline.set_progress_bar_config(disable=True)
    peer = theirs(parts, pipeline.image_size)
    rows = []
    for count in (1,) if quick else (1, 4):
        prompts = PROMPTS[:count]
        worst = difference(ours(pipeline, prompts, steps), peer(prompts, steps))
        works = {"ours": partial(ours, pipeline, prompts, steps), "diffusers": partial(peer, prompts, steps)}
        times = alternate(works, rounds, warm=0)
        with timed(pipeline.autoencoder, "decode") as seconds:
            ours(pipeline, prompts, steps)
        note = f"the autoencoder's share of ours is {sum(seconds) / times.median('ours'):.1%}"
        what = f"text to picture, Kandinsky-2.2-shaped, 25 and {steps} steps, {count} prompts"
        rows.append(row(what, times, 1.5, worst, note=note))
    works = {
        "four of one prompt": partial(ours, pipeline, PROMPTS[2:3], steps, each=4),
        "four prompts": partial(ours, pipeline, PROMPTS, steps),
    }
    note = "a ratio of 1.11 is 0.9 of the time"
    return [*rows, row("four pictures of one prompt", alternate(works, rounds), 1 / 0.9, note=note)]


def emoji_in_bf16(quick: bool) -> list[Row]:
    prompts = ["red apple", "grinning face", "blue heart", "dog face"] * (1 if quick else 4)
    fp32 = Text2ImagePipeline.from_pretrained(EMOJI).to(device())
    bf16 = Text2ImagePipeline.from_pretrained(EMOJI).to(device(), torch.bfloat16)
    for one in (fp32, bf16):
        one.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "prior_num_inference_steps": 2} if quick else {}

    def draw(pipeline: Text2ImagePipeline, texts: list[str], first: int = 0) -> Tensor:
        own = [Generator().manual_seed(first + number) for number in range(len(texts))]
        return pipeline(texts, generator=own, output_type="pt", **settings).images.float().cpu()

    times = alternate({"bf16": partial(draw, bf16, prompts), "fp32": partial(draw, fp32, prompts)}, 2 if quick else 5)
    note = ""
    if not quick and (PICTURES / "metadata.jsonl").exists():
        dataset, records = read_emoji(PICTURES)
        real = torch.cat([features(batch) for batch in stacked(dataset, records)])
        texts, same, error = [one.text for one in choose(records)["train"]], 0, 0.0
        for start in range(0, len(texts), 20):
            drawn = [draw(one, texts[start : start + 20], start) for one in (bf16, fp32)]
            nearest = [torch.cdist(features(2 * one - 1), real).argmin(dim=1) for one in drawn]
            same += int((nearest[0] == nearest[1]).sum())
            error += float((drawn[0] - drawn[1]).abs().mean()) * len(drawn[0])
        note = f"the same emoji for {same} of {len(texts)} prompts; pixels in [0, 1] differ by {error / len(texts):.4f}"
    return [row(f"emoji, {len(prompts)} prompts, bf16 against itself in fp32", times, 1.4, note=note)]


def main(quick: bool) -> list[Row]:
    rows = against_diffusers(quick)
    return rows + (emoji_in_bf16(quick) if computes_in_bf16(device().type) else [])


if __name__ == "__main__":
    run("pipeline_speed", main)
