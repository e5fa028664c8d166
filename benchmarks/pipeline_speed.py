"""From text to image, in the shapes of Kandinsky 2.2 and of Karlo, against diffusers' pipelines on the same weights
and noise; Kandinsky's decoder alone.

    python -m benchmarks.pipeline_speed [--quick]
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from diffusers import UnCLIPScheduler
from t2i.pipelines import Text2ImagePipeline
from t2i.pipelines.stages import SUPER_RESOLUTION_STREAM
from torch import Generator, Tensor

from benchmarks import shapes, side_by_side
from benchmarks.report import run
from benchmarks.shapes import KANDINSKY_EMBED, KARLO_EMBED, KARLO_SIDES, PROMPTS
from benchmarks.side_by_side import Row, Work
from t2i.diffusion.sampling_loop import generate_noise
from t2i.sampling import embeddings, sample
from t2i.sampling.sample import split_generators
from t2i.sampling.upsampling import derive_stage_generators

SCALE, KARLO_SCALE = 4.0, 8.0  # guidance of Kandinsky's stages and of Karlo's prior; of Karlo's decoder
AWAY = 0.6  # see `draw_karlo_noise`
Steps = tuple[int, ...]  # of each stage


@dataclass
class Family:
    """A family of public models: this project's pipeline, and how both sides draw prompts in some steps."""

    name: str
    pipeline: Text2ImagePipeline
    ours: Callable[[list[str], Steps], Tensor]
    peer: Callable[[list[str], Steps], Tensor]
    steps: Steps
    note: str = ""


def main(quick: bool) -> list[Row]:
    rows = []
    for build in (build_kandinsky_family, build_karlo_family):
        family = build(quick)
        rows += compare_pictures(family, quick)
        if isinstance(family, KandinskyFamily):
            rows += compare_decoders(family, quick)
        gc.collect()
    return rows


def compare_pictures(family: Family, quick: bool) -> list[Row]:
    """Return the rows of one prompt and of four."""
    rows, rounds, warm = [], 1 if quick else 5, 0 if quick else 1
    sides = {"ours": family.ours, "diffusers": family.peer}
    few = tuple(2 for _ in family.steps)  # steps for the peak of memory: each step takes the same
    for prompts in (PROMPTS[:1],) if quick else (PROMPTS[:1], PROMPTS):
        works = {name: partial(draw, prompts, family.steps) for name, draw in sides.items()}
        worst = side_by_side.check_equal(works["ours"]().cpu(), works["diffusers"]().cpu())
        seconds = side_by_side.time_in_turns(works, rounds, warm)
        memory = side_by_side.measure_peaks({name: partial(draw, prompts, few) for name, draw in sides.items()})
        what = f"text to image, {family.name}, {', '.join(map(str, family.steps))} steps, {len(prompts)} prompts"
        note = f"{describe_stages(family.pipeline, works['ours'])}{family.note}"
        rows.append(side_by_side.build_row(what, seconds, 1.5, difference=worst, memory=memory, note=note))
    return rows


@contextmanager
def timed_method(part: Any, name: str) -> Iterator[list[float]]:
    """Collect the seconds of each call of a method."""
    method, seconds = getattr(part, name), []

    def timed(*arguments: Any, **options: Any) -> Any:
        side_by_side.synchronize()
        start = time.perf_counter()
        result = method(*arguments, **options)
        side_by_side.synchronize()
        seconds.append(time.perf_counter() - start)
        return result

    with mock.patch.object(part, name, timed):
        yield seconds


def time_stages(pipeline: Text2ImagePipeline, work: Work) -> dict[str, float]:
    """Return the seconds of each stage in one run of `work`, and of the rest."""
    stages: dict[str, tuple[Any, str]] = {
        "captions": (pipeline, "encode_prompt"),
        "prior": (embeddings, "sample_image_embeds"),
        "decoder": (sample, "sample_decoder"),
        "autoencoder": (pipeline, "decode"),
    }
    with ExitStack() as stack:
        calls = {stage: stack.enter_context(timed_method(part, name)) for stage, (part, name) in stages.items()}
        start = time.perf_counter()
        work()
        total = time.perf_counter() - start
    seconds = {stage: sum(times) for stage, times in calls.items()}
    return seconds | {"the rest": total - sum(seconds.values())}


