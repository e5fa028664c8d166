"""From text to picture: a folder shaped as Kandinsky 2.2's, at reduced width, against diffusers' own two pipelines on
the same weights and noise; several pictures of one prompt.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline
from t2i.pipelines import Text2ImagePipeline
from torch import Tensor

from benchmarks.decoder_speed import EMBED, kandinsky_scheduler, kandinsky_unet
from benchmarks.side_by_side import Row, alternate, device, difference, generators, peaks, row, run, synchronize
from t2i.sampling.sample import split_generators
from tests.helpers import public_folders as public
from tests.helpers.kandinsky_folders import kandinsky_decoder_parts, kandinsky_prior_parts

PROMPTS = ["a red cat", "a dog", "the red dog and a cat", "a cat and a red cat and a dog"]
STAGES = {  # of a pipeline, by its methods
    "encode_prompt": "captions",
    "sample_image_embeds": "prior",
    "sample_decoder": "decoder",
    "decode": "pictures of latents",
}
PRIOR = {  # the public one has 32 heads of 64 and 20 layers
    False: {"num_attention_heads": 8, "attention_head_dim": 32, "num_layers": 6},
    True: {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2},
}


def parts_of_kandinsky(quick: bool) -> dict[str, tuple[str, Any]]:
    """Its components at reduced width, with random weights, as `tests.helpers.public_folders.save_parts` takes them."""
    parts = kandinsky_prior_parts("2.2", "prior_") | kandinsky_decoder_parts("2.2")
    return parts | {
        "prior_prior": ("diffusers", public.tiny_prior_transformer(EMBED, **PRIOR[quick])),
        "prior_text_encoder": ("transformers", public.tiny_text_tower(EMBED, EMBED)),
        "prior_image_encoder": ("transformers", public.tiny_image_tower(EMBED)),
        "unet": ("diffusers", kandinsky_unet(quick)),
        "scheduler": ("diffusers", kandinsky_scheduler()),
    }


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
        synchronize()
        begun = time.perf_counter()
        out = method(*arguments, **settings)
        synchronize()
        seconds.append(time.perf_counter() - begun)
        return out

    setattr(part, name, wrapped)
    try:
        yield seconds
    finally:
        delattr(part, name)


def stage_seconds(pipeline: Text2ImagePipeline, work: Callable[[], Any]) -> dict[str, float]:
    """Of each stage in one run of `work`, and of what is none of them."""
    with ExitStack() as stack:
        calls = {stage: stack.enter_context(timed(pipeline, name)) for name, stage in STAGES.items()}
        begun = time.perf_counter()
        work()
        whole = time.perf_counter() - begun
    seconds = {stage: sum(one) for stage, one in calls.items()}
    return seconds | {"the rest": whole - sum(seconds.values())}


def shares(pipeline: Text2ImagePipeline, work: Callable[[], Any]) -> str:
    """Of the stages in our time, as a note."""
    seconds = stage_seconds(pipeline, work)
    whole = sum(seconds.values())
    return "of our time " + ", ".join(f"{stage} {one / whole:.1%}" for stage, one in seconds.items())


def each_way(pipeline: Text2ImagePipeline, works: Mapping[str, Callable[[], Any]]) -> str:
    """Seconds of the stages in each of two ways to draw as many pictures, as a note."""
    found = [stage_seconds(pipeline, work) for work in works.values()]
    pairs = (f"{stage} {found[0][stage]:.3f} / {found[1][stage]:.3f}" for stage in found[0])
    shared = "captions, and their keys and values in the prior, are all that pictures of one prompt share"
    return f"{shared}; 1.11 is 0.9 of the time; seconds {' / '.join(works)}: {', '.join(pairs)}"


def main(quick: bool) -> list[Row]:
    steps, rounds = (2, 1) if quick else (50, 5)
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
        times = alternate(works, rounds, warm=0 if quick else 1)
        memory = peaks({"ours": partial(ours, pipeline, prompts, 2), "diffusers": partial(peer, prompts, 2)})
        what = f"text to picture, Kandinsky-2.2-shaped, 25 and {steps} steps, {count} prompts"
        rows.append(row(what, times, 1.5, worst, memory=memory, note=shares(pipeline, works["ours"])))
    works = {
        "four of one prompt": partial(ours, pipeline, PROMPTS[2:3], steps, each=4),
        "four prompts": partial(ours, pipeline, PROMPTS, steps),
    }
    times = alternate(works, rounds, warm=0 if quick else 1)
    return [*rows, row("four pictures of one prompt", times, 1 / 0.9, note=each_way(pipeline, works))]


if __name__ == "__main__":
    run("pipeline_speed", main)
