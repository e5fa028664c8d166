"""Karlo's stages as diffusers' deprecated pipeline has them, with its own classes, and ours of the same tiny folder."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler
from torch import Generator, Tensor

from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.ddim import ExactDDIMScheduler, build_scheduler_like
from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.samplers import build_sampler
from t2i.files.component import Component
from t2i.networks.public.karlo import KarloDecoder
from t2i.networks.public.super_resolution import SuperResolution
from tests.helpers.karlo_folders import karlo_super_resolution, karlo_text_proj, karlo_unet
from tests.helpers.public_folders import tiny_text_tower, tiny_tokenizer

CLOSE = {"atol": 5e-5, "rtol": 5e-5}


class Said:
    """As a CLIP of ours would say it, without the padding, what Karlo's text encoder says."""

    def __init__(self) -> None:
        self.tower, self.tokenizer = tiny_text_tower(), tiny_tokenizer()

    @torch.no_grad()
    def padded(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """z_t, all 77 states, and the mask: what diffusers' pipeline hands on."""
        tokens = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        out = self.tower(tokens.input_ids)
        return out.text_embeds, out.last_hidden_state, tokens.attention_mask.bool()

    def encode_text(self, texts: list[str]) -> TextEncoding:
        z_t, states, mask = self.padded(texts)
        length = int(mask.sum(dim=1).max())
        return TextEncoding(z_t, states[:, :length], mask[:, :length])


def our_decoder(folder: Path, dtype: torch.dtype | None = None) -> KarloDecoder:
    decoder = KarloDecoder.from_components(Component(folder / "decoder"), Component(folder / "text_proj"), dtype)
    decoder.set_null_condition(Said())
    return decoder


def our_super_resolution(folder: Path) -> SuperResolution:
    first, last = (Component(folder / f"super_res_{name}") for name in ("first", "last"))
    config = json.loads((folder / "super_res_scheduler" / "scheduler_config.json").read_text())
    return SuperResolution.from_components(first, last, config, low_size=8)


def noise(count: int, *shape: int, seed: int = 5) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def stepped(scheduler: Any, predict: Any, x: Tensor, steps: int, generators: list[Generator]) -> Tensor:
    """diffusers' loop, as its pipelines write it: UnCLIPScheduler is told where a step leads to."""
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        extra: dict[str, Any] = {"generator": generators}
        if isinstance(scheduler, UnCLIPScheduler):
            extra["prev_timestep"] = None if i + 1 == steps else scheduler.timesteps[i + 1]
        output = predict(i, x, t)
        if scheduler.config.get("variance_type") != "learned_range":
            output = output[:, : x.shape[1]]
        x = scheduler.step(output, t, x, **extra).prev_sample
    return x


@torch.no_grad()
def reference_decoder(
    texts: list[str], z_i: Tensor, scale: float, scheduler: Any, x: Tensor, steps: int, generators: list[Generator]
) -> Tensor:
    """The decoder's half of diffusers' UnCLIPPipeline, with its own classes."""
    unet, text_proj, said = karlo_unet(), karlo_text_proj(), Said()
    z_t, states, mask = said.padded(texts)
    if scale > 1:
        empty = said.padded([""] * len(texts))
        z_t, states, mask = (torch.cat([none, one]) for none, one in zip(empty, (z_t, states, mask)))
    states, time = text_proj(
        image_embeddings=z_i,
        prompt_embeds=z_t,
        text_encoder_hidden_states=states,
        do_classifier_free_guidance=scale > 1,
    )
    mask = F.pad(mask, (text_proj.clip_extra_context_tokens, 0), value=True)

    def predict(i: int, x: Tensor, t: Tensor) -> Tensor:
        twice = torch.cat([x, x]) if scale > 1 else x
        settings = {"encoder_hidden_states": states, "class_labels": time, "attention_mask": mask}
        both = unet(sample=twice, timestep=t, **settings).sample
        if scale <= 1:
            return both
        (none, _), (one, variance) = (half.split(3, dim=1) for half in both.chunk(2))
        return torch.cat([none + scale * (one - none), variance], dim=1)

    return stepped(scheduler, predict, x, steps, generators)


@torch.no_grad()
def reference_super_resolution(low: Tensor, scheduler: Any, x: Tensor, steps: int, generators: list[Generator]):
    networks = karlo_super_resolution(12), karlo_super_resolution(13)
    large = F.interpolate(low.clamp(-1, 1), size=[16, 16], mode="bicubic", align_corners=False, antialias=True)

    def predict(i: int, x: Tensor, t: Tensor) -> Tensor:
        return networks[i + 1 == steps](torch.cat([x, large], dim=1), t).sample

    return stepped(scheduler, predict, x, steps, generators)


def schedulers(name: str, theirs: UnCLIPScheduler) -> tuple[Any, Any]:
    """Ours by name, and diffusers' own with the same settings."""
    ours = UnCLIPRespacedScheduler.from_config(theirs.config)
    settings = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
    if name == "unclip":
        return ours, theirs
    if name == "ddpm":
        kind = theirs.config.variance_type if theirs.config.variance_type == "learned_range" else "fixed_small"
        expected = DDPMScheduler(timestep_spacing="linspace", variance_type=kind, **settings)
        return build_sampler("ddpm", ours, kind == "learned_range"), expected
    # diffusers' own DDIM leads from each timestep to the next only if they are spaced so, and divide the training's.
    return build_scheduler_like(ExactDDIMScheduler, ours, timestep_spacing="trailing"), DDIMScheduler(
        timestep_spacing="trailing", **settings
    )