def describe_stages(pipeline: Text2ImagePipeline, work: Work) -> str:
    seconds = time_stages(pipeline, work)
    total = sum(seconds.values())
    return "time of t2i: " + ", ".join(f"{stage} {value / total:.1%}" for stage, value in seconds.items())


# Kandinsky 2.2


@dataclass
class KandinskyFamily(Family):
    diffusers: Any = None  # its combined pipeline


def build_kandinsky_family(quick: bool) -> KandinskyFamily:
    peer = shapes.build_kandinsky(quick)
    pipeline = shapes.load_ours(peer)
    side = pipeline.image_size

    def draw(prompts: list[str], steps: Steps) -> Tensor:
        return pipeline(
            prompts,
            generator=side_by_side.generators(len(prompts)),
            output_type="pt",
            prior_num_inference_steps=steps[0],
            prior_guidance_scale=SCALE,
            prior_candidates=1,
            num_inference_steps=steps[1],
            guidance_scale=SCALE,
        ).images

    def draw_by_peer(prompts: list[str], steps: Steps) -> Tensor:
        first, second = split_generators(side_by_side.generators(len(prompts)), len(prompts))
        z_i, negative = peer.prior_pipe(
            prompts, num_inference_steps=steps[0], guidance_scale=SCALE, generator=first, return_dict=False
        )
        options: dict[str, Any] = {"height": side, "width": side, "guidance_scale": SCALE, "output_type": "pt"}
        images = peer.decoder_pipe(z_i, negative, num_inference_steps=steps[1], generator=second, **options).images
        return (images / 2 + 0.5).clamp(0, 1)  # which it leaves to the caller who takes tensors

    steps = (2, 2) if quick else (25, 50)
    return KandinskyFamily("Kandinsky-2.2-shaped", pipeline, draw, draw_by_peer, steps, diffusers=peer)


def compare_decoders(family: KandinskyFamily, quick: bool) -> list[Row]:
    """Return the rows of the decoder alone: latents of the same z_i, which neither side decodes."""
    pipeline, peer, rows, side = family.pipeline, family.diffusers.decoder_pipe, [], family.pipeline.image_size
    latent_size = pipeline.decoder.config.latent_size
    for batch in (1, 2) if quick else (1, 4):
        z_i = torch.randn(batch, KANDINSKY_EMBED, generator=Generator().manual_seed(2)).to(side_by_side.device())
        noise = generate_noise((4, latent_size, latent_size), side_by_side.generators(batch), side_by_side.device())
        negative = pipeline.decoder.null_embedding.expand_as(z_i)

        def draw(steps: int, z_i: Tensor = z_i, noise: Tensor = noise) -> Tensor:
            own = side_by_side.generators(len(z_i))
            options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": SCALE, "output_type": "latent"}
            return pipeline(image_embeds=z_i, generator=own, latents=noise, **options).images

        def draw_by_peer(steps: int, z_i: Tensor = z_i, noise: Tensor = noise, negative: Tensor = negative) -> Tensor:
            _, own = split_generators(side_by_side.generators(len(z_i)), len(z_i))
            options: dict[str, Any] = {"height": side, "width": side, "guidance_scale": SCALE, "output_type": "latent"}
            return peer(z_i, negative, num_inference_steps=steps, generator=own, latents=noise, **options).images

        steps = family.steps[1]
        works = {"ours": partial(draw, steps), "diffusers": partial(draw_by_peer, steps)}
        worst = side_by_side.check_equal(*(work() for work in works.values()))
        counts = {name: side_by_side.count_operations(work) for name, work in works.items()}
        seconds = side_by_side.time_in_turns(works, rounds=1 if quick else 5, warm=0 if quick else 1)
        memory = side_by_side.measure_peaks({"ours": partial(draw, 1), "diffusers": partial(draw_by_peer, 1)})
        what = f"{family.name} decoder, {steps} steps with guidance, batch {batch}"
        rows.append(side_by_side.build_row(what, seconds, 1.2, counts, difference=worst, memory=memory))
    return rows


