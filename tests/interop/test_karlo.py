"""Karlo behind this project's contracts, beside diffusers' deprecated unCLIP classes, which only tests may import."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel
from torch import Tensor

from t2i.diffusion.condition import ImageCondition
from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.sampling_loop import Sampling, sample_from_noise
from t2i.errors import InputError
from t2i.networks.public.karlo import KarloDecoder, derive_karlo_config
from t2i.networks.public.super_resolution import SuperResolution
from t2i.sampling.sample import build_decoder_condition, build_decoder_predict
from tests.helpers.karlo_folders import karlo, super_resolution_scheduler
from tests.helpers.public_folders import EMBED_DIM
from tests.helpers.references.karlo import (
    CLOSE,
    Said,
    noise,
    our_decoder,
    our_super_resolution,
    reference_decoder,
    reference_super_resolution,
    schedulers,
)
from tests.helpers.stages import seeds

ONE, MIXED = ["a red cat"], ["cat", "a red dog and a red cat", ""]


# The decoder


@pytest.mark.parametrize("texts", [ONE, MIXED], ids=["one", "mixed"])
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("name", ["unclip", "ddpm", "ddim"])
def test_the_decoder_draws_what_diffusers_classes_draw(name: str, scale: float, texts: list[str]):
    z_i, x = noise(len(texts), EMBED_DIM), noise(len(texts), 3, 8, 8)
    ours, theirs = schedulers(name, UnCLIPScheduler(variance_type="learned_range"))
    numbers = range(len(texts))
    decoder = our_decoder(karlo())
    predict = build_decoder_predict(
        decoder, ours, build_decoder_condition(decoder, z_i, Said().encode_text(texts)), scale
    )
    drawn = sample_from_noise(predict, ours, x, Sampling(5, seeds(*numbers)))
    expected = reference_decoder(texts, z_i, scale, theirs, x, 5, seeds(*numbers))
    # DDIM clips the clean sample and not the noise, in which a guidance scale of 8 multiplies rounding in every step
    close = {"atol": 1e-3, "rtol": 1e-3} if (name, scale) == ("ddim", 8.0) else CLOSE
    torch.testing.assert_close(drawn, expected, **close)


def test_a_caption_as_long_as_a_level_has_pixels_is_drawn_as_any_other():
    """There diffusers' attention takes the mask of the tokens for a whole one, unless captions are padded to 77."""
    texts = ["a red cat and a red dog and a dog"]  # 10 words and both ends: with z_i's four tokens 4 x 4
    text = Said().encode_text(texts)
    assert text.mask.shape[1] + 4 == 16
    z_i, x = noise(1, EMBED_DIM), noise(1, 3, 8, 8)
    predict = build_decoder_predict(
        our_decoder(karlo()), UnCLIPRespacedScheduler(), build_decoder_condition(our_decoder(karlo()), z_i, text), 8.0
    )
    ours, theirs = schedulers("unclip", UnCLIPScheduler(variance_type="learned_range"))
    expected = reference_decoder(texts, z_i, 8.0, theirs, x, 2, seeds(1))
    torch.testing.assert_close(sample_from_noise(predict, ours, x, Sampling(2, seeds(1))), expected, **CLOSE)


def test_without_a_caption_the_decoder_reads_the_empty_one_as_the_image_variations_do():
    z_i, x = noise(2, EMBED_DIM), noise(2, 3, 8, 8)
    ours, theirs = schedulers("unclip", UnCLIPScheduler(variance_type="learned_range"))
    drawn = sample_from_noise(
        build_decoder_predict(
            our_decoder(karlo()), ours, build_decoder_condition(our_decoder(karlo()), z_i, None), 8.0
        ),
        ours,
        x,
        Sampling(3, seeds(1, 2)),
    )
    torch.testing.assert_close(drawn, reference_decoder(["", ""], z_i, 8.0, theirs, x, 3, seeds(1, 2)), **CLOSE)


def test_the_decoder_is_trained_in_one_pass_that_says_what_its_steps_say():
    decoder = our_decoder(karlo()).requires_grad_()
    condition = ImageCondition(noise(2, EMBED_DIM), Said().encode_text(["cat", "a red dog"]))
    x, t = noise(2, 3, 8, 8), torch.tensor([10, 900])
    prediction = decoder(x, t, condition)
    assert prediction.shape == (2, 6, 8, 8)
    torch.testing.assert_close(prediction, decoder.step(x, t, decoder.prepare(condition)))
    dropped = condition.where(torch.tensor([True, False]), decoder.null(2))
    decoder(x, t, dropped).square().sum().backward()
    assert decoder.text_proj.learned_classifier_free_guidance_embeddings.grad.abs().max() > 0
    with pytest.raises(ValueError, match="reads captions"):
        decoder.prepare(ImageCondition(noise(2, EMBED_DIM)))


