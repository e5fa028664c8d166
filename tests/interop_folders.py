"""Folders in the public layouts, at tiny sizes with random weights, written by diffusers' and transformers' classes.

Each family's builders are here. A builder marked `built` runs once a process and returns its folder, which no test may
change: `shutil.copytree` it first.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    XLMRobertaTokenizer,
)

EMBED_DIM = 16  # D of z_t and z_i in all tiny models; also the text towers' width, as in the public ones
KARLO_WIDTHS = (16, 24)  # of the levels of its U-Nets
MERGES = ("c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>", "a n", "an d</w>")


@functools.cache
def session_folder() -> Path:
    """Of this process, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="t2i-public-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def built(build: Callable[[Path], object]) -> Callable[[], Path]:
    """`build(folder)` fills a new folder; what is returned builds it on the first call and returns its path."""

    @functools.cache
    def path() -> Path:
        folder = session_folder() / build.__name__
        folder.mkdir()
        build(folder)
        return folder

    return path


def save_parts(folder: Path, class_name: str, **parts: tuple[str, Any]) -> None:
    """Components in subfolders, and the model_index.json: name=(library, component). A str is a class without files.

    As public repositories have it: a component's library is "diffusers", "transformers" or the name of the pipeline's
    own module, such as "unclip" for Karlo's text_proj.
    """
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": "0.17.0"}
    for name, (library, part) in parts.items():
        index[name] = [library, part if isinstance(part, str) else type(part).__name__]
        if isinstance(part, CLIPTokenizer):
            save_tokenizer(part, folder / name)
        elif not isinstance(part, str):
            part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """With other values wherever initialisation left a constant, so that nothing can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if not value.is_floating_point() or value.numel() < 2 or (value != value.flatten()[0]).any():
                continue
            if name.endswith(("causal_attention_mask", "embeddings.position_ids")):
                continue
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return module.eval().requires_grad_(False)


@functools.cache
def clip_vocabulary() -> dict[str, int]:
    """In CLIP's order: the bytes ("!" is 0), the bytes that end a word, merges, start and end."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair.split()) for pair in MERGES)]
    return {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def tiny_tokenizer(pad: str = "!") -> CLIPTokenizer:
    """CLIP's with eight merges. pad: "!", which is 0, as Karlo has it; "<|endoftext|>" is transformers' usual."""
    merges = [tuple(pair.split()) for pair in MERGES]
    return CLIPTokenizer(clip_vocabulary(), merges, pad_token=pad, model_max_length=77)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """As the public repositories have it: vocab.json and merges.txt, not transformers 5's tokenizer.json."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = tokenizer.pad_token
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    about = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | about))


def tiny_text_tower(
    embed_dim: int = EMBED_DIM, width: int = EMBED_DIM, seed: int = 0, old: bool = False
) -> CLIPTextModelWithProjection:
    """old: with the end token that public configurations before 2023 name, 2, which means: the highest number."""
    torch.manual_seed(seed)
    end = clip_vocabulary()["<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=embed_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0 if old else end - 1,
        eos_token_id=2 if old else end,
        pad_token_id=1,
    )
    return randomised(CLIPTextModelWithProjection(config), seed)


def tiny_image_tower(embed_dim: int = EMBED_DIM, size: int = 16, seed: int = 1) -> CLIPVisionModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=40,
        projection_dim=embed_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
    )
    return randomised(CLIPVisionModelWithProjection(config), seed)


def tiny_image_processor(size: int = 16) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def tiny_prior_transformer(embed_dim: int = EMBED_DIM, seed: int = 2, **changed: Any) -> PriorTransformer:
    """As Karlo's and Kandinsky's: 77 caption tokens, then z_t, time, noisy z_i, query."""
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_embeddings": 77}
    settings = sizes | {"embedding_dim": embed_dim, "additional_embeddings": 4} | changed
    prior = randomised(PriorTransformer(**settings), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        prior.clip_mean.copy_(0.3 * torch.randn(1, embed_dim, generator=generator))
        prior.clip_std.copy_(0.5 + torch.rand(1, embed_dim, generator=generator))
    return prior


def prior_scheduler(clip_range: float = 5.0) -> UnCLIPScheduler:
    """Karlo's in diffusers' layout; Kandinsky's have clip_range 10."""
    return UnCLIPScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        clip_sample_range=clip_range,
        num_train_timesteps=1000,
    )


def decoder_scheduler() -> UnCLIPScheduler:
    """Of Karlo's decoder."""
    return UnCLIPScheduler(
        variance_type="learned_range", prediction_type="epsilon", clip_sample_range=1.0, num_train_timesteps=1000
    )


# Kandinsky 2.1 and 2.2: prior, decoder, both combined, inpainting

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
        movq.decoder.conv_out.weight.mul_(0.4)  # most of a picture within [-1, 1]: nothing is hidden by cutting it
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


def save_eclipse_prior(folder: Path, **changed: Any) -> PriorTransformer:
    """As ECLIPSE's: a PriorTransformer's files without the time. What is returned has the time, which no token sees."""
    prior = tiny_prior_transformer(**changed)
    time = prior.config.num_embeddings + 1  # the place of its token
    prior.causal_attention_mask[:, :time, time] = prior.causal_attention_mask[:, time + 1 :, time] = -10000.0
    folder.mkdir(parents=True)
    tensors = {name: one for name, one in prior.state_dict().items() if not name.startswith("time_embedding.")}
    places = tensors["positional_embedding"]
    tensors["positional_embedding"] = torch.cat([places[:, :time], places[:, time + 1 :]], dim=1)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {key: value for key, value in prior.config.items() if not key.startswith("time_embed")}
    config |= {"_class_name": "PriorTransformer", "additional_embeddings": 3}
    (folder / "config.json").write_text(json.dumps(config))
    return prior