# Karlo


class StageScheduler(UnCLIPScheduler):
    """diffusers' scheduler with a stream of noise for each stage, as here; its pipeline has one stream for all."""

    streams: list[Generator]

    def step(self, *arguments: Any, **options: Any) -> Any:
        return super().step(*arguments, **options | {"generator": self.streams})


def draw_karlo_noise(count: int, away: float = AWAY) -> dict[str, Tensor]:
    """Return the noise that each stage starts from, by our names, nowhere nearer to zero than `away`.

    At the first timestep 1 / 20,000 of an image's variance is left: an error of rounding grows by 141 where the clean
    image is not clamped, which is where the noise is about zero.
    """
    low, high = KARLO_SIDES
    sizes = {"prior_latents": (KARLO_EMBED,), "latents": (3, low, low), "super_res_latents": (3, high, high)}
    drawn = {
        name: generate_noise(size, side_by_side.generators(count), side_by_side.device())
        for name, size in sizes.items()
    }
    return {name: noise.sign() * noise.abs().clamp(min=away) for name, noise in drawn.items()}


def build_karlo_family(quick: bool) -> Family:
    peer = shapes.build_karlo(quick)
    pipeline = shapes.load_ours(peer)
    stages = ("prior", "decoder", "super_res")
    schedulers = {
        f"{name}_scheduler": StageScheduler.from_config(getattr(peer, f"{name}_scheduler").config) for name in stages
    }
    peer.register_modules(**schedulers)

    def draw(prompts: list[str], steps: Steps, away: float = AWAY) -> Tensor:
        names = ("prior_num_inference_steps", "num_inference_steps", "super_res_num_inference_steps")
        return pipeline(
            prompts,
            generator=side_by_side.generators(len(prompts)),
            output_type="pt",
            prior_guidance_scale=SCALE,
            prior_candidates=1,
            guidance_scale=KARLO_SCALE,
            **dict(zip(names, steps)),
            **draw_karlo_noise(len(prompts), away),
        ).images

    def draw_by_peer(prompts: list[str], steps: Steps, away: float = AWAY) -> Tensor:
        first, second = split_generators(side_by_side.generators(len(prompts)), len(prompts))
        streams = (first, second, derive_stage_generators(second, SUPER_RESOLUTION_STREAM))
        options: dict[str, Any] = {"prior_guidance_scale": SCALE, "decoder_guidance_scale": KARLO_SCALE}
        noises = draw_karlo_noise(len(prompts), away).values()
        for name, stream, noise, count in zip(stages, streams, noises, steps):
            schedulers[f"{name}_scheduler"].streams = stream
            options |= {f"{name}_latents": noise, f"{name}_num_inference_steps": count}
        return torch.from_numpy(peer(prompts, output_type="np", **options).images).movedim(-1, 1)

    steps = (2, 2, 2) if quick else (25, 25, 7)
    difference = (draw(PROMPTS[:1], steps, away=0.0).cpu() - draw_by_peer(PROMPTS[:1], steps, away=0.0)).abs()
    note = (
        f"; equal on noise that is clamped to |x| >= {AWAY}, for near zero the first step multiplies rounding by 141; "
        f"on plain noise pixels in [0, 1] differ by at most {difference.max():.0e}, on average {difference.mean():.0e}"
    )
    return Family("Karlo-shaped", pipeline, draw, draw_by_peer, steps, note)


if __name__ == "__main__":
    run("pipeline_speed", main)
