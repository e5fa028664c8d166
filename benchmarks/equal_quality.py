"""Fewer steps at equal quality: the shipped emoji decoder by diffusers' arithmetic, 50 steps guided at each, against
ours in fewer steps, on the same weights.

    python -m benchmarks.equal_quality_drawn 2     # draws what the quality is judged by; can be stopped and begun again
    python -m benchmarks.equal_quality             # times them, and repeats what was judged

That the two compute the same is shown first, at equal settings: the latents agree within 1e-4. The criterion of equal
quality is in `benchmarks.equal_quality_drawn`, and was written down before a picture was drawn.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from t2i.pipelines import Text2ImagePipeline
from torch import Generator, Tensor

from benchmarks.side_by_side import RESULTS, Row, alternate, device, difference, row, run
from t2i.diffusion.denoiser import generate_noise
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.samplers import build_sampler
from t2i.networks.decoder import embed_condition_tokens
from t2i.networks.unet_decoder import UNetDecoder
from t2i.sampling.sample import sample_decoder

EMOJI = Path(__file__).resolve().parents[1] / "models" / "emoji"
STEPS, SCALE = 50, UNetDecoder.default_guidance_scale  # the peer's
PEER = "diffusers"


@dataclass(frozen=True)
class Choice:
    """How we draw instead."""

    sampler: str
    steps: int
    guidance: Guidance

    def __str__(self) -> str:
        low, high = self.guidance.interval
        return f"{self.sampler}, {self.steps} steps, guided within {low:g} to {high:g}"


CHOICES = {
    "twenty": Choice("dpmsolver++", 20, Guidance(SCALE, (0.1, 0.8))),
    "ten": Choice("dpmsolver++", 10, Guidance(SCALE, (0.1, 0.8))),
    "five": Choice("dpmsolver++", 5, Guidance(SCALE)),
    # Added when the three above had been judged, by the same criterion on the same seeds: guided as the peer is.
    "ten-guided": Choice("dpmsolver++", 10, Guidance(SCALE)),
}


@cache
def emoji() -> Text2ImagePipeline:
    pipeline = Text2ImagePipeline.from_pretrained(EMOJI).to(device())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def unet() -> UNet2DConditionModel:
    """diffusers' own, of torch's layers, with the decoder's weights."""
    net = emoji().decoder.net
    found = UNet2DConditionModel.from_config(net.config)
    found.load_state_dict(net.state_dict())
    return found.to(device()).eval().requires_grad_(False)


@torch.no_grad()
def theirs(decoder: UNetDecoder, scheduler: DDIMScheduler, z_i: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Latents, (N, C, h, w), by UNet2DConditionModel's own `forward` in a plain loop of diffusers' scheduler."""
    both = decoder.null(len(z_i)).cat(type(decoder.null(1))(z_i))
    labels, tokens, _ = embed_condition_tokens(decoder, both)  # once, as pipelines of diffusers do
    scheduler.set_timesteps(steps, device=z_i.device)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        read = scheduler.scale_model_input(torch.cat([x, x]), t)
        away, wanted = unet()(read, t, tokens, class_labels=labels).sample.chunk(2)
        x = scheduler.step(away + SCALE * (wanted - away), t, x).prev_sample
    return x


def ours(decoder: UNetDecoder, scheduler: DDIMScheduler, z_i: Tensor, noise: Tensor, choice: Choice) -> Tensor:
    """Latents, (N, C, h, w)."""
    sampler = build_sampler(choice.sampler, scheduler)
    unused = [Generator() for _ in z_i]  # these samplers add no noise
    return sample_decoder(decoder, sampler, z_i, None, choice.steps, choice.guidance, unused, noise)


def ways(steps: int = STEPS) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Of z_i, (N, D), and noise, to latents, by name: the peer and every choice of ours."""
    pipeline = emoji()
    scheduler = DDIMScheduler.from_config(pipeline.decoder_scheduler.config)
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        PEER: lambda z_i, noise: theirs(pipeline.decoder, scheduler, z_i, noise, steps)
    }
    for name, choice in CHOICES.items():
        found[name] = partial(lambda choice, z_i, noise: ours(pipeline.decoder, scheduler, z_i, noise, choice), choice)
    return found


def judged(name: str) -> str:
    """What was found of the quality of a choice; also on the seeds that it was not chosen by."""
    said = []
    for file, when in {"equal_quality_drawn": "", "equal_quality_drawn_again": "on other seeds: "}.items():
        path = RESULTS / f"{file}.json"
        found = json.loads(path.read_text())["choices"].get(name) if path.exists() else None
        said += [] if found is None else [when + found["verdict"]]
    return "; ".join(said) or "quality not judged"


def main(quick: bool) -> list[Row]:
    pipeline, steps = emoji(), 4 if quick else STEPS
    drawn, rows = ways(steps), []
    for batch in (1,) if quick else (1, 4):
        z_i = pipeline.normalize_embeds(
            torch.randn(batch, pipeline.clip.embed_dim, generator=Generator().manual_seed(0))
        )
        z_i = z_i.to(device())
        noise = generate_noise(
            pipeline.latent_shape, [Generator().manual_seed(one) for one in range(batch)], z_i.device
        )
        equal = Choice("ddim", steps, Guidance(SCALE))
        same = partial(ours, pipeline.decoder, pipeline.decoder_scheduler, z_i, noise, equal)
        works = {"the same": same} | {name: partial(way, z_i, noise) for name, way in drawn.items()}
        worst = difference(same(), works[PEER]())
        times = alternate(works, 2 if quick else 5)
        title = f"emoji decoder, {steps} steps with guidance, batch {batch}"
        rows.append(row(title, times.of("the same", PEER), difference=worst))
        for name, choice in CHOICES.items():
            what = f"batch {batch}: {choice}; against {steps} steps"
            rows.append(row(what, times.of(name, PEER), 3.0, note=judged(name)))
    return rows


if __name__ == "__main__":
    run("equal_quality", main)
