"""The public Kandinsky models at their real sizes, without memory: every tensor has its published name and shape."""

import math
from inspect import signature
from pathlib import Path

import pytest
import torch
from diffusers import KandinskyV22Pipeline, PriorTransformer, UNet2DConditionModel, VQModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP as TheirMultilingualCLIP
from torch import nn

from t2i.files.component import Component
from t2i.interop.prior_transformer import convert_prior_config, map_tensor_names
from t2i.networks.prior import Prior
from t2i.networks.public.kandinsky import KandinskyDecoder, derive_kandinsky_config
from t2i.networks.public.movq import MoVQ
from t2i.networks.public.multilingual_clip import MultilingualCLIP
from tests.helpers.kandinsky_folders import tiny_kandinsky_unet

Shapes = dict[str, tuple[int, ...]]

UNET = {  # what 2.1 and 2.2 share
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 8,
    "layers_per_block": 3,
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "block_out_channels": [384, 768, 1152, 1536],
    "cross_attention_dim": 768,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
CONDITIONS = {
    "2.1": {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj", "encoder_hid_dim": 1024},
    "2.2": {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 1280},
}
CONDITIONS["2.2 ControlNet"] = CONDITIONS["2.2"] | {"addition_embed_type": "image_hint"}
MOVQ = {
    "down_block_types": [*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3],
    "block_out_channels": [128, 256, 256, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 16384,
    "norm_type": "spatial",
}
XLM_ROBERTA = {
    "vocab_size": 250002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
TIME, TOKEN = 1536, 768  # dimensions of what is added to the timestep, and of what is attended to
PUBLISHED: dict[str, Shapes] = {
    "2.1": {
        "encoder_hid_proj.image_embeds.weight": (10 * TOKEN, 768),
        "encoder_hid_proj.image_embeds.bias": (10 * TOKEN,),
        "encoder_hid_proj.text_proj.weight": (TOKEN, 1024),
        "encoder_hid_proj.text_proj.bias": (TOKEN,),
        "add_embedding.text_proj.weight": (TIME, 768),
        "add_embedding.text_proj.bias": (TIME,),
        "add_embedding.text_norm.weight": (TIME,),
        "add_embedding.text_norm.bias": (TIME,),
        "add_embedding.image_proj.weight": (TIME, 768),
        "add_embedding.image_proj.bias": (TIME,),
    },
    "2.2": {
        "encoder_hid_proj.image_embeds.weight": (32 * TOKEN, 1280),
        "encoder_hid_proj.image_embeds.bias": (32 * TOKEN,),
        "encoder_hid_proj.norm.weight": (TOKEN,),
        "encoder_hid_proj.norm.bias": (TOKEN,),
        "add_embedding.image_proj.weight": (TIME, 1280),
        "add_embedding.image_proj.bias": (TIME,),
        "add_embedding.image_norm.weight": (TIME,),
        "add_embedding.image_norm.bias": (TIME,),
    },
}
# The layers that reduce a control image, and their channels
HINT_CHANNELS = {
    0: (3, 16),
    2: (16, 16),
    4: (16, 32),
    6: (32, 32),
    8: (32, 96),
    10: (96, 96),
    12: (96, 256),
    14: (256, 4),
}
PUBLISHED["2.2 ControlNet"] = PUBLISHED["2.2"] | {
    f"add_embedding.input_hint_block.{layer}.{name}": shape
    for layer, (into, out) in HINT_CHANNELS.items()
    for name, shape in {"weight": (out, into, 3, 3), "bias": (out,)}.items()
}


def shapes(module: nn.Module, prefix: str = "") -> Shapes:
    """Of the state dict, without the prefix; what does not have it is left out."""
    state = module.state_dict()
    return {name.removeprefix(prefix): tuple(one.shape) for name, one in state.items() if name.startswith(prefix)}


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


@pytest.mark.parametrize(
    ("version", "channels"), [("2.1", 4), ("2.1", 9), ("2.2", 4), ("2.2", 9), ("2.2 ControlNet", 8)]
)
def test_a_u_net_has_the_published_tensors(version: str, channels: int) -> None:
    settings = UNET | CONDITIONS[version] | {"in_channels": channels}
    with torch.device("meta"):
        decoder = KandinskyDecoder(settings, **derive_kandinsky_config(settings))
        theirs = shapes(UNet2DConditionModel(**settings))
    ours = shapes(decoder, "unet.")
    assert ours == theirs
    of_condition = ("encoder_hid_proj.", "add_embedding.")
    assert {name: shape for name, shape in ours.items() if name.startswith(of_condition)} == PUBLISHED[version]
    assert ours["conv_in.weight"] == (384, channels, 3, 3) and ours["conv_out.weight"] == (8, 384, 3, 3)
    assert ours["down_blocks.1.attentions.0.add_k_proj.weight"] == (768, TOKEN)
    assert ours["time_embedding.linear_2.weight"] == (TIME, TIME)
    nulls = {name for name in decoder.state_dict() if not name.startswith("unet.")}
    assert nulls == {"null_embedding"} | ({"null_states", "null_pooled"} if version == "2.1" else set())
    assert decoder.config.embed_dim == (768 if version == "2.1" else 1280)


def test_movq_has_the_published_tensors() -> None:
    with torch.device("meta"):
        movq = MoVQ(MOVQ)
        theirs = shapes(VQModel(**MOVQ))
    ours = shapes(movq, "coder.")
    assert ours == theirs and len(ours) == len(movq.state_dict())
    assert ours["quantize.embedding.weight"] == (16384, 4)
    norm = "decoder.mid_block.resnets.0.norm1"
    assert ours[f"{norm}.norm_layer.weight"] == (512,)
    assert ours[f"{norm}.conv_y.weight"] == ours[f"{norm}.conv_b.weight"] == (512, 4, 1, 1)
    assert (movq.channels, movq.factor) == (4, 8)
    assert ours["encoder.down_blocks.3.attentions.1.to_out.0.weight"] == (512, 512)


def test_the_text_encoder_has_the_published_tensors() -> None:
    with torch.device("meta"):
        encoder = MultilingualCLIP(XLM_ROBERTA)
        theirs = shapes(TheirMultilingualCLIP(MCLIPConfig(1024, 768, **XLM_ROBERTA)))
    ours = shapes(encoder)
    assert ours == theirs
    assert ours["LinearTransformation.weight"] == (768, 1024) and encoder.width == 1024
    assert ours["transformer.embeddings.word_embeddings.weight"] == (250002, 1024)


@pytest.mark.parametrize(("version", "dimensions"), [("2.1", 768), ("2.2", 1280)])
def test_a_prior_has_the_published_tensors(version: str, dimensions: int) -> None:
    settings = {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 20, "num_embeddings": 77}
    with torch.device("meta"):
        prior = PriorTransformer(**settings, embedding_dim=dimensions, additional_embeddings=4)
    expected: Shapes = {
        "positional_embedding": (1, 81, 2048),
        "prd_embedding": (1, 1, 2048),
        "clip_mean": (1, dimensions),
        "clip_std": (1, dimensions),
        "norm_out.weight": (2048,),
        "norm_out.bias": (2048,),
    }
    for name in ("proj_in", "embedding_proj", "encoder_hidden_states_proj"):
        expected |= linear(name, 2048, dimensions)
    expected |= linear("proj_to_clip_embeddings", dimensions, 2048)
    expected |= linear("time_embedding.linear_1", 2048, 2048) | linear("time_embedding.linear_2", 2048, 2048)
    for block in (f"transformer_blocks.{number}" for number in range(20)):
        for norm in ("norm1", "norm3"):
            expected |= {f"{block}.{norm}.weight": (2048,), f"{block}.{norm}.bias": (2048,)}
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            expected |= linear(f"{block}.attn1.{part}", 2048, 2048)
        expected |= linear(f"{block}.ff.net.0.proj", 8192, 2048) | linear(f"{block}.ff.net.2", 2048, 8192)
    assert shapes(prior) == expected and len(expected) == 338
    with torch.device("meta"):
        ours = shapes(Prior(**convert_prior_config({**settings, "embedding_dim": dimensions})))
    names = map_tensor_names(settings["num_layers"])
    assert sorted(name for parts in names.values() for name in parts) == sorted(expected)
    assert ours.keys() == {*names, "null_embedding", "null_states"}
    for name, parts in names.items():  # a Prior has no batch of one, and one tensor for query, key and value
        stacked = sum(math.prod(expected[part]) for part in parts)
        assert math.prod(ours[name]) == stacked and ours[name][-1] == expected[parts[0]][-1] * (
            len(parts) if len(ours[name]) == 1 else 1
        )


def test_a_u_net_without_a_size_draws_pictures_of_512_pixels_as_in_the_reference(tmp_path: Path) -> None:
    tiny_kandinsky_unet(sample_size=None).save_pretrained(tmp_path / "unet")
    model = KandinskyDecoder.from_component(Component(tmp_path / "unet", tmp_path))
    assert model.config.latent_size * 8 == signature(KandinskyV22Pipeline.__call__).parameters["height"].default
    model.save_pretrained(tmp_path / "own")
    again = KandinskyDecoder.from_pretrained(tmp_path / "own")
    assert again.config.latent_size == 64 and again.unet.config.sample_size is None
