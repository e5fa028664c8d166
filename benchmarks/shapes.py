"""Pipelines of diffusers in the shapes of Kandinsky 2.2 and of Karlo, at reduced width, with random weights."""

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from t2i.pipelines import Text2ImagePipeline
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.side_by_side import device

PROMPTS = ["a red cat", "a dog", "the red dog and a cat", "a cat and a red cat and a dog"]
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>"), ("a", "n")]
KANDINSKY_EMBED, KARLO_EMBED = 320, 128  # D of z_t and z_i; the published ones have 1280 and 768
PRIOR = {  # the published ones have 20 layers of 32 heads of 64
    False: {"num_attention_heads": 8, "attention_head_dim": 32, "num_layers": 6},
    True: {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2},
}
PRIOR_SCHEDULE = {"variance_type": "fixed_small_log", "prediction_type": "sample"}
KANDINSKY_UNET = {  # the published one has (384, 768, 1152, 1536), 3 layers a level, heads of 64
    False: {"block_out_channels": (64, 128, 192, 256), "layers_per_block": 3, "attention_head_dim": 32},
    True: {  # few groups keep enough pixels in each, or the norm divides by almost nothing
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "norm_num_groups": 4,
    },
}
KARLO_SIDES = (16, 64)  # of the decoder's and of the final images; the published ones are 64 and 256


def load_ours(pipeline: diffusers.DiffusionPipeline) -> Text2ImagePipeline:
    """Save a pipeline of diffusers and load it as this project's."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        for name, part in pipeline.components.items():
            if isinstance(part, transformers.CLIPTokenizer):  # as the published repositories store it
                (Path(folder) / name / "vocab.json").write_text(json.dumps(part.get_vocab()))
                merges = "".join(f"{first} {second}\n" for first, second in MERGES)
                (Path(folder) / name / "merges.txt").write_text(f"#version: 0.2\n{merges}")
        ours = Text2ImagePipeline.from_pretrained(folder).to(device())
    ours.set_progress_bar_config(disable=True)
    return ours


def build_prior_parts(embed: int, quick: bool) -> dict[str, Any]:
    """Return the prior and the CLIP text tower, which both families have."""
    alphabet = list(bytes_to_unicode().values())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in MERGES)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    end = vocabulary["<|endoftext|>"]
    tower = {"hidden_size": embed, "intermediate_size": 2 * embed, "projection_dim": embed}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77}
    text = transformers.CLIPTextConfig(vocab_size=end + 1, bos_token_id=end - 1, eos_token_id=end, **tower)
    prior = diffusers.PriorTransformer(num_embeddings=77, embedding_dim=embed, additional_embeddings=4, **PRIOR[quick])
    torch.nn.init.constant_(prior.clip_std, 1.0)
    return {
        "prior": prior,
        "text_encoder": transformers.CLIPTextModelWithProjection(text),
        "tokenizer": transformers.CLIPTokenizer(vocabulary, MERGES, pad_token="!", model_max_length=77),
    }


def build_kandinsky(quick: bool) -> diffusers.KandinskyV22CombinedPipeline:
    """Return Kandinsky 2.2 with a prior, a decoder of latents and a MoVQ of reduced width."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=KANDINSKY_EMBED,
        cross_attention_dim=192,
        **KANDINSKY_UNET[quick],
    )
    movq = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32),  # the spatial norm has 32 groups, always
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=12,
        norm_num_groups=4,
        norm_type="spatial",
    )
    tower = {"hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(projection_dim=KANDINSKY_EMBED, image_size=16, patch_size=8, **tower)
    bounds: dict[str, Any] = {"thresholding": True, "sample_max_value": 2.0, "clip_sample": False}
    prior_parts: dict[str, Any] = build_prior_parts(KANDINSKY_EMBED, quick) | {
        "image_encoder": transformers.CLIPVisionModelWithProjection(vision),
        "scheduler": UnCLIPScheduler(**PRIOR_SCHEDULE, clip_sample_range=10.0),
        "image_processor": transformers.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    }
    return freeze(
        diffusers.KandinskyV22CombinedPipeline(
            unet=unet,
            scheduler=diffusers.DDPMScheduler(
                beta_start=0.00085, beta_end=0.012, variance_type="learned_range", **bounds
            ),
            movq=movq,
            **{f"prior_{name}": part for name, part in prior_parts.items()},
        )
    )


def build_karlo(quick: bool) -> diffusers.DiffusionPipeline:
    """Return Karlo with a prior, a decoder of small images that learns its variance, and super-resolution."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline, UnCLIPTextProjModel

    torch.manual_seed(0)
    low, high = KARLO_SIDES
    common: dict[str, Any] = {  # the published ones have widths (320, 640, 960, 1280)
        "layers_per_block": 1 if quick else 3,
        "block_out_channels": (32, 64, 96, 128),
        "norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
    }
    decoder = UNet2DConditionModel(
        sample_size=low,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        cross_attention_dim=128,
        class_embed_type="identity",
        attention_head_dim=8,
        **common,
    )
    first, last = (
        UNet2DModel(
            sample_size=high,
            in_channels=6,
            out_channels=3,
            down_block_types=["ResnetDownsampleBlock2D"] * 4,
            up_block_types=["ResnetUpsampleBlock2D"] * 4,
            add_attention=False,
            **common,
        )
        for _ in range(2)
    )
    text = {"clip_embeddings_dim": KARLO_EMBED, "time_embed_dim": 4 * 32, "cross_attention_dim": 128}
    noise_prediction = {"prediction_type": "epsilon", "clip_sample_range": 1.0}
    return freeze(
        UnCLIPPipeline(
            decoder=decoder,
            text_proj=UnCLIPTextProjModel(**text),
            super_res_first=first,
            super_res_last=last,
            prior_scheduler=UnCLIPScheduler(**PRIOR_SCHEDULE, clip_sample_range=5.0),
            decoder_scheduler=UnCLIPScheduler(variance_type="learned_range", **noise_prediction),
            super_res_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", **noise_prediction),
            **build_prior_parts(KARLO_EMBED, quick),
        )
    )


def freeze(pipeline: Any) -> Any:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device())
