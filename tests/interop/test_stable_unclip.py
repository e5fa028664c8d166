"""Stable unCLIP here and in diffusers: with the same noise the same embeddings, predictions and images."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from t2i.diffusion.condition import ImageCondition
from t2i.diffusion.loss import drop_condition
from t2i.diffusion.stored_schedulers import check_scheduler_folder
from t2i.errors import InputError
from t2i.files.component import Component
from t2i.files.untrusted import read_config
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.public.stable_unclip import StableUnCLIPDecoder, load_caption_encoder, load_latent_autoencoder
from t2i.networks.text_encoder import TextEncoder
from t2i.sampling.sample import build_decoder_condition, build_decoder_predict
from tests.helpers.public_folders import EMBED_DIM, clip_vocabulary, tiny_text_tower
from tests.helpers.stable_unclip_folders import stable_unclip, stable_unclip_images

PROMPTS = ["a red cat and a dog", "cat", "a photo of " + "dogs and cats " * 30]  # the last is cut
WORDS = {"q": "query.", "k": "key.", "v": "value."}
REAL_UNET = {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "class_embed_type": "projection",
}
REAL_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: Stable Diffusion reads the last but one
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
REAL_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
}


@functools.cache
def reference(images: bool = False) -> DiffusionPipeline:
    kind, folder = (
        (StableUnCLIPImg2ImgPipeline, stable_unclip_images) if images else (StableUnCLIPPipeline, stable_unclip)
    )
    pipeline = kind.from_pretrained(folder())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def ours(images: bool = False) -> tuple:
    """Decoder, text encoder, autoencoder."""
    folder = stable_unclip_images() if images else stable_unclip()
    text_encoder = load_caption_encoder(Component(folder / "text_encoder", folder, stem="model"), folder / "tokenizer")
    decoder = decoder_of(folder)
    decoder.set_null_condition(None, text_encoder)
    return decoder, text_encoder, load_latent_autoencoder(Component(folder / "vae", folder))


def decoder_of(folder: Path) -> StableUnCLIPDecoder:
    check_scheduler_folder(folder / "image_noising_scheduler", "DDPMScheduler", folder)
    noising = read_config(folder / "image_noising_scheduler" / "scheduler_config.json")
    unet, normalizer = (Component(folder / name, folder) for name in ("unet", "image_normalizer"))
    return StableUnCLIPDecoder.from_components(unet, normalizer, noising)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", [0, 250, 999])
@pytest.mark.parametrize("images", [False, True])
def test_an_embedding_is_noised_as_diffusers_does(images, level):
    decoder, width = ours(images)[0], 20 if images else EMBED_DIM
    z_i, noise = drawn(3, width), drawn(3, width, seed=1)
    theirs = reference(images).noise_image_embeddings(z_i, level, noise)
    torch.testing.assert_close(decoder.noise_image_embeds(z_i, noise, level), theirs, atol=1e-6, rtol=1e-5)


def test_zero_is_the_null_and_is_not_noised():
    decoder = ours()[0]
    z_i = drawn(2, EMBED_DIM)
    z_i[1] = 0
    labels = decoder.noise_image_embeds(z_i, drawn(2, EMBED_DIM, seed=1), 500)
    assert labels[0].any() and not labels[1].any()
    torch.testing.assert_close(labels[1:], decoder.null(1).embedding)


def test_captions_of_any_length_are_read_with_their_padding():
    _, encoder, _ = ours()
    expected, empty = reference().encode_prompt(PROMPTS, "cpu", 1, True)
    read = encoder.encode(PROMPTS)
    torch.testing.assert_close(read.states, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode([""]).states, empty[:1], atol=1e-5, rtol=1e-5)
    assert read.mask.all() and read.states.shape == (3, 77, encoder.width)
    assert encoder.find_truncated_text(PROMPTS[2]) and not encoder.find_truncated_text(PROMPTS[0])


def test_an_exclamation_mark_is_read_as_text():
    """diffusers deviates: its tokenizer takes "!", which pads, out of captions as the padding; OpenCLIP's, which the
    model was trained with, does not."""
    _, encoder, _ = ours()
    tokens, _ = encoder.tokenizer(["cat!"])
    theirs = reference().tokenizer("cat!").input_ids
    assert tokens[0, 2] == clip_vocabulary()["!</w>"] and theirs[2] == encoder.tokenizer.pad == 0
    assert [tokens[0, 0], *tokens[0, [1, 3]]] == [theirs[0], theirs[1], theirs[3]]


@pytest.mark.parametrize("images", [False, True])
def test_a_prediction_is_diffusers(images):
    decoder, encoder, _ = ours(images)
    text = encoder.encode(PROMPTS)
    labels, x, t = (
        decoder.noise_image_embeds(drawn(3, decoder.config.embed_dim)),
        drawn(3, 4, 8, 8),
        torch.tensor([3, 500, 999]),
    )
    theirs = reference(images).unet(x, t, text.states, class_labels=labels).sample
    torch.testing.assert_close(decoder(x, t, ImageCondition(labels, text)), theirs, atol=1e-5, rtol=1e-5)
    null = decoder.null(3).expand()
    theirs = reference(images).unet(x, t, null.text.states, class_labels=torch.zeros_like(labels)).sample
    torch.testing.assert_close(decoder(x, t, null), theirs, atol=1e-5, rtol=1e-5)


def test_a_condition_holds_the_noised_embedding():
    decoder, encoder, _ = ours()
    text, z_i, noise = encoder.encode(PROMPTS), drawn(3, EMBED_DIM), drawn(3, EMBED_DIM, seed=1)
    condition = build_decoder_condition(decoder, z_i, text, noise=noise, level=7)
    torch.testing.assert_close(condition.embedding, decoder.noise_image_embeds(z_i, noise, 7))
    plain = build_decoder_condition(decoder, z_i, text)
    torch.testing.assert_close(plain.embedding, decoder.noise_image_embeds(z_i))
    predict = build_decoder_predict(decoder, DDIMScheduler(), plain, 1.0)
    x, t = drawn(3, 4, 8, 8), torch.tensor(10)
    torch.testing.assert_close(predict(x, t), decoder(x, t.expand(3), plain))


def test_latents_have_the_published_scale():
    autoencoder, vae = ours()[2], reference().vae
    latents = drawn(2, 4, 8, 8)
    theirs = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(autoencoder.decode(latents), theirs, atol=1e-5, rtol=1e-5)
    pictures = drawn(2, 3, 16, 16).clamp(-1, 1)
    theirs = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(autoencoder.encode(pictures), theirs, atol=1e-5, rtol=1e-5)


def test_a_decoder_and_its_text_encoder_are_the_same_after_saving(tmp_path):
    decoder, encoder, _ = ours()
    decoder.save_pretrained(tmp_path / "decoder")
    encoder.save_pretrained(tmp_path / "text_encoder")
    again = StableUnCLIPDecoder.from_pretrained(tmp_path / "decoder")
    read = type(encoder).from_pretrained(tmp_path / "text_encoder").encode(PROMPTS)
    assert torch.equal(read.states, encoder.encode(PROMPTS).states) and read.mask.all()
    x, t = drawn(3, 4, 8, 8), torch.tensor([5, 6, 7])
    condition = ImageCondition(decoder.noise_image_embeds(drawn(3, EMBED_DIM)), read)
    torch.testing.assert_close(again(x, t, condition), decoder(x, t, condition), atol=1e-6, rtol=1e-5)
    held, kept = again.state_dict(), decoder.state_dict()
    assert held.keys() == kept.keys() and all(torch.equal(held[name], kept[name]) for name in kept)


def test_conditions_are_dropped_in_training_and_statistics_stay():
    decoder, encoder, _ = ours()
    decoder = decoder_of(stable_unclip()).requires_grad_(True)
    decoder.set_null_condition(None, encoder)
    condition = ImageCondition(decoder.noise_image_embeds(drawn(3, EMBED_DIM)), encoder.encode(PROMPTS))
    kept = drop_condition(condition, decoder.null(3), 0.0)
    assert torch.equal(kept.embedding, condition.embedding)
    dropped = drop_condition(condition, decoder.null(3), 1.0)
    x, t = drawn(3, 4, 8, 8), torch.tensor([5, 6, 7])
    torch.testing.assert_close(decoder(x, t, dropped), decoder(x, t, decoder.null(3)), atol=1e-6, rtol=1e-5)
    decoder(x, t, kept).square().mean().backward()
    trained = dict(decoder.named_parameters())
    assert trained and all(name.startswith("unet.") and one.grad is not None for name, one in trained.items())


def test_files_of_older_versions_are_read(tmp_path):
    """transformers 4 put text_model. before a text tower's tensors; diffusers of 2022 named a VAE's attention else."""
    folder = Path(shutil.copytree(stable_unclip(), tmp_path / "model"))
    file = folder / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": one for name, one in load_file(file).items()}
    save_file(old | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    file, names = folder / "vae" / "diffusion_pytorch_model.safetensors", {}
    for name in load_file(file):
        names[name] = re.sub(r"(?<=attentions\.0\.)to_([qkv])\.", lambda found: WORDS[found[1]], name)
        names[name] = names[name].replace("attentions.0.to_out.0.", "attentions.0.proj_attn.")
    assert sum(ours != theirs for ours, theirs in names.items()) == 16  # weights and biases of four, in both halves
    save_file({names[name]: one for name, one in load_file(file).items()}, file)
    encoder = load_caption_encoder(Component(folder / "text_encoder", folder, stem="model"), folder / "tokenizer")
    assert torch.equal(encoder.encode(PROMPTS).states, ours()[1].encode(PROMPTS).states)
    autoencoder = load_latent_autoencoder(Component(folder / "vae", folder))
    latents = drawn(1, 4, 8, 8)
    torch.testing.assert_close(autoencoder.decode(latents), ours()[2].decode(latents), atol=1e-6, rtol=1e-5)


def change(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    ("file", "changed", "said"),
    [
        (
            "unet/config.json",
            {"class_embed_type": None},
            "class_embed_type of .* must be projection for 16 dimensions of z_i, got None",
        ),
        ("unet/config.json", {"out_channels": 8}, "out_channels of .* must be 4 for 16 dimensions of z_i, got 8"),
        ("unet/config.json", {"cross_attention_dim": 32}, "misshapen tensors"),
        (
            "image_normalizer/config.json",
            {"embedding_dim": 20},
            "class_embeddings_input_dim of .* must be 40 for 20 dimensions of z_i, got 32",
        ),
        ("image_noising_scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "from 0 to 100,000"),
    ],
)
def test_parts_that_do_not_fit_are_refused(file, changed, said, tmp_path):
    folder = Path(shutil.copytree(stable_unclip(), tmp_path / "model"))
    change(folder / file, **changed)
    with pytest.raises(InputError, match=said):
        decoder_of(folder)


def test_a_text_encoder_of_another_kind_or_width_is_refused(tmp_path):
    folder = Path(shutil.copytree(stable_unclip(), tmp_path / "model"))
    with pytest.raises(InputError, match=r"\(77, 16\) values, the decoder reads \(77, 24\)"):
        encoder = load_caption_encoder(Component(plain_tower(folder), folder, stem="model"), folder / "tokenizer")
        decoder_of(folder).set_null_condition(None, encoder)
    change(folder / "text_encoder" / "config.json", model_type="t5")
    with pytest.raises(InputError, match="model_type in .* must be one of clip_text_model; got 't5'"):
        load_caption_encoder(Component(folder / "text_encoder", folder, stem="model"), folder / "tokenizer")


def plain_tower(folder: Path) -> Path:
    torch.manual_seed(0)
    CLIPTextModel(tiny_text_tower().config).save_pretrained(folder / "other")
    return folder / "other"


@pytest.mark.parametrize(("embed_dim", "labels"), [(768, 1536), (1024, 2048)])
def test_real_configurations_have_the_published_tensors(embed_dim, labels):
    """Those of stable-diffusion-2-1-unclip-small and stable-diffusion-2-1-unclip: every name and shape, as diffusers'
    and transformers' classes have them; and how many, as the published files have."""
    with torch.device("meta"):
        unet = {**REAL_UNET, "projection_class_embeddings_input_dim": labels}
        decoder = StableUnCLIPDecoder(unet, {"beta_schedule": "squaredcos_cap_v2"}, embed_dim, 4, 96, 1024)
        encoder = TextEncoder("clip_text_model", REAL_TEXT, 77, padded=True)
        autoencoder = Autoencoder(REAL_VAE)
        parts = {"unet.": UNet2DConditionModel(**unet), "normalizer.": StableUnCLIPImageNormalizer(embed_dim)}
        tower, vae = CLIPTextModel(CLIPTextConfig(**REAL_TEXT)), AutoencoderKL(**REAL_VAE)
    assert shapes({"": decoder}) == {**shapes(parts), "null_states": (77, 1024)}
    assert shapes({"": encoder}) == shapes({"net.": tower})
    assert shapes({"": autoencoder}) == {**shapes({"coder.": vae}), "mean": (4,), "std": (4,)}
    sizes = [count(one) for one in (decoder.unet, encoder.net, autoencoder.coder)]
    told = 1280 * (labels + 1 + 1280 + 1)  # two layers make a vector of what stands for a class
    assert sizes == [(690, 865_910_724 + told), (372, 340_387_840), (248, 83_653_863)]


def shapes(models: dict[str, torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(x.shape) for prefix, model in models.items() for name, x in model.state_dict().items()}


def count(model: torch.nn.Module) -> tuple[int, int]:
    return len(model.state_dict()), sum(one.numel() for one in model.state_dict().values())
