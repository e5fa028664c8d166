"""A U-Net decoder shaped as Kandinsky 2.2's, at reduced width, against the denoising loop of diffusers' pipeline.

The same weights, noise, scheduler and guidance; neither decodes latents.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel
from torch import Generator, Tensor

from benchmarks.side_by_side import Row, alternate, device, difference, flops, generators, peaks, row, run
from t2i.diffusion.denoiser import generate_noise
from t2i.diffusion.samplers import resolve_sampler
from t2i.networks.public.kandinsky import KandinskyDecoder, derive_kandinsky_config
from t2i.sampling.sample import sample_decoder

EMBED, SCALE = 320, 4.0
SIZES = {  # Kandinsky 2.2 has (384, 768, 1152, 1536), 3 layers a level, heads of 64, latents of 96 and tokens of 768
    False: {
        "sample_size": 16,
        "block_out_channels": (64, 128, 192, 256),
        "layers_per_block": 3,
        "attention_head_dim": 32,
    },
    True: {  # enough pixels in a group, or its norm divides by almost nothing
        "sample_size": 16,
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "norm_num_groups": 4,
    },
}


def kandinsky_unet(quick: bool) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=EMBED,
        cross_attention_dim=192,
        **SIZES[quick],
    )
    return unet.eval().requires_grad_(False).to(device())


def kandinsky_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        variance_type="learned_range",
        thresholding=True,
        sample_max_value=2.0,
        clip_sample=False,
    )


def ours(decoder: KandinskyDecoder, z_i: Tensor, steps: int, sampler: str | None = None) -> Callable[[], Tensor]:
    """sampler: of `t2i.diffusion.samplers`; None is the scheduler that the peer has too."""

    def work() -> Tensor:
        scheduler = resolve_sampler(sampler, kandinsky_scheduler(), decoder)
        own = generators(len(z_i))
        return sample_decoder(decoder, scheduler, z_i, None, steps, SCALE, own, noise(z_i, decoder))

    return work


def diffusers(decoder: KandinskyDecoder, unet: UNet2DConditionModel, z_i: Tensor, steps: int) -> Callable[[], Tensor]:
    pipeline = KandinskyV22Pipeline(unet, kandinsky_scheduler(), VQModel(block_out_channels=(32, 32, 32, 32)))
    pipeline.set_progress_bar_config(disable=True)
    pixels = decoder.config.latent_size * pipeline.movq_scale_factor
    away = decoder.null_embedding.expand_as(z_i)

    def work() -> Tensor:
        settings: dict[str, Any] = {"height": pixels, "width": pixels, "guidance_scale": SCALE, "output_type": "latent"}
        own = generators(len(z_i))
        latents = noise(z_i, decoder)
        return pipeline(z_i, away, num_inference_steps=steps, generator=own, latents=latents, **settings).images

    return work


def noise(z_i: Tensor, decoder: KandinskyDecoder) -> Tensor:
    size = decoder.config.latent_size
    return generate_noise((4, size, size), [Generator().manual_seed(100 + one) for one in range(len(z_i))], z_i.device)


def main(quick: bool) -> list[Row]:
    unet = kandinsky_unet(quick)
    settings = dict(unet.config)
    decoder = KandinskyDecoder(settings, **derive_kandinsky_config(settings)).to(device()).eval().requires_grad_(False)
    decoder.unet.load_state_dict(unet.state_dict())
    decoder.null_embedding.copy_(0.5 * torch.randn(EMBED, generator=Generator().manual_seed(1)))
    rows, steps = [], 2 if quick else 50
    for batch in (1, 2) if quick else (1, 4):
        z_i = torch.randn(batch, EMBED, generator=Generator().manual_seed(2)).to(device())
        what = f"Kandinsky-2.2-shaped decoder, {steps} steps with guidance, batch {batch}"
        works = {"ours": ours(decoder, z_i, steps), "diffusers": diffusers(decoder, unet, z_i, steps)}
        worst = difference(*(work() for work in works.values()))
        counts = {name: flops(work) for name, work in works.items()}  # of all steps
        times = alternate(works, rounds=1 if quick else 5, warm=0 if quick else 1)
        memory = peaks({"ours": ours(decoder, z_i, 1), "diffusers": diffusers(decoder, unet, z_i, 1)})
        rows.append(row(what, times, 1.2, worst, counts, memory))
        gc.collect()
    return rows


if __name__ == "__main__":
    run("decoder_speed", main)
