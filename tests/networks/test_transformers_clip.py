"""The CLIP towers of public folders: as transformers computes them, trimmed, checked, saved and loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from t2i.pipelines.inputs import read_given_images
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers import CLIPTokenizer as Theirs

from t2i.errors import InputError
from t2i.files.component import Component
from t2i.networks.public.clip_tokenizer import CLIPTokenizer
from t2i.networks.public.transformers_clip import TransformersCLIP, read_preprocess_config
from tests.helpers.public_folders import (
    built,
    clip_vocabulary,
    save_parts,
    save_tokenizer,
    tiny_image_processor,
    tiny_image_tower,
    tiny_text_tower,
    tiny_tokenizer,
)

CAPTIONS = ["a cat", "", "two red dogs and a cat", "dog! " * 60]


def towers(folder: Path, pad: str = "!", old: bool = False) -> None:
    save_parts(
        folder,
        "AnyPipeline",
        text_encoder=("transformers", tiny_text_tower(old=old)),
        tokenizer=("transformers", tiny_tokenizer(pad)),
        image_encoder=("transformers", tiny_image_tower()),
        image_processor=("transformers", tiny_image_processor()),
    )


@built
def clip_folder(folder: Path) -> None:
    towers(folder)


def load(folder: Path, dtype: torch.dtype | None = None, images: bool = True, texts: bool = True) -> TransformersCLIP:
    text = Component(folder / "text_encoder", folder, stem="model") if texts else None
    vision = Component(folder / "image_encoder", folder, stem="model") if images else None
    settings = (folder / "tokenizer", vision, folder / "image_processor", dtype)
    return TransformersCLIP.from_components(text, *settings)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize(("pad", "old"), [("!", True), ("!", False), ("<|endoftext|>", True), ("<|endoftext|>", False)])
def test_captions_of_mixed_lengths_are_encoded_as_transformers_encodes_them(
    tmp_path: Path, pad: str, old: bool
) -> None:
    towers(tmp_path / "public", pad, old)
    clip = load(tmp_path / "public")
    captions = [caption.replace("!", ",") for caption in CAPTIONS]  # transformers takes "!" for padding
    inputs = tiny_tokenizer(pad)(captions, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = tiny_text_tower(old=old)(input_ids=inputs.input_ids)
    text = clip.encode_text(captions)

    assert (clip.tokenizer(captions) == inputs.input_ids).all()
    length = int(inputs.attention_mask.sum(dim=1).max())
    assert text.states.shape[1] == length == 77
    assert (text.mask == inputs.attention_mask.bool()).all()
    torch.testing.assert_close(text.embedding, theirs.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(text.states, theirs.last_hidden_state, atol=1e-6, rtol=0)

    short = clip.encode_text(captions[:2])
    assert short.states.shape[1] == 4  # start, "a", "cat", end
    torch.testing.assert_close(short.embedding, theirs.text_embeds[:2], atol=1e-6, rtol=0)
    torch.testing.assert_close(short.states, theirs.last_hidden_state[:2, :4], atol=1e-6, rtol=0)


def test_letters_are_composed_as_transformers_composes_them() -> None:
    """An accent after its letter, Korean's single sounds and the sign of a unit are written as one letter first."""
    captions = ["cafe\u0301 dog", "\u1100\u1161\u11a8", "A\u030a \u212b"]
    theirs = tiny_tokenizer()(captions, padding="max_length", return_tensors="pt").input_ids
    ours = load(clip_folder()).tokenizer
    assert (ours(captions) == theirs).all()
    assert (ours(["cafe\u0301"]) == ours(["caf\u00e9"])).all()


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("pads", [("<|endoftext|>", "!"), ("!", "<|endoftext|>"), (None, "!"), ("!", None)])
def test_what_pads_is_what_transformers_takes_of_two_files(pads: tuple, newer: bool, tmp_path: Path) -> None:
    """Stable Diffusion 2's tokenizer_config.json names another token than its special_tokens_map.json."""
    save_tokenizer(tiny_tokenizer(), tmp_path / "tokenizer")
    for name, pad in zip(("tokenizer_config.json", "special_tokens_map.json"), pads):
        path = tmp_path / "tokenizer" / name
        content = {key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token"}
        content |= {} if pad is None else {"pad_token": pad}
        content |= {"added_tokens_decoder": {}} if newer and name == "tokenizer_config.json" else {}
        path.write_text(json.dumps(content))
    theirs = Theirs.from_pretrained(tmp_path / "tokenizer")
    assert CLIPTokenizer.from_folder(tmp_path / "tokenizer", 77, 1000).pad == theirs.pad_token_id


def test_an_exclamation_mark_is_text_though_it_is_the_padding() -> None:
    """transformers' tokenizer makes it the padding's token, 0; the tokenizers that the models were trained with did not
    know that token, and it ended a word."""
    clip = load(clip_folder())
    ours, theirs = clip.tokenizer(["cat!"])[0], tiny_tokenizer("!")(["cat!"])["input_ids"][0]
    assert ours[2] == clip_vocabulary()["!</w>"]
    assert theirs[2] == clip_vocabulary()["!"] == 0
    assert clip.tokenizer(["<|endoftext|> cat"])[0, 1] != clip.tokenizer.end


def test_what_does_not_fit_is_cut_and_told() -> None:
    tokenizer = load(clip_folder()).tokenizer
    assert tokenizer.find_truncated_text("a red dog") == ""
    assert tokenizer.find_truncated_text("dog " * 74 + "red cat Dog") == "cat Dog"
    assert tokenizer(["dog " * 100]).shape == (1, 77)


def test_pictures_are_made_ready_and_encoded_as_transformers_does() -> None:
    clip, tower = load(clip_folder()), tiny_image_tower()
    pixels = (noise(2, 3, 40, 29) * 127.5 + 127.5).round().to(torch.uint8)
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    theirs = tiny_image_processor()(pictures, return_tensors="pt").pixel_values
    image = pixels.float() / 127.5 - 1
    torch.testing.assert_close(clip.preprocess(image), theirs, atol=1e-5, rtol=0)
    with torch.no_grad():
        expected = tower(pixel_values=theirs).image_embeds
        torch.testing.assert_close(clip.encode_image(image), expected, atol=1e-5, rtol=0)
        zero = tower(pixel_values=torch.zeros(1, 3, 16, 16)).image_embeds
    torch.testing.assert_close(clip.encode_zero_image(), zero, atol=1e-6, rtol=0)
    assert not clip.unit_length and (expected.norm(dim=-1) - 1).abs().min() > 0.01  # as they are


@pytest.mark.parametrize("side", [16, 20, None])
def test_a_picture_of_any_size_is_resized_once_before_clip_sees_it(side: int | None) -> None:
    """Not to the decoder's size first: transformers' processor takes the image as it was given."""
    clip, tower = load(clip_folder()), tiny_image_tower()
    clip.register_to_config(preprocess={**clip.config.preprocess, "resize": side and [side]})
    pixels = (noise(90, 131, 3) * 127.5 + 127.5).round().to(torch.uint8).numpy()
    steps = {"do_resize": False} if side is None else {"size": {"shortest_edge": side}}
    theirs = tiny_image_processor()(Image.fromarray(pixels), return_tensors="pt", **steps).pixel_values
    for form in (Image.fromarray(pixels), pixels):
        given = read_given_images(form, 40, clip)
        assert given.pixels.shape == (1, 3, 40, 40)
        torch.testing.assert_close(clip.preprocess(given.seen), theirs, atol=0.03, rtol=0)  # one level of 255 is 0.015
    with torch.no_grad():
        z_i = tower(pixel_values=theirs).image_embeds
        once, twice = ((clip.encode_image(image) - z_i).abs().max() for image in (given.seen, given.pixels))
        assert once < 0.1 * twice


def test_a_picture_s_gradient_comes_through_the_resizing() -> None:
    clip, image = load(clip_folder()), noise(1, 3, 24, 24).requires_grad_()
    clip.encode_image(image).sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 16, "crop_size": 16, "resample": 2},
        {"size": {"height": 16, "width": 16}, "do_center_crop": False},
        {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}, "do_normalize": False},
        {"size": {"shortest_edge": 12}, "crop_size": {"height": 16, "width": 16}},
        {"size": {"shortest_edge": 13}, "crop_size": {"height": 16, "width": 16}},  # one row above, two below
        {"size": {"shortest_edge": 7}, "crop_size": {"height": 16, "width": 16}},  # a frame
        {
            "do_resize": False,
            "crop_size": {"height": 16, "width": 16},
            "image_mean": [0.5] * 3,
            "image_std": [0.25] * 3,
        },
    ],
)
def test_the_image_processor_s_settings_are_those_of_its_file(tmp_path: Path, settings: dict) -> None:
    from transformers import CLIPImageProcessor

    shutil.copytree(clip_folder(), tmp_path / "public")
    (tmp_path / "public" / "image_processor" / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = (noise(3, 21, 34) * 127.5 + 127.5).round().to(torch.uint8)
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "public" / "image_processor")
    theirs = processor(pixels, return_tensors="pt").pixel_values
    ours = load(tmp_path / "public").preprocess(pixels[None].float() / 127.5 - 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 16, "crop_size": 20}, "the image encoder takes 16"),
        ({"size": 16, "do_center_crop": False}, "the image encoder takes 16"),
        ({"size": 16, "crop_size": 16, "resample": 0}, "bicubic or bilinear"),
        ({"size": 16, "crop_size": 16, "do_rescale": False}, "values / 255"),
        ({"size": 16, "crop_size": 16, "image_std": [1, 1, 0]}, "means and deviations"),
        ({"size": 16, "crop_size": 16, "auto_map": {}}, "auto_map"),
    ],
)
def test_an_image_processor_of_another_kind_is_refused(tmp_path: Path, settings: dict, said: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=said):
        read_preprocess_config(tmp_path, 16)