def test_a_decoder_is_the_same_after_saving_and_is_read_in_another_dtype(tmp_path: Path):
    decoder = our_decoder(karlo())
    decoder.save_pretrained(tmp_path)
    loaded = KarloDecoder.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == decoder.state_dict().keys()
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.config.embed_dim, loaded.config.latent_channels, loaded.config.latent_size) == (EMBED_DIM, 3, 8)
    assert loaded.config.learned_variance and not loaded.config.reads_masks
    half = our_decoder(karlo(), torch.float16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}


# Super-resolution


@pytest.mark.parametrize("name", ["unclip", "ddpm", "ddim"])
@pytest.mark.parametrize("steps", [2, 5])
def test_super_resolution_draws_what_diffusers_classes_draw(name: str, steps: int):
    low, x = 1.2 * noise(2, 3, 8, 8), noise(2, 3, 16, 16)
    model = our_super_resolution(karlo())
    ours, theirs = schedulers(name, super_resolution_scheduler())
    if name != "unclip":
        model.scheduler = ours
    drawn = model.draw_images(low, Sampling(steps, seeds(1, 2), noise=x))
    expected = reference_super_resolution(low, theirs, x, steps, seeds(1, 2))
    torch.testing.assert_close(drawn, expected.clamp(-1, 1), **CLOSE)


def test_super_resolution_in_one_step_takes_the_network_of_the_last_alone():
    model, seen = our_super_resolution(karlo()), []
    for name in ("super_res_first", "super_res_last"):
        getattr(model, name).time_embedding.register_forward_hook(lambda *_, name=name: seen.append(name))
    assert model.draw_images(noise(1, 3, 8, 8), Sampling(1, seeds(1))).shape == (1, 3, 16, 16)
    assert seen == ["super_res_last"]


def test_large_pictures_that_do_not_fit_into_memory_at_once_are_drawn_one_by_one():
    low, model, sizes = noise(3, 3, 8, 8).clamp(-1, 1), our_super_resolution(karlo()), []
    together = model.draw_images(low, Sampling(2, seeds(1, 2, 3)))

    def run_out_of_memory(module, arguments):
        sizes.append(len(arguments[0]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    for network in (model.super_res_first, model.super_res_last):
        network.time_embedding.register_forward_pre_hook(run_out_of_memory)
    torch.testing.assert_close(model.draw_images(low, Sampling(2, seeds(1, 2, 3))), together, **CLOSE)
    assert sizes == 2 * [3, 2, 1, 1, 1]


def test_a_large_picture_does_not_depend_on_the_others_of_its_batch():
    low, model = noise(2, 3, 8, 8).clamp(-1, 1), our_super_resolution(karlo())
    both = model.draw_images(low, Sampling(3, seeds(1, 2)))
    torch.testing.assert_close(both[1:], model.draw_images(low[1:], Sampling(3, seeds(2))), **CLOSE)
    assert both.abs().max() <= 1


def test_super_resolution_stands_in_the_autoencoders_place(tmp_path: Path):
    model = our_super_resolution(karlo())
    assert (model.channels, model.factor) == (3, 2)
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(model.encode(flat), flat[..., :8, :8])
    torch.testing.assert_close(model.decode(flat[..., :8, :8]), flat)
    model.save_pretrained(tmp_path)
    loaded = SuperResolution.from_pretrained(tmp_path)
    low = noise(1, 3, 8, 8)
    torch.testing.assert_close(
        loaded.draw_images(low, Sampling(2, seeds(1))), model.draw_images(low, Sampling(2, seeds(1)))
    )


def test_a_step_of_super_resolution_can_be_watched_and_changed():
    model, seen = our_super_resolution(karlo()), []

    def on_step(step: int, t: Tensor, x: Tensor) -> Tensor:
        seen.append((step, int(t)))
        return torch.zeros_like(x) if step == 2 else x

    drawn = model.draw_images(
        noise(1, 3, 8, 8), Sampling(3, seeds(1), on_step=on_step, transform=lambda predict: predict)
    )
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] == 999 and seen[-1][1] == 0
    assert drawn.abs().max() == 0


def test_weights_that_are_only_there_while_they_are_needed_change_nothing():
    """As with sequential offload: between the calls they are on no device."""
    decoder, model = our_decoder(karlo()), our_super_resolution(karlo())
    z_i, x, text = noise(1, EMBED_DIM), noise(1, 3, 8, 8), Said().encode_text(ONE)

    def draw() -> Tensor:
        scheduler = UnCLIPRespacedScheduler(variance_type="learned_range")
        with torch.no_grad():
            predict = build_decoder_predict(decoder, scheduler, build_decoder_condition(decoder, z_i, text), 8.0)
            return model.draw_images(
                sample_from_noise(predict, scheduler, x, Sampling(2, seeds(1))), Sampling(2, seeds(1))
            )

    expected = draw()
    for part in (decoder, model):
        cpu_offload(part, torch.device("cpu"))
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}
    torch.testing.assert_close(draw(), expected)


