"""From text to picture with a folder shaped as Karlo's, at reduced width, against diffusers' (deprecated) pipeline
on the same weights and noise: a prior, a decoder on small pictures that learns its variance, and super-resolution.
"""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from t2i.pipelines import Text2ImagePipeline
from t2i.pipelines.base import SUPER_RESOLUTION_STREAM
from torch import Generator, Tensor

from benchmarks.pipeline_speed import PROMPTS, each_way, shares
from benchmarks.side_by_side import Row, alternate, device, difference, generators, peaks, row, run
from t2i.diffusion.denoiser import generate_noise
from t2i.sampling.sample import split_generators
from t2i.sampling.upsampling import derive_stage_generators
from tests.helpers import public_folders as public
from tests.helpers.karlo_folders import karlo_parts

# Karlo has a prior of 20 layers of 32 heads of 64, U-Nets of (320, 640, 960, 1280), three layers a level, 64 and 256
# pixels, and embeddings of 768.
EMBED, TOKENS = 128, 128
PRIOR = {"num_attention_heads": 8, "attention_head_dim": 32, "num_layers": 6}
WIDTHS, LAYERS, LOW, HIGH = (32, 64, 96, 128), 3, 16, 64
QUICK = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
AWAY = 0.6  # from zero, of the noise that a comparison starts from
STEPS = {False: (25, 25, 7), True: (2, 2, 2)}  # of the prior, the decoder and super-resolution


class OfOneStage(UnCLIPScheduler):
    """diffusers', with a stream of noise of its own, as our stages have; its pipeline has one for all stages."""

    streams: list[Generator]

    def step(self, *arguments: Any, **settings: Any) -> Any:
        return super().step(*arguments, **settings | {"generator": self.streams})


