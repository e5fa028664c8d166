"""Tiny folders of Karlo in the public layouts. See `tests.helpers.public_folders`."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel

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

KARLO_WIDTHS = (16, 24)  # of the levels of its U-Nets


def decoder_scheduler() -> UnCLIPScheduler:
    """Of Karlo's decoder."""
    return UnCLIPScheduler(
        variance_type="learned_range", prediction_type="epsilon", clip_sample_range=1.0, num_train_timesteps=1000
    )


def karlo_text_proj(seed: int = 10) -> Any:
    """UnCLIPTextProjModel, which lives in diffusers' deprecated pipelines alone."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    torch.manual_seed(seed)
    sizes = {"time_embed_dim": 4 * KARLO_WIDTHS[0], "cross_attention_dim": 24}
    return randomised(UnCLIPTextProjModel(clip_embeddings_dim=EMBED_DIM, **sizes), seed)


def karlo_unet(seed: int = 11, **changed: Any) -> UNet2DConditionModel:
    """Karlo's decoder with one layer a block, on 8 x 8 pixels."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 6,
        "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": KARLO_WIDTHS,
        "norm_num_groups": 4,
        "cross_attention_dim": 24,
        "class_embed_type": "identity",
        "attention_head_dim": 8,
        "resnet_time_scale_shift": "scale_shift",
    }
    return randomised(UNet2DConditionModel(**settings | changed), seed)


def karlo_super_resolution(seed: int) -> UNet2DModel:
    """One of its two networks, from 8 to 16 pixels."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 6,
        "out_channels": 3,
        "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": KARLO_WIDTHS,
        "norm_num_groups": 4,
        "add_attention": False,
        "resnet_time_scale_shift": "scale_shift",
    }
    return randomised(UNet2DModel(**settings), seed)


def super_resolution_scheduler() -> UnCLIPScheduler:
    return UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon", clip_sample_range=1.0)


def karlo_parts() -> dict[str, tuple[str, Any]]:
    """What both of Karlo's repositories hold."""
    return {
        "text_encoder": ("transformers", tiny_text_tower()),
        "tokenizer": ("transformers", tiny_tokenizer()),
        "text_proj": ("unclip", karlo_text_proj()),
        "decoder": ("diffusers", karlo_unet()),
        "super_res_first": ("diffusers", karlo_super_resolution(12)),
        "super_res_last": ("diffusers", karlo_super_resolution(13)),
        "decoder_scheduler": ("diffusers", decoder_scheduler()),
        "super_res_scheduler": ("diffusers", super_resolution_scheduler()),
    }


@built
def karlo(folder: Path) -> None:
    """kakaobrain/karlo-v1-alpha: from text."""
    prior = {"prior": ("diffusers", tiny_prior_transformer()), "prior_scheduler": ("diffusers", prior_scheduler())}
    save_parts(folder, "UnCLIPPipeline", **prior, **karlo_parts())


@built
def karlo_variations(folder: Path) -> None:
    """kakaobrain/karlo-v1-alpha-image-variations: an image encoder in the prior's place."""
    image = {
        "image_encoder": ("transformers", tiny_image_tower()),
        "feature_extractor": ("transformers", tiny_image_processor()),
    }
    save_parts(folder, "UnCLIPImageVariationPipeline", **image, **karlo_parts())
