"""Images that start from other images."""

import numpy as np
import pytest
import torch
from PIL import Image
from t2i.pipelines import ImageToImagePipeline

from t2i import InputError
from tests.helpers.stages import seeds

QUICK = {"prior_num_inference_steps": 2, "num_inference_steps": 10}


def picture(seed=0, size=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.fixture
def redraw(pipeline):
    return ImageToImagePipeline.from_pipe(pipeline)


def test_the_less_strength_the_nearer_to_the_picture(redraw):
    start = redraw.encode_latents(torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1)
    drawn = [
        redraw(picture(), strength=one, generator=seeds(1), output_type="latent", **QUICK).images
        for one in (0.1, 0.5, 1.0)
    ]
    distances = [(one - start).square().mean().item() for one in drawn]
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize(("strength", "count"), [(0.01, 1), (0.4, 4), (1.0, 10)])
def test_previews_count_the_steps_that_are_taken_and_end_with_the_picture(redraw, strength, count):
    seen = []
    settings = {"strength": strength, "output_type": "latent", "preview_every": 3, "on_preview": seen.append}
    drawn = redraw(picture(), generator=seeds(1), **settings, **QUICK).images
    steps = [(one.step, one.steps) for one in seen if one.stage == "decoder"]
    assert steps == [*((i, count) for i in range(3, count, 3)), (count, count)]
    torch.testing.assert_close(seen[-1].estimate, drawn)


def test_a_prompt_says_what_to_show_instead_of_the_picture(redraw):
    settings = {"generator": seeds(1), "output_type": "pt", **QUICK}
    plain, told = redraw(picture(), **settings), redraw(picture(), "red circle", **settings)
    assert (plain.images - told.images).abs().max() > 1e-3
    seen = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(plain.image_embeds, redraw.encode_image(seen))


def test_a_picture_depends_on_its_own_seed_alone(redraw):
    both = redraw([picture(1), picture(2)], generator=seeds(1, 2), output_type="pt", **QUICK).images
    alone = redraw(picture(2), generator=seeds(2), output_type="pt", **QUICK).images
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


def test_pictures_are_fitted_to_the_model(redraw):
    assert redraw(picture(size=50), generator=seeds(1), **QUICK).images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 1.5}, "strength must be from 0.001 to 1, got 1.5"),
        ({"strength": float("nan")}, "strength must be a number"),
        ({"image": 3}, "image must be an image or a list of images, got int"),
        ({"prompt": ["a", "b"]}, "prompt has 2 texts for 1"),
        ({"prompt": " "}, "prompt must not be empty"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer"),
    ],
)
def test_bad_input_is_refused_before_any_work(redraw, monkeypatch, settings, message):
    monkeypatch.setattr(redraw.clip, "encode_image", lambda *_: pytest.fail("work has started"))
    with pytest.raises(InputError, match=message):
        redraw(**{"image": picture(), **settings})