def test_weights_of_16_bits_stay_so_and_the_fingerprint_is_the_same(tmp_path: Path) -> None:
    exact, half = load(clip_folder()), load(clip_folder(), torch.float16)
    assert {value.dtype for value in half.state_dict().values()} == {torch.float16}
    assert half.compute_fingerprint() == exact.compute_fingerprint() == half.identity
    half.save_pretrained(tmp_path)
    again = TransformersCLIP.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert again.dtype == torch.float16 and again.identity == half.identity
    assert again.config.fingerprint == half.compute_fingerprint()
    text, image = again.encode_text(["a cat"]), again.encode_image(noise(1, 3, 20, 20).half())
    assert text.states.dtype == image.dtype == torch.float16
    torch.testing.assert_close(text.embedding.float(), exact.encode_text(["a cat"]).embedding, atol=0.01, rtol=0.01)


def test_a_clip_is_saved_and_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    clip = load(clip_folder())
    clip.save_pretrained(tmp_path)
    again = TransformersCLIP.from_pretrained(tmp_path)
    assert (again.tokenizer(CAPTIONS) == clip.tokenizer(CAPTIONS)).all()
    torch.testing.assert_close(again.encode_text(CAPTIONS).states, clip.encode_text(CAPTIONS).states)
    torch.testing.assert_close(again.preprocess(noise(1, 3, 20, 30)), clip.preprocess(noise(1, 3, 20, 30)))
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    found = theirs(CAPTIONS[:3], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert (found == clip.tokenizer(CAPTIONS[:3])).all()
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace(clip.identity, "0" * 16))
    with pytest.raises(InputError, match="are not those of fingerprint"):
        TransformersCLIP.from_pretrained(tmp_path)


