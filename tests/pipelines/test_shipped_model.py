"""The models in models/emoji and models/emoji-styles: complete, small, and they draw what they are asked for."""

import json
from pathlib import Path

import pytest
import torch

from t2i import Text2ImagePipeline
from t2i.data.emoji.styles import STYLES
from tests.helpers.stages import seeds

MODELS = Path(__file__).resolve().parents[2] / "models"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = Text2ImagePipeline.from_pretrained(MODELS / "emoji")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ("emoji", "emoji-styles"))
def test_its_folder_is_pinned_and_at_most_48_megabytes(name):
    folder = MODELS / name
    index = json.loads((folder / "model_index.json").read_text())
    assert {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0]} == {
        "_class_name": ["pipeline", "Text2ImagePipeline"],  # for diffusers
        "autoencoder": ["t2i.networks.autoencoder", "Autoencoder"],
        "clip": ["t2i.networks.clip", "CLIP"],
        "decoder": ["t2i.networks.decoder", "Decoder"],
        "decoder_scheduler": ["diffusers", "DDIMScheduler"],
        "prior": ["t2i.networks.prior", "Prior"],
        "prior_scheduler": ["diffusers", "DDIMScheduler"],
    }
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 48_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".py"}
    assert [path.name for path in files if path.suffix == ".py"] == ["pipeline.py"]


@pytest.mark.parametrize(
    ("prompt", "channel"), [("red heart", 0), ("green heart", 1), ("blue heart", 2), ("a red heart", 0)]
)
def test_it_draws_the_colour_it_is_asked_for(pipeline, prompt, channel):
    image = pipeline(prompt, generator=seeds(0), output_type="pt", num_inference_steps=10).images[0]
    assert image.shape == (3, 128, 128)
    assert image[:, :8, :8].min() > 0.9  # on white
    heart = image[:, 40:80, 44:84].mean(dim=(1, 2))
    assert int(heart.argmax()) == channel and heart.max() - heart.median() > 0.15


def test_its_captions_find_their_pictures_by_meaning(pipeline):
    """z_i of the prior is nearer to the caption's own embedding than to another's."""
    prompts = ["grinning face", "red apple", "waving hand: dark skin tone"]
    z_i = pipeline(prompts, generator=seeds(0, 1, 2), output_type="latent", num_inference_steps=1).image_embeds
    with torch.no_grad():
        z_t = pipeline.clip.encode_text(prompts).embedding
    assert (z_i @ z_t.T).argmax(dim=1).tolist() == [0, 1, 2]


def test_the_model_of_six_styles_draws_an_apple_in_each():
    pipeline = Text2ImagePipeline.from_pretrained(MODELS / "emoji-styles")
    pipeline.set_progress_bar_config(disable=True)
    styles = [style.word for style in STYLES.values()]
    prompts = ["red apple", *(f"red apple, {style}" for style in styles)]
    images = pipeline(prompts, generator=seeds(*range(6)), output_type="pt").images
    redness = (images[:, 0] - images[:, 1:].mean(dim=1))[:, 50:90, 40:90].mean(dim=(1, 2))
    assert redness[1 + styles.index("outline")].abs() < 0.05  # black on white
    assert sorted(redness)[1] > 0.4
    # No two alike
    assert min((a - b).square().mean() for i, a in enumerate(images) for b in images[:i]) > 0.01