def parts_of_karlo(quick: bool) -> dict[str, tuple[str, Any]]:
    """Its components with random weights, as `tests.helpers.public_folders.save_parts` takes them."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "layers_per_block": 1 if quick else LAYERS,
        "block_out_channels": WIDTHS,
        "norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
    }
    decoder = UNet2DConditionModel(
        sample_size=LOW,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        cross_attention_dim=TOKENS,
        class_embed_type="identity",
        attention_head_dim=8,
        **common,
    )
    large: dict[str, Any] = {
        "sample_size": HIGH,
        "in_channels": 6,
        "out_channels": 3,
        "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
        "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
        "add_attention": False,
        **common,
    }
    sizes = {"clip_embeddings_dim": EMBED, "time_embed_dim": 4 * WIDTHS[0], "cross_attention_dim": TOKENS}
    prior = public.tiny_prior_transformer(EMBED, **(QUICK if quick else PRIOR))
    return karlo_parts() | {
        "prior": ("diffusers", prior),
        "prior_scheduler": ("diffusers", public.prior_scheduler()),
        "text_encoder": ("transformers", public.tiny_text_tower(EMBED, EMBED)),
        "text_proj": ("unclip", UnCLIPTextProjModel(**sizes).eval().requires_grad_(False)),
        "decoder": ("diffusers", decoder.eval().requires_grad_(False)),
        "super_res_first": ("diffusers", UNet2DModel(**large).eval().requires_grad_(False)),
        "super_res_last": ("diffusers", UNet2DModel(**large).eval().requires_grad_(False)),
    }


def starts(count: int, away: float = AWAY) -> dict[str, Tensor]:
    """The noise that each stage starts from, by our names, and nowhere nearer to zero than `away`.

    At the first timestep 1 / 20,000 of a picture's variance is left: an error of rounding grows by 141 where the clean
    picture is not clamped, which is where the noise is about zero.
    """
    shapes = {"prior_latents": (EMBED,), "latents": (3, LOW, LOW), "super_res_latents": (3, HIGH, HIGH)}
    drawn = {name: generate_noise(shape, generators(count), device()) for name, shape in shapes.items()}
    return {name: noise.sign() * noise.abs().clamp(min=away) for name, noise in drawn.items()}


def ours(
    pipeline: Text2ImagePipeline,
    prompts: list[str],
    steps: tuple[int, int, int],
    each: int = 1,
    away: float = AWAY,
) -> Tensor:
    settings: dict[str, Any] = dict(
        zip(("prior_num_inference_steps", "num_inference_steps", "super_res_num_inference_steps"), steps)
    )
    settings |= starts(each * len(prompts), away)
    own = generators(each * len(prompts))
    guided = {"prior_guidance_scale": 4.0, "guidance_scale": 8.0, "prior_candidates": 1}
    found = pipeline(prompts, num_images_per_prompt=each, generator=own, output_type="pt", **settings, **guided)
    return found.images


def theirs(parts: dict[str, tuple[str, Any]]) -> Callable[..., Tensor]:
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline

    names = ("prior_scheduler", "decoder_scheduler", "super_res_scheduler")
    schedulers = {name: OfOneStage.from_config(parts[name][1].config) for name in names}
    peer = UnCLIPPipeline(**{name: part for name, (_, part) in parts.items()} | schedulers)
    peer.set_progress_bar_config(disable=True)
    peer.to(device())

    def draw(prompts: list[str], steps: tuple[int, int, int], away: float = AWAY) -> Tensor:
        first, second = split_generators(generators(len(prompts)), len(prompts))
        streams = (first, second, derive_stage_generators(second, SUPER_RESOLUTION_STREAM))
        settings: dict[str, Any] = {}
        noises = starts(len(prompts), away).values()
        for name, own, noise, count in zip(("prior", "decoder", "super_res"), streams, noises, steps):
            schedulers[f"{name}_scheduler"].streams = own
            settings[f"{name}_latents"] = noise
            settings[f"{name}_num_inference_steps"] = count
        guided = {"prior_guidance_scale": 4.0, "decoder_guidance_scale": 8.0}
        images = peer(prompts, output_type="np", **settings, **guided).images
        return torch.from_numpy(images).movedim(-1, 1)

    return draw


def on_plain_noise(works: Mapping[str, Callable[..., Tensor]]) -> str:
    """How far the outputs are from each other on noise as it is drawn, as a note."""
    mine, other = (work(away=0.0).cpu() for work in works.values())
    apart = (mine - other).abs()
    return (
        f"equal on noise that is clamped to |x| >= {AWAY}, for near zero the first step multiplies rounding by 141; on "
        f"plain noise pixels in [0, 1] differ by {apart.max():.0e} at most, by {apart.mean():.0e} on average"
    )


def main(quick: bool) -> list[Row]:
    parts, steps, rounds = parts_of_karlo(quick), STEPS[quick], 1 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        public.save_parts(Path(folder), "UnCLIPPipeline", **parts)
        pipeline = Text2ImagePipeline.from_pretrained(folder).to(device())
    pipeline.set_progress_bar_config(disable=True)
    peer, rows = theirs(parts), []
    for count in (1,) if quick else (1, 4):
        prompts = PROMPTS[:count]
        works = {"ours": partial(ours, pipeline, prompts, steps), "diffusers": partial(peer, prompts, steps)}
        worst = difference(works["ours"]().cpu(), works["diffusers"]())
        times = alternate(works, rounds, warm=0 if quick else 1)
        fewer = (2, 2, 2)  # steps, of which each takes the same
        memory = peaks({"ours": partial(ours, pipeline, prompts, fewer), "diffusers": partial(peer, prompts, fewer)})
        what = f"text to picture, Karlo-shaped, {', '.join(map(str, steps))} steps, {count} prompts"
        plain = on_plain_noise(works)
        rows.append(row(what, times, 1.5, worst, memory=memory, note=f"{shares(pipeline, works['ours'])}; {plain}"))
    works = {
        "four of one prompt": partial(ours, pipeline, PROMPTS[2:3], steps, each=4),
        "four prompts": partial(ours, pipeline, PROMPTS, steps),
    }
    times = alternate(works, rounds, warm=0 if quick else 1)
    return [*rows, row("four pictures of one prompt, Karlo-shaped", times, 1 / 0.9, note=each_way(pipeline, works))]


if __name__ == "__main__":
    run("karlo_speed", main)
