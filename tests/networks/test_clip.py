"""CLIP: our text encoding is open_clip's, folders carry an identity, vocabularies round-trip."""

import json
import math
import re
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i.errors import InputError
from t2i.interop.by_name import load_autoencoder, load_clip
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.tokenizer import CaptionTokenizer
from tests.helpers.models import MODELS
from tests.helpers.stages import train

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 400, "width": 24, "heads": 2, "layers": 2}
PREPROCESS = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
CAPTIONS = ["a red circle", "green square: dark, on white", "cat"]


def make(**text) -> CLIP:
    torch.manual_seed(0)
    tokenizer = CaptionTokenizer.train(CAPTIONS, 300, 12)
    sizes = {**TEXT, "vocab_size": tokenizer.vocab_size, **text}
    clip = CLIP({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": sizes}, PREPROCESS).eval()
    clip.tokenizer = tokenizer
    return clip


@pytest.mark.parametrize("pooling", ["argmax", "eos"])
def test_our_text_encoding_equals_open_clips(pooling):
    clip = make()
    clip = make(pool_type=pooling, eos_id=clip.tokenizer.end)
    encoding = clip.encode_text(CAPTIONS)
    tokens = clip.tokenizer(CAPTIONS)
    torch.testing.assert_close(encoding.embedding, clip.net.encode_text(tokens, normalize=True), atol=1e-6, rtol=1e-5)
    states = []
    hook = clip.net.ln_final.register_forward_hook(lambda _, __, out: states.append(out))
    clip.net.encode_text(tokens)
    hook.remove()
    torch.testing.assert_close(encoding.states, states[0][:, : encoding.states.shape[1]], atol=1e-5, rtol=1e-5)
    assert encoding.mask.sum(dim=1).tolist() == (tokens != 0).sum(dim=1).tolist()
    assert encoding.states.shape[1] == encoding.mask.sum(dim=1).max()


def test_a_caption_encodes_the_same_alone_and_beside_longer_ones():
    clip = make()
    together, alone = clip.encode_text(CAPTIONS), clip.encode_text(CAPTIONS[2:])
    length = alone.mask.shape[1]
    torch.testing.assert_close(together.embedding[2:], alone.embedding, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together.states[2:, :length], alone.states, atol=1e-5, rtol=1e-5)


def test_towers_that_see_padding_encode_as_in_open_clip():
    custom = {**TEXT, "no_causal_mask": True, "pool_type": "last"}
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": custom, "custom_text": True}
    clip, tokens = CLIP(config, PREPROCESS).eval(), torch.randint(1, 300, (2, 12))
    encoding = clip.encode_tokens(tokens)
    assert encoding.states.shape == (2, 12, 24)
    expected = torch.nn.functional.normalize(clip.net.text(tokens)[0], dim=-1)
    torch.testing.assert_close(encoding.embedding, expected)


def test_pictures_are_preprocessed_as_the_model_wants():
    clip, image = make(), torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = clip.net.encode_image(((image + 1) / 2 - mean) / std, normalize=True)
    torch.testing.assert_close(clip.encode_image(image), expected)
    assert clip.encode_image(torch.rand(1, 3, 50, 80)).shape == (1, 16)


@pytest.mark.parametrize("kind", ["clip", "transformers clip"])
def test_what_is_no_image_in_floats_is_refused(kind):
    clip = MODELS[kind].build()
    for image, got in (
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "(1, 3, 16, 16) of torch.uint8"),
        (torch.zeros(3, 16, 16), "(3, 16, 16) of torch.float32"),
        (torch.zeros(1, 4, 16, 16), "(1, 4, 16, 16) of torch.float32"),
        ("a.png", "str"),
    ):
        with pytest.raises(InputError, match=re.escape(f"floats in [-1, 1], (B, 3, H, W), got {got}")):
            clip.encode_image(image)
    assert clip.encode_image(torch.zeros(2, 3, 16, 16)).shape == (2, clip.embed_dim)


def test_a_folder_keeps_weights_vocabulary_and_identity_also_in_half_precision(tmp_path):
    clip = make()
    identity = clip.compute_fingerprint()
    clip.save_pretrained(tmp_path / "full")
    clip.half().save_pretrained(tmp_path / "half")
    for name in ("full", "half"):
        loaded = load_clip(tmp_path / name)
        assert loaded.identity == identity == loaded.compute_fingerprint()
        assert loaded.tokenizer(CAPTIONS).equal(clip.tokenizer(CAPTIONS))
    full = load_clip(tmp_path / "full")
    assert full.dtype == torch.float32
    torch.testing.assert_close(full.encode_text(CAPTIONS).embedding, make().encode_text(CAPTIONS).embedding)


def test_weights_that_are_not_those_of_the_fingerprint_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["net.token_embedding.weight"][0] += 1
    save_file(weights, path)
    with pytest.raises(InputError, match="are not those of fingerprint"):
        load_clip(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no tokenizer", "another class", "a tensor less", "pickle"])
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, damage):
    make().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "a tensor less":
        tensors = load_file(weights)
        del tensors["net.ln_final.weight"]
        save_file(tensors, weights)
    elif damage == "pickle":
        torch.save(load_file(weights), tmp_path / "diffusion_pytorch_model.bin")
        weights.unlink()
    elif damage == "no tokenizer":
        (tmp_path / "tokenizer.json").unlink()
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "Prior"}))
    with pytest.raises(InputError, match=str(tmp_path)) as caught:
        load_clip(tmp_path)
    assert "\n" not in str(caught.value)


