"""Pipelines that start from images draw every shape that text-to-image draws."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from t2i.pipelines import (
    BipartiteLatent,
    ImageToImagePipeline,
    ImageVariationPipeline,
    InterpolationPipeline,
    TextDiffPipeline,
)
from t2i.pipelines.inputs import read_given_images, read_images

from t2i import InputError, Text2ImagePipeline, cli
from t2i.data.framing import cut_image
from t2i.data.pictures import Resizing
from tests.helpers.stages import seeds

QUICK = {"num_inference_steps": 8, "output_type": "latent"}
REDRAWN: dict[str, Any] = {"prior_num_inference_steps": 2, "num_inference_steps": 10}
WIDE = {"height": 32, "width": 48}
FORMS = [lambda one: one, np.asarray, lambda one: torch.from_numpy(np.array(one)).movedim(-1, 0)]


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def redraw(pipeline: Text2ImagePipeline) -> ImageToImagePipeline:
    return ImageToImagePipeline.from_pipe(pipeline)


@pytest.fixture
def vary(pipeline: Text2ImagePipeline) -> ImageVariationPipeline:
    return ImageVariationPipeline.from_pipe(pipeline)


@pytest.mark.parametrize("form", FORMS, ids=["pil", "array", "tensor"])
def test_an_image_of_the_shape_keeps_its_values(form):
    expected = torch.from_numpy(np.array(picture())).movedim(-1, 0)[None] / 127.5 - 1
    torch.testing.assert_close(read_images(form(picture()), (32, 48)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(48, 48), (100, 40), (40, 100), (7, 9)])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (32, 32)])
def test_images_are_cut_to_a_shape_as_training_cuts_them(size, shape):
    assert torch.equal(read_images(picture(*size), shape)[0], cut_image(picture(*size), shape))


def test_clip_sees_the_image_as_it_was_given(vary):
    given = read_given_images(picture(100, 40), (32, 48), vary.clip)
    assert given.pixels.shape == (1, 3, 32, 48)
    assert torch.equal(given.seen, read_images(picture(100, 40), Resizing.for_clip(vary.clip)))


def test_image_to_image_draws_the_shape_that_is_asked_for(redraw):
    for shape in ((32, 48), (48, 32), (32, 32)):
        sides = dict(zip(("height", "width"), shape, strict=True))
        [drawn] = redraw(picture(50, 40), generator=seeds(1), **sides, **REDRAWN).images
        assert drawn.size == shape[::-1]
    start = redraw.encode_latents(read_images(picture()))
    near = redraw(picture(), strength=0.1, generator=seeds(1), output_type="latent", **WIDE, **REDRAWN).images
    far = redraw(picture(), strength=1.0, generator=seeds(1), output_type="latent", **WIDE, **REDRAWN).images
    assert (near - start).square().mean() < (far - start).square().mean()
    with pytest.raises(InputError, match="height must be a multiple of .*, got 33"):
        redraw(picture(), height=33)


def test_without_a_shape_images_are_square_as_before(redraw):
    settings: dict[str, Any] = {"generator": None, "output_type": "pt", **REDRAWN}
    plain = redraw(picture(), **settings | {"generator": seeds(1)}).images
    square = redraw(picture(), height=32, width=32, **settings | {"generator": seeds(1)}).images
    assert plain.shape[-2:] == (32, 32) and torch.equal(plain, square)


def test_wide_latents_go_round(pipeline, redraw):
    settings: dict[str, Any] = {"prior_num_inference_steps": 2, "num_inference_steps": 2}
    latents = pipeline("red circle", output_type="latent", generator=seeds(1), **WIDE, **settings).images
    assert latents.shape[-2:] == (8, 12)
    settings |= {"strength": 0.5, "output_type": "latent"}
    again = redraw(latents, "red circle", generator=seeds(2), **settings).images
    told = redraw(latents, "red circle", generator=seeds(2), **WIDE, **settings).images
    assert again.shape == latents.shape and torch.equal(again, told)
    with pytest.raises(InputError, match="height is 48, but the given latents are those of 32 pixels; leave it out"):
        redraw(latents, "red circle", height=48)


def test_with_eta_0_a_wide_image_comes_back(vary):
    expected = vary.encode_latents(read_images(picture()))
    found = vary(picture(), eta=0.0, generator=seeds(1), **WIDE, **QUICK).images
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
    latent = vary.invert(picture(), num_inference_steps=8, **WIDE)
    assert isinstance(latent, BipartiteLatent) and latent.latents.shape[-2:] == (8, 12)
    torch.testing.assert_close(vary(latent, eta=0.0, generator=seeds(2), **QUICK).images, found)
    with pytest.raises(InputError, match="width is 32, but the given latents are those of 48 pixels"):
        vary(latent, eta=0.0, width=32)
    assert vary(latent, width=64, generator=seeds(2), **QUICK).images.shape[-2:] == (8, 16)  # from new noise


def test_an_edit_by_nothing_gives_a_wide_image_back(pipeline):
    edit = TextDiffPipeline.from_pipe(pipeline)
    found = edit(picture(), "red circle", "blue square", theta=0.0, generator=seeds(0), **WIDE, **QUICK).images
    torch.testing.assert_close(found, edit.encode_latents(read_images(picture())), atol=0.03, rtol=0)


def test_a_way_between_wide_images_begins_and_ends_with_them(pipeline):
    between, ends = InterpolationPipeline.from_pipe(pipeline), [picture(seed=1), picture(seed=2)]
    found = between(ends, frames=2, generator=seeds(0)[0], **WIDE, **QUICK).images
    torch.testing.assert_close(found, between.encode_latents(read_images(ends)), atol=0.03, rtol=0)


@pytest.mark.parametrize("words", [["variations"], ["variations", "--eta", "0"], ["image-to-image"]])
def test_commands_draw_a_shape(pipeline_folder, tmp_path, monkeypatch, words):
    picture().save(tmp_path / "wide.png")
    arguments = [*words, tmp_path / "wide.png", "--height", 32, "--width", 48, "--model", pipeline_folder, "--steps", 2]
    monkeypatch.setattr(sys, "argv", ["t2i", *map(str, arguments), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (None, 0)
    [drawn] = Path(tmp_path / "out").glob("*.png")
    with Image.open(drawn) as image:
        assert image.size == (48, 32)