def test_one_tower_is_enough_and_the_other_is_named_when_it_is_missed(tmp_path: Path) -> None:
    blind, mute = load(clip_folder(), images=False), load(clip_folder(), texts=False)
    with pytest.raises(InputError, match="no image encoder in the folder"):
        blind.encode_image(noise(1, 3, 16, 16))
    with pytest.raises(InputError, match="no image encoder in the folder"):
        blind.encode_zero_image()
    with pytest.raises(InputError, match="no text encoder in the folder"):
        mute.encode_text(["a cat"])
    with pytest.raises(InputError, match="no text encoder in the folder"):
        _ = mute.context_length
    with pytest.raises(InputError, match="no text encoder in the folder"):
        mute.tokenizer(["a cat"])
    assert blind.embed_dim == mute.embed_dim == 16
    mute.save_pretrained(tmp_path)
    assert TransformersCLIP.from_pretrained(tmp_path).image_encoder is not None
    with pytest.raises(InputError, match="no text encoder and no image encoder"):
        TransformersCLIP.from_components()


def change(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    ("file", "changed", "said"),
    [
        ("text_encoder/config.json", {"model_type": "bert"}, "must be one of clip_text_model"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act"),
        ("text_encoder/config.json", {"eos_token_id": 7}, "the text encoder takes 7"),
        ("text_encoder/config.json", {"hidden_size": "16"}, "must be an integer"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "lacks tensors"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
        ("image_encoder/config.json", {"projection_dim": 12}, "not of one CLIP|misshapen"),
        ("tokenizer/vocab.json", {"cat</w>": 90000}, "has a token 90000"),
        ("tokenizer/vocab.json", {"cat</w>": "9"}, "no vocabulary"),
        ("tokenizer/special_tokens_map.json", {"pad_token": "?!"}, "lacks the token '[?]!'"),
        ("tokenizer/tokenizer_config.json", {"auto_map": {}}, "auto_map"),
    ],
)
def test_files_that_make_no_clip_are_refused_in_one_line(tmp_path: Path, file: str, changed: dict, said: str) -> None:
    shutil.copytree(clip_folder(), tmp_path / "public")
    if file.endswith("special_tokens_map.json"):
        (tmp_path / "public" / "tokenizer" / "tokenizer_config.json").unlink()
    change(tmp_path / "public" / file, **changed)
    with pytest.raises(InputError, match=said) as found:
        load(tmp_path / "public")
    assert "\n" not in str(found.value)


def test_a_tokenizer_without_its_merges_is_refused(tmp_path: Path) -> None:
    shutil.copytree(clip_folder(), tmp_path / "public")
    (tmp_path / "public" / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(InputError, match="merges.txt"):
        load(tmp_path / "public")


def test_pictures_are_searched_and_measured_by_a_public_clip(tmp_path: Path) -> None:
    from t2i.evaluation.features import CLIPFeatures
    from t2i.evaluation.retrieval import classify_image_embeds, embed_image_files, open_image_index, search_image_index

    clip, pixels = load(clip_folder()), (noise(3, 16, 16, 3) * 127.5 + 127.5).round().to(torch.uint8)
    for i, one in enumerate(pixels):
        Image.fromarray(one.numpy()).save(tmp_path / f"{i}.png")
    image = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = clip.encode_image(image)
    torch.testing.assert_close(CLIPFeatures(clip)(image), expected, atol=1e-5, rtol=0)
    found = embed_image_files(clip, sorted(tmp_path.glob("*.png")))
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=0)
    index = open_image_index(clip, tmp_path)
    assert search_image_index(clip, index, None, tmp_path / "1.png", 1)[0][0] == "1.png"
    assert len(search_image_index(clip, index, "a cat", None, 2)) == 2
    with pytest.raises(InputError, match="has no logit scale"):
        classify_image_embeds(clip, found, ["cat", "dog"])


def test_files_of_the_hub_s_cache_are_links_to_its_blobs_and_no_others_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--a-model"
    folder, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    shutil.copytree(clip_folder(), folder)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert load(folder).identity == load(clip_folder()).identity
    alone = Component(folder / "image_encoder", folder, stem="model")
    assert TransformersCLIP.from_components(vision=alone, processor=folder / "image_processor").size == 16

    outside = tmp_path / "elsewhere.json"
    shutil.copy(folder / "image_processor" / "preprocessor_config.json", outside)
    (folder / "image_processor" / "preprocessor_config.json").unlink()
    (folder / "image_processor" / "preprocessor_config.json").symlink_to(outside)
    with pytest.raises(InputError, match="is a link out of"):
        load(folder)


# Text and image towers of Karlo and Kandinsky 2.1 (ViT-L), of Kandinsky 2.2 (ViT-bigG), and of Stable unCLIP's
# variations (ViT-H), which have no text tower.
TOWERS: dict[str, tuple] = {
    "ViT-L": ((768, 12, 12, 3072), (1024, 24, 16, 4096), 768, "quick_gelu"),
    "ViT-bigG": ((1280, 32, 20, 5120), (1664, 48, 16, 8192), 1280, "gelu"),
    "ViT-H": (None, (1280, 32, 16, 5120), 1024, "gelu"),
}


@pytest.mark.parametrize("name", TOWERS)
def test_the_published_towers_have_transformers_names_and_shapes(name: str) -> None:
    text, image, dim, activation = TOWERS[name]
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    shared = {"projection_dim": dim, "hidden_act": activation, "layer_norm_eps": 1e-5}
    words = shared | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
    pixels = shared | {"num_channels": 3, "image_size": 224, "patch_size": 14}
    configs = {"vision": dict(zip(keys, image)) | pixels}
    if text is not None:
        configs["text"] = dict(zip(keys, text)) | words
    with torch.device("meta"):
        clip = TransformersCLIP(**configs)
        towers = {"image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**configs["vision"]))}
        if text is not None:
            towers["text_encoder"] = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text"]))
    expected = {
        f"{place}.{key}": one.shape for place, tower in towers.items() for key, one in tower.state_dict().items()
    }
    assert {key: one.shape for key, one in clip.state_dict().items()} == expected
    assert expected["image_encoder.visual_projection.weight"] == (dim, image[0])
    assert (clip.embed_dim, clip.size, clip.reads_captions) == (dim, 224, text is not None)
    layers, others = image[1], 8
    if text is not None:
        assert expected["text_encoder.text_projection.weight"] == (dim, text[0])
        assert (clip.text_width, clip.context_length) == (text[0], 77)
        layers, others = layers + text[1], others + 5
    assert len(expected) == 16 * layers + others  # two norms, four projections, an MLP's two layers; all with biases