def local_dir(folder, model) -> str:
    config = {"model_cfg": model, "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}
    net = open_clip.CLIP(**model)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def test_a_public_pair_loads_from_a_local_folder_and_is_saved_as_ours(tmp_path):
    text = {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1}
    name = local_dir(tmp_path / "public", {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text})
    clip = load_clip(name).eval()
    assert clip.embed_dim == 16 and clip.size == 32 and clip.context_length == 16
    expected = open_clip.create_model(name).eval().encode_text(open_clip.get_tokenizer(name)(CAPTIONS), normalize=True)
    torch.testing.assert_close(clip.encode_text(CAPTIONS).embedding, expected, atol=1e-6, rtol=1e-5)
    clip.save_pretrained(tmp_path / "ours")
    again = load_clip(tmp_path / "ours")
    torch.testing.assert_close(again.encode_text(CAPTIONS).embedding, expected, atol=1e-6, rtol=1e-5)


def test_bfloat16_folders_keep_their_identity(tmp_path):
    clip = make()
    clip.save_pretrained(tmp_path / "full")
    clip.bfloat16().save_pretrained(tmp_path / "half")
    assert load_clip(tmp_path / "half").identity == load_clip(tmp_path / "full").identity


def test_an_export_in_mid_training_does_not_fix_the_identity(tmp_path):
    clip = make()
    clip.save_pretrained(tmp_path / "early")
    clip.net.token_embedding.weight.data += 1
    clip.save_pretrained(tmp_path / "late")
    assert load_clip(tmp_path / "late").identity != load_clip(tmp_path / "early").identity


def test_the_quickgelu_mismatch_is_an_error_and_unknown_names_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="'ViT-B-32-quickgelu'"):
            load_clip("ViT-B-32:openai")
    with pytest.raises(InputError, match="no weights 'nonsense'"):
        load_clip("ViT-B-32:nonsense")
    with pytest.raises(InputError, match="open_clip has no model"):
        load_clip("ViT-Z-99:openai")


def test_the_vocabulary_encodes_any_text_and_says_what_it_cut():
    tokenizer = CaptionTokenizer.train(CAPTIONS, 300, 12)
    tokens = tokenizer(["A RED circle", "a red circle", "<end> 猫 ‍", ""])
    assert tokens[0].equal(tokens[1])
    assert tokens.dtype == torch.int64 and tokens.shape == (4, 12)
    assert tokens[3].tolist() == [1, tokenizer.end] + [0] * 10
    assert (tokens[2] == tokenizer.end).sum() == 1  # the special token's text is text
    assert tokens.max() == tokenizer.end == tokenizer.vocab_size - 1
    assert tokenizer.find_truncated_text("a red circle") == ""
    long = "a red circle " * 20
    assert long.strip().endswith(tokenizer.find_truncated_text(long)) and len(tokenizer.find_truncated_text(long)) > 150


def test_latents_have_unit_variance_and_decode_to_what_was_encoded():
    torch.manual_seed(0)
    vae = {"latent_channels": 4, "block_out_channels": [16, 16], "norm_num_groups": 8}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    autoencoder = Autoencoder(vae | blocks, patch_size=2).eval()
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    raw = autoencoder.decode(autoencoder.encode(images))
    autoencoder.set_latent_statistics([images[:4], images[4:]])
    latents = autoencoder.encode(images)
    assert latents.shape == (8, 4, 8, 8) and autoencoder.factor == 4
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(autoencoder.decode(latents), raw, atol=1e-4, rtol=1e-4)


def test_a_pretrained_diffusers_vae_loads_with_its_scale(tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=[32], latent_channels=4, scaling_factor=0.5).eval()
    vae.save_pretrained(tmp_path)
    ours, image = load_autoencoder(tmp_path).eval(), torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(ours.encode(image), vae.encode(image).latent_dist.mode() * 0.5)
    latents = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(ours.decode(latents), vae.decode(latents / 0.5).sample)


def test_the_scale_of_the_logits_is_bounded_as_a_weight_and_in_use():
    clip = make()
    scale = clip.net.logit_scale
    with torch.no_grad():
        scale.fill_(6.0)
    assert clip.compute_logit_scale().item() == pytest.approx(100)
    clip.bound_logit_scale()
    assert scale.item() == pytest.approx(math.log(100))
    clip.compute_logit_scale().backward()
    assert scale.grad.item() == pytest.approx(100)  # at the bound it may still fall


def test_a_trained_clip_stores_a_bounded_scale(shapes, tmp_path):
    """open_clip reads the weight, without a bound."""
    train("clip", shapes, tmp_path, 2, **{"model.init_logit_scale": 6.0})
    assert load_clip(tmp_path / "clip").net.logit_scale.item() <= math.log(100) + 1e-6


def test_a_clip_of_a_configuration_alone_is_saved_without_a_vocabulary_and_says_so_when_it_needs_one(tmp_path):
    make().save_pretrained(tmp_path / "whole")
    clip = CLIP.from_config(CLIP.load_config(tmp_path / "whole"))
    clip.save_pretrained(tmp_path / "bare")
    loaded, image = load_clip(tmp_path / "bare"), torch.zeros(1, 3, 32, 32)
    assert loaded.encode_image(image).equal(clip.eval().encode_image(image))
    with pytest.raises(InputError, match="has no tokenizer; assign one"):
        loaded.encode_text(["a cat"])
    loaded.tokenizer = make().tokenizer
    expected = loaded.encode_text(CAPTIONS).embedding
    loaded.save_pretrained(tmp_path / "whole")
    whole = load_clip(tmp_path / "whole")
    assert whole.encode_text(CAPTIONS).embedding.equal(expected) and whole.identity == whole.compute_fingerprint()


def test_open_clips_own_vocabulary_needs_no_file():
    sizes = {**TEXT, "vocab_size": 49408, "context_length": 12}
    clip = CLIP({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": sizes}, PREPROCESS, "clip").eval()
    assert clip.encode_text(["a cat"]).mask.sum() == 4
