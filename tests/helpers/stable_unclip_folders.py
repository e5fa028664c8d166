"""Tiny folders of Stable unCLIP in the public layouts, as `tests.helpers.public_folders` has those of the other
families."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import CLIPTextModel

from tests.helpers.public_folders import (
    EMBED_DIM,
    built,
    prior_scheduler,
    randomised,
    save_parts,
    tiny_image_processor,
    tiny_image_tower,
    tiny_prior_transformer,
    tiny_text_tower,
    tiny_tokenizer,
)


def tiny_caption_encoder(width: int = 24, seed: int = 5) -> CLIPTextModel:
    """Stable Diffusion's."""
    torch.manual_seed(seed)
    config = tiny_text_tower(width=width).config
    return randomised(CLIPTextModel(config), seed)


def tiny_vae(seed: int = 6) -> AutoencoderKL:
    """Reduces images by two."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16, **blocks)
    return randomised(vae, seed)


def tiny_stable_unet(embed_dim: int, text_width: int = 24, seed: int = 7) -> UNet2DConditionModel:
    """Of latents with a side of 8, told of z_i and its noise level as a class."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),  # as Stable Diffusion 2 has it: the number of heads
        use_linear_projection=True,
        cross_attention_dim=text_width,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * embed_dim,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **blocks,
    )
    return randomised(unet, seed)


def tiny_normalizer(embed_dim: int, seed: int = 8) -> StableUnCLIPImageNormalizer:
    normalizer = StableUnCLIPImageNormalizer(embed_dim)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        normalizer.mean.copy_(0.3 * torch.randn(1, embed_dim, generator=generator))
        normalizer.std.copy_(0.5 + torch.rand(1, embed_dim, generator=generator))
    return normalizer.requires_grad_(False)


def stable_parts(embed_dim: int, prediction_type: str, scheduler: type) -> dict[str, tuple[str, Any]]:
    """What both layouts of Stable unCLIP have."""
    steps = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    steps |= {"prediction_type": prediction_type, "steps_offset": 1}
    if scheduler is PNDMScheduler:
        steps["skip_prk_steps"] = True
    if scheduler is DDIMScheduler:
        steps |= {"clip_sample": False, "set_alpha_to_one": False}
    return {
        "image_normalizer": ("stable_diffusion", tiny_normalizer(embed_dim)),
        "image_noising_scheduler": ("diffusers", DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
        "tokenizer": ("transformers", tiny_tokenizer()),
        "text_encoder": ("transformers", tiny_caption_encoder()),
        "unet": ("diffusers", tiny_stable_unet(embed_dim)),
        "scheduler": ("diffusers", scheduler(**steps)),
        "vae": ("diffusers", tiny_vae()),
    }


@built
def stable_unclip(folder: Path) -> None:
    """As of `-small`: with the parts of a Karlo prior."""
    save_parts(
        folder,
        "StableUnCLIPPipeline",
        prior_tokenizer=("transformers", tiny_tokenizer()),
        prior_text_encoder=("transformers", tiny_text_tower()),
        prior=("diffusers", tiny_prior_transformer()),
        prior_scheduler=("diffusers", DDPMScheduler.from_config(prior_scheduler().config)),
        **stable_parts(EMBED_DIM, "epsilon", PNDMScheduler),
    )


@built
def stable_unclip_images(folder: Path) -> None:
    """As of the H variant: no prior, an image encoder of another size, velocity prediction."""
    save_parts(
        folder,
        "StableUnCLIPImg2ImgPipeline",
        feature_extractor=("transformers", tiny_image_processor()),
        image_encoder=("transformers", tiny_image_tower(20)),
        **stable_parts(20, "v_prediction", DDIMScheduler),
    )


@built
def stable_unclip_small(folder: Path) -> None:
    """As `-small` is published: no prior, but an image encoder of the CLIP that Karlo's prior belongs to."""
    save_parts(
        folder,
        "StableUnCLIPImg2ImgPipeline",
        feature_extractor=("transformers", tiny_image_processor()),
        image_encoder=("transformers", tiny_image_tower()),
        **stable_parts(EMBED_DIM, "epsilon", PNDMScheduler),
    )
