"""Tiny folders of Kandinsky 2.1 and 2.2: prior, decoder, both combined, inpainting. See
`tests.helpers.public_folders`."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, VQModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from transformers import XLMRobertaTokenizer

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

KANDINSKY_WIDTH = 12  # of the U-Net's tokens: in 2.1 also D, so EMBED_DIM there
KANDINSKY_TEXT = 20  # of 2.1's text encoder
KANDINSKY_LATENTS = 8  # along a side; 16 pixels
WORDS = (
    "▁a",
    "▁red",
    "▁blue",
    "▁cat",
    "▁dog",
    "▁and",
    "s",
    "▁the",
    "▁on",
    "▁chair",
    "▁",
    *"abcdefghijklmnopqrstuvwxyz",
)


def tiny_kandinsky_unet(
    version: str = "2.2", masks: bool = False, seed: int = 3, **changed: Any
) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    of_version = {
        "2.1": {
            "addition_embed_type": "text_image",
            "encoder_hid_dim_type": "text_image_proj",
            "encoder_hid_dim": KANDINSKY_TEXT,
            "cross_attention_dim": EMBED_DIM,
        },
        "2.2": {
            "addition_embed_type": "image",
            "encoder_hid_dim_type": "image_proj",
            "encoder_hid_dim": EMBED_DIM,
            "cross_attention_dim": KANDINSKY_WIDTH,
        },
    }
    settings: dict[str, Any] = {
        "sample_size": KANDINSKY_LATENTS,
        "in_channels": 9 if masks else 4,
        "out_channels": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (16, 24),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "resnet_time_scale_shift": "scale_shift",
    }
    return randomised(UNet2DConditionModel(**settings | of_version[version] | changed), seed)


def tiny_controlnet_unet() -> UNet2DConditionModel:
    """That of 2.2 with a control image, of eight times the latents' sides, as four more input channels."""
    unet = tiny_kandinsky_unet("2.2", addition_embed_type="image_hint", in_channels=8)
    with torch.no_grad():
        for layer in unet.add_embedding.input_hint_block[::2]:
            layer.weight.mul_(2.5)  # random layers shrink their input: after eight, nothing would be left of the image
    return unet


def tiny_movq(seed: int = 4) -> VQModel:
    torch.manual_seed(seed)
    movq = VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32),  # the spatial norm has 32 groups, always
        layers_per_block=1,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=12,
        norm_num_groups=4,
        norm_type="spatial",
    )
    movq = randomised(movq, seed)
    with torch.no_grad():
        movq.decoder.conv_out.weight.mul_(0.4)  # most of an image within [-1, 1]: nothing is hidden by cutting it
    return movq


def tiny_multilingual_clip(seed: int = 5) -> MultilingualCLIP:
    """Kandinsky 2.1's: the padding is token 1, as in all XLM-RoBERTas, and positions begin after it."""
    torch.manual_seed(seed)
    config = MCLIPConfig(
        transformerDimSize=KANDINSKY_TEXT,
        imageDimSize=EMBED_DIM,
        vocab_size=len(WORDS) + 5,
        hidden_size=KANDINSKY_TEXT,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=80,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    return randomised(MultilingualCLIP(config), seed)


def tiny_multilingual_tokenizer() -> XLMRobertaTokenizer:
    special = [(word, 0.0) for word in ("<s>", "<pad>", "</s>", "<unk>")]
    words = [(word, -1.0 - number / 10) for number, word in enumerate(WORDS)]
    return XLMRobertaTokenizer(vocab=[*special, *words, ("<mask>", 0.0)], model_max_length=77)


def kandinsky_scheduler(version: str, masks: bool = False) -> DDIMScheduler | DDPMScheduler:
    """As the public decoders have it: 2.2 and the inpainting models DDPM with the learned variance, 2.1 DDIM."""
    levels = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    if version == "2.1" and not masks:
        return DDIMScheduler(**levels, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    bounds = {"thresholding": True, "sample_max_value": 2.0, "clip_sample": False}
    return DDPMScheduler(**levels, **bounds, variance_type="learned_range")


def kandinsky_prior_parts(version: str, prefix: str = "") -> dict[str, tuple[str, Any]]:
    parts: dict[str, tuple[str, Any]] = {
        "prior": ("diffusers", tiny_prior_transformer()),
        "image_encoder": ("transformers", tiny_image_tower()),
        "text_encoder": ("transformers", tiny_text_tower()),
        "tokenizer": ("transformers", tiny_tokenizer("!" if version == "2.2" else "<|endoftext|>")),
        "scheduler": ("diffusers", prior_scheduler(10.0)),
        "image_processor": ("transformers", tiny_image_processor()),
    }
    return {prefix + name: part for name, part in parts.items()}


def kandinsky_decoder_parts(version: str, masks: bool = False) -> dict[str, tuple[str, Any]]:
    parts: dict[str, tuple[str, Any]] = {
        "unet": ("diffusers", tiny_kandinsky_unet(version, masks)),
        "scheduler": ("diffusers", kandinsky_scheduler(version, masks)),
        "movq": ("diffusers", tiny_movq()),
    }
    if version == "2.1":
        parts["text_encoder"] = ("kandinsky", tiny_multilingual_clip())
        parts["tokenizer"] = ("transformers", tiny_multilingual_tokenizer())
    return parts


@built
def kandinsky_22_prior(folder: Path) -> None:
    save_parts(folder, "KandinskyV22PriorPipeline", **kandinsky_prior_parts("2.2"))


@built
def kandinsky_22_decoder(folder: Path) -> None:
    save_parts(folder, "KandinskyV22Pipeline", **kandinsky_decoder_parts("2.2"))


@built
def kandinsky_22_inpaint(folder: Path) -> None:
    save_parts(folder, "KandinskyV22InpaintPipeline", **kandinsky_decoder_parts("2.2", masks=True))


@built
def kandinsky_22_controlnet(folder: Path) -> None:
    parts = kandinsky_decoder_parts("2.2") | {"unet": ("diffusers", tiny_controlnet_unet())}
    save_parts(folder, "KandinskyV22ControlnetPipeline", **parts)


@built
def kandinsky_22_combined(folder: Path) -> None:
    parts = kandinsky_decoder_parts("2.2") | kandinsky_prior_parts("2.2", "prior_")
    save_parts(folder, "KandinskyV22CombinedPipeline", **parts)


@built
def kandinsky_21_prior(folder: Path) -> None:
    save_parts(folder, "KandinskyPriorPipeline", **kandinsky_prior_parts("2.1"))


@built
def kandinsky_21_decoder(folder: Path) -> None:
    save_parts(folder, "KandinskyPipeline", **kandinsky_decoder_parts("2.1"))


@built
def kandinsky_21_inpaint(folder: Path) -> None:
    save_parts(folder, "KandinskyInpaintPipeline", **kandinsky_decoder_parts("2.1", masks=True))


@built
def kandinsky_21_combined(folder: Path) -> None:
    parts = kandinsky_decoder_parts("2.1") | kandinsky_prior_parts("2.1", "prior_")
    save_parts(folder, "KandinskyCombinedPipeline", **parts)
