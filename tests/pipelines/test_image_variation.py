"""Variations of an image, from new noise and from its own."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from t2i.pipelines import BipartiteLatent, ImageVariationPipeline
from t2i.pipelines.inputs import read_images
from t2i.pipelines.inversion import build_inversion_options

from t2i import InputError, Text2ImagePipeline
from t2i.diffusion.guidance import Guidance
from tests.helpers.stages import seeds

QUICK = {"num_inference_steps": 8, "output_type": "latent"}


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def read_settings(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.text["t2i"])


@pytest.fixture
def vary(pipeline: Text2ImagePipeline) -> ImageVariationPipeline:
    return ImageVariationPipeline.from_pipe(pipeline)


def test_a_variation_is_what_the_decoder_draws_for_the_embedding_of_the_picture(vary, pipeline):
    z_i = vary.encode_image(read_images([picture(1), picture(2)], 32))
    expected = pipeline(image_embeds=z_i, generator=seeds(3, 4), **QUICK)
    found = vary([picture(1), picture(2)], generator=seeds(3, 4), **QUICK)
    torch.testing.assert_close(found.images, expected.images)
    torch.testing.assert_close(found.image_embeds, z_i)


def test_with_eta_0_the_picture_comes_back_whatever_the_seed(vary):
    pictures = [picture(1), picture(2)]
    expected = vary.encode_latents(read_images(pictures, 32))
    for seed in (0, 1):
        found = vary(pictures, eta=0.0, generator=torch.Generator().manual_seed(seed), **QUICK).images
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_the_larger_eta_the_further_a_variation_roams(vary):
    expected = vary.encode_latents(read_images(picture(), 32))
    away = [
        (
            vary(picture(), num_images_per_prompt=4, eta=eta, generator=seeds(0, 1, 2, 3), **QUICK).images - expected
        ).square()
        for eta in (0.1, 0.4, 1.0)
    ]
    near, middle, far = (one.mean().item() for one in away)
    assert 0 < near < middle < far


def test_a_picture_that_roams_depends_on_its_own_seed_alone(vary):
    both = vary([picture(1), picture(2)], eta=0.5, generator=seeds(1, 2), **QUICK).images
    alone = vary(picture(2), eta=0.5, generator=seeds(2), **QUICK).images
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


def test_what_invert_finds_can_be_given_instead_of_the_picture(vary):
    latent = vary.invert(picture(), num_inference_steps=8)
    assert isinstance(latent, BipartiteLatent)
    again = vary(latent, eta=0.3, generator=seeds(0), **QUICK)
    torch.testing.assert_close(again.images, vary(picture(), eta=0.3, generator=seeds(0), **QUICK).images)
    torch.testing.assert_close(again.image_embeds, latent.image_embeds)


def test_the_noise_of_a_picture_drawn_from_known_noise_is_that_noise(vary):
    z_i, noise = vary.encode_image(read_images(picture(), 32)), torch.randn(1, *vary.latent_shape)
    _, options = build_inversion_options({"num_inference_steps": 8, "output_type": "latent"})
    drawn = vary.redraw_images(BipartiteLatent(z_i, noise), None, options, seeds(0))
    vary.encode_latents = lambda pictures: drawn
    torch.testing.assert_close(vary.invert(picture(), num_inference_steps=8).latents, noise, atol=0.03, rtol=0)


def test_a_decoder_that_reads_captions_reads_the_prompt_there_and_back(vary):
    expected = vary.encode_latents(read_images(picture(), 32))
    told = vary(picture(), "red circle", eta=0.0, generator=seeds(0), **QUICK)
    torch.testing.assert_close(told.images, expected, atol=0.03, rtol=0)
    noises = [vary.invert(picture(), prompt, num_inference_steps=8).latents for prompt in (None, "red circle")]
    assert (noises[0] - noises[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": 2}, "eta must be from 0 to 1, got 2"),
        ({"eta": 0.0, "latents": torch.zeros(1, 4, 8, 8)}, "latents is not allowed here: the noise comes from the"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer from 1"),
        ({"image": []}, "image has no images"),
        ({"prompt": ["a", "b"]}, "prompt has 2 texts for 1"),
        ({"upsample": 1}, "this pipeline has no upsampler"),
        ({"eta": 0.0, "sampler": "ode"}, "sampler must be ddim for inverted images"),
        ({"eta": 0.0, "guidance_scale": Guidance(2.0, momentum=-0.5)}, "guidance_scale.momentum must be 0 for"),
        (
            {"image": BipartiteLatent(torch.zeros(1, 3), torch.zeros(1, 4, 8, 8))},
            "image_embeds must be a tensor of shape",
        ),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line_before_work_starts(vary, monkeypatch, arguments, message):
    monkeypatch.setattr(vary.clip, "encode_image", lambda *_: pytest.fail("work has started"))
    with pytest.raises(InputError, match=message) as caught:
        vary(**{"image": picture(), **arguments})
    assert "\n" not in str(caught.value)


def test_to_invert_with_guidance_that_remembers_is_refused(vary):
    with pytest.raises(InputError, match="guidance_scale.momentum must be 0 for inverted images, got -0.5"):
        vary.invert(picture(), guidance_scale=Guidance(2.0, momentum=-0.5))


def test_the_command_draws_variations_and_writes_how_into_them(pipeline_folder, tmp_path, monkeypatch, capsys):
    from t2i import cli

    picture().save(tmp_path / "one.png")
    command = ["t2i", "variations", str(tmp_path / "one.png"), "--model", str(pipeline_folder), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out"), "--count", "2", "--seed", "5"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    written = [Path(line) for line in capsys.readouterr().out.split()]
    settings = [read_settings(path) for path in written]
    assert [(one["image"], one["seed"], one["num_inference_steps"]) for one in settings] == [
        ("one.png", 5, 2),
        ("one.png", 6, 2),
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "same.png"), "--eta", "0"])
    with pytest.raises(SystemExit):
        cli.main()
    used = read_settings(tmp_path / "same.png")
    assert (used["eta"], used["guidance_scale"]) == (0, 1)


def test_a_negative_prompt_is_what_the_prior_imagines_for_decoders_without_captions(pipeline):
    """A decoder that reads captions reads it, a decoder that does not is guided away from its z_i."""
    vary, image = ImageVariationPipeline.from_pipe(pipeline), torch.rand(1, 3, 32, 32, generator=seeds(0)[0])
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    plain = vary(image, generator=seeds(1), **settings).images
    away = vary(image, generator=seeds(1), negative_prompt="red circle", **settings).images
    assert (away - plain).abs().max() > 1e-5
    unguided = settings | {"guidance_scale": 1.0}
    off = [vary(image, generator=seeds(1), negative_prompt=text, **unguided).images for text in (None, "red circle")]
    torch.testing.assert_close(*off, rtol=0, atol=0)
    with pytest.raises(InputError, match="negative_prompt is for images from new noise"):
        vary(image, negative_prompt="red circle", eta=0.5)