# What is refused


def changed(tmp_path: Path, part: str, **settings: Any) -> Path:
    folder = tmp_path / "karlo"
    shutil.copytree(karlo(), folder)
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("part", "settings", "said"),
    [
        ("decoder", {"class_embed_type": None}, "class_embed_type in .* must be one of identity; got None"),
        ("decoder", {"out_channels": 5}, "out_channels in .* must be one of 3, 6; got 5"),
        ("decoder", {"cross_attention_dim": 32}, "24 dimensions, the decoder reads 32"),
        ("decoder", {"block_out_channels": [16, 32]}, "decoder"),
        ("text_proj", {"clip_embeddings_dim": 12}, "text_proj.*misshapen"),
        ("text_proj", {"time_embed_dim": 12}, "12"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(tmp_path: Path, part: str, settings: dict, said: str):
    with pytest.raises(InputError, match=said):
        our_decoder(changed(tmp_path, part, **settings))


# Real sizes, without memory

TEXT_PROJ = {
    "learned_classifier_free_guidance_embeddings": (768,),
    "embedding_proj.weight": (1280, 768),
    "embedding_proj.bias": (1280,),
    "clip_image_embeddings_project_to_time_embeddings.weight": (1280, 768),
    "clip_image_embeddings_project_to_time_embeddings.bias": (1280,),
    "clip_extra_context_tokens_proj.weight": (6144, 768),
    "clip_extra_context_tokens_proj.bias": (6144,),
    "encoder_hidden_states_proj.weight": (1536, 768),
    "encoder_hidden_states_proj.bias": (1536,),
    "text_encoder_hidden_states_norm.weight": (1536,),
    "text_encoder_hidden_states_norm.bias": (1536,),
}
UNET = {
    "sample_size": 64,
    "layers_per_block": 3,
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": [320, 640, 960, 1280],
    "in_channels": 3,
    "out_channels": 6,
    "cross_attention_dim": 1536,
    "class_embed_type": "identity",
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
SUPER_RESOLUTION = {
    "sample_size": 256,
    "layers_per_block": 3,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
    "block_out_channels": [320, 640, 960, 1280],
    "in_channels": 6,
    "out_channels": 3,
    "add_attention": False,
    "resnet_time_scale_shift": "scale_shift",
}


def shapes(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    held = module.state_dict()
    return {name.removeprefix(prefix): tuple(held[name].shape) for name in held if name.startswith(prefix)}


def test_the_published_configuration_of_the_decoder_gives_the_published_tensors():
    decoder_part, projection_part = SimpleNamespace(), SimpleNamespace()
    decoder_part.folder = projection_part.folder = Path("karlo")
    decoder_part.get_config_arguments = lambda: UNET
    sizes = {"clip_embeddings_dim": 768, "time_embed_dim": 1280, "cross_attention_dim": 1536}
    projection_part.get_config_arguments = lambda: sizes | {"clip_extra_context_tokens": 4}
    with torch.device("meta"):
        ours = KarloDecoder(**derive_karlo_config(decoder_part, projection_part))
        unet, projection = UNet2DConditionModel(**UNET), UnCLIPTextProjModel(clip_extra_context_tokens=4, **sizes)
    assert shapes(ours, "text_proj.") == TEXT_PROJ == shapes(projection)
    found = shapes(ours, "unet.")
    assert found == shapes(unet)
    assert found["conv_in.weight"] == (320, 3, 3, 3) and found["conv_out.weight"] == (6, 320, 3, 3)
    attention = "down_blocks.1.attentions.0."
    assert found[attention + "add_k_proj.weight"] == found[attention + "add_v_proj.weight"] == (640, 1536)
    assert found[attention + "to_q.weight"] == (640, 640) and found[attention + "group_norm.weight"] == (640,)
    assert found["down_blocks.0.resnets.0.time_emb_proj.weight"] == (640, 1280)
    assert found["down_blocks.1.resnets.0.conv_shortcut.weight"] == (640, 320, 1, 1)
    rest = {name for name in shapes(ours) if not name.startswith(("unet.", "text_proj."))}
    assert rest == {"null_pooled", "null_states"}


def test_the_published_configuration_of_super_resolution_gives_the_published_tensors():
    with torch.device("meta"):
        ours = SuperResolution(SUPER_RESOLUTION, SUPER_RESOLUTION, {}, low_size=64)
        theirs = UNet2DModel(**SUPER_RESOLUTION)
    assert ours.factor == 4
    for name in ("super_res_first.", "super_res_last."):
        found = shapes(ours, name)
        assert found == shapes(theirs)
        assert found["conv_in.weight"] == (320, 6, 3, 3) and found["conv_out.weight"] == (3, 320, 3, 3)
        assert not [key for key in found if "attention" in key]
