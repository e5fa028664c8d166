"""Stable unCLIP's folders: what loads, alone and with Karlo's prior, what every pipeline does with it, and what not."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from t2i.pipelines.image_to_image import ImageToImagePipeline
from t2i.pipelines.image_variation import ImageVariationPipeline
from t2i.pipelines.inpaint import InpaintPipeline, OutpaintPipeline
from t2i.pipelines.interpolation import InterpolationPipeline
from t2i.pipelines.text2image import Text2ImagePipeline
from t2i.pipelines.text_diff import TextDiffPipeline
from torch import Generator, Tensor

from t2i.errors import InputError
from tests.helpers.stable_unclip_folders import stable_unclip, stable_unclip_images, stable_unclip_small

QUICK = {"num_inference_steps": 2, "output_type": "pt"}
MODELS = ("clip", "prior", "decoder", "autoencoder", "text_encoder")
PRIOR = {"prior_num_inference_steps": 2}


def loaded(folder: Path, kind: type = Text2ImagePipeline, **more: object):
    pipeline = kind.from_pretrained(folder, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, **more: object) -> Tensor:
    return pipeline("a red cat", generator=Generator().manual_seed(1), noise_level=9, **QUICK, **PRIOR, **more).images


def picture(side: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def test_both_folders_of_the_small_variant_are_one_model():
    both = loaded(stable_unclip_small(), prior=str(stable_unclip()))
    torch.testing.assert_close(drawn(both), drawn(loaded(stable_unclip())), atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_it_draws_the_same(tmp_path):
    for folder, kind, given in (
        (stable_unclip(), Text2ImagePipeline, "a cat"),
        (stable_unclip_images(), ImageVariationPipeline, picture()),
    ):
        pipeline = loaded(folder, kind)
        pipeline.save_pretrained(tmp_path / kind.__name__)
        again = loaded(tmp_path / kind.__name__, kind)
        more = PRIOR if kind is Text2ImagePipeline else {}
        first, second = (one(given, generator=Generator().manual_seed(3), **QUICK, **more) for one in (pipeline, again))
        torch.testing.assert_close(first.images, second.images, atol=1e-5, rtol=1e-5)


def test_every_pipeline_draws_with_both_folders():
    text2image = loaded(stable_unclip_small(), prior=str(stable_unclip()))
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9] = 255
    steps = {"num_inference_steps": 2}
    for kind, given, count in (
        (ImageVariationPipeline, {"image": picture(), "prompt": "a dog"}, 1),
        (ImageVariationPipeline, {"image": picture(), "eta": 0.0}, 1),
        (ImageToImagePipeline, {"image": picture(), "strength": 0.6}, 1),
        (ImageToImagePipeline, {"image": picture(), "prompt": "a dog", "negative_prompt": "red"}, 1),
        (InpaintPipeline, {"image": picture(24), "mask_image": np.pad(mask, 4), "prompt": "a dog"}, 1),
        (OutpaintPipeline, {"image": picture(), "left": 8}, 1),
        (InterpolationPipeline, {"anchors": ["a cat", picture()], "frames": 3}, 3),
        (TextDiffPipeline, {"image": picture(), "source": "a cat", "target": "a dog"}, 1),
    ):
        images = kind.from_pipe(text2image)(**given, **steps).images
        assert len(images) == count and all(isinstance(image, Image.Image) for image in images), kind
    best = text2image("a cat", negative_prompt="a dog", decoder_negative_prompt="red", prior_candidates=3, **steps)
    assert best.images[0].size == (16, 16)


def test_half_precision_is_read_as_such():
    pipeline = loaded(stable_unclip(), torch_dtype=torch.float16)
    assert {name: pipeline.components[name].dtype for name in MODELS} == dict.fromkeys(MODELS, torch.float16)
    assert drawn(pipeline).isfinite().all()


def test_weights_that_are_only_there_while_they_are_needed_change_nothing():
    """As with sequential offload: between the calls they are on no device."""
    pipeline = loaded(stable_unclip())
    expected = drawn(pipeline)
    parts = {name: copy.deepcopy(pipeline.components[name]) for name in MODELS}
    for part in parts.values():
        cpu_offload(part, torch.device("cpu"))
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}
    torch.testing.assert_close(drawn(type(pipeline).from_pipe(pipeline, **parts)), expected, atol=1e-5, rtol=1e-5)


def test_what_a_folder_lacks_is_named(tmp_path):
    with pytest.raises(InputError, match="this model has no prior and no text encoder of its CLIP"):
        loaded(stable_unclip_images())("a red cat")
    with pytest.raises(InputError, match="no image encoder in the folder"):
        loaded(stable_unclip(), ImageVariationPipeline)(picture())
    with pytest.raises(InputError, match="reads embeddings of 20 dimensions, .* of 16; they were not trained together"):
        loaded(stable_unclip_images(), prior=str(stable_unclip()))
    folder = Path(shutil.copytree(stable_unclip_images(), tmp_path / "model"))
    shutil.rmtree(folder / "image_normalizer")
    with pytest.raises(InputError, match="lacks the folder 'image_normalizer'"):
        loaded(folder)


@pytest.mark.parametrize("change", ["text_encoder", "image_normalizer", "vae"])
def test_weights_that_do_not_fit_their_configuration_are_refused(change, tmp_path):
    folder = Path(shutil.copytree(stable_unclip_images(), tmp_path / "model"))
    path = folder / change / "config.json"
    key = {"text_encoder": "hidden_size", "image_normalizer": "embedding_dim", "vae": "latent_channels"}[change]
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: 2 * config[key]}))
    with pytest.raises(InputError) as said:
        loaded(folder)
    assert change in str(said.value) or "embedding" in str(said.value)
    assert "\n" not in str(said.value)
