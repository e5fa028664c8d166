"""Images between images and texts."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from t2i.pipelines import InterpolationPipeline, interpolation
from t2i.pipelines.inputs import read_images

from t2i import InputError, Text2ImagePipeline
from t2i.diffusion.geometry import compute_spherical_mean, slerp
from t2i.diffusion.guidance import Guidance
from t2i.sampling.steering import Steering

QUICK = {"num_inference_steps": 8, "prior_num_inference_steps": 2, "output_type": "latent"}


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def read_settings(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.text["t2i"])


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def between(pipeline: Text2ImagePipeline) -> InterpolationPipeline:
    return InterpolationPipeline.from_pipe(pipeline)


def test_the_way_passes_through_the_very_pictures_and_embeddings_turn_evenly_between_them(between):
    pictures = [picture(1), picture(2), picture(3)]
    expected = between.encode_latents(read_images(pictures, 32))
    z_i = between.encode_image(read_images(pictures, 32))
    found = between(pictures, frames=3, **QUICK)
    torch.testing.assert_close(found.images[::2], expected, atol=0.03, rtol=0)
    torch.testing.assert_close(found.image_embeds[::2], z_i)
    torch.testing.assert_close(found.image_embeds[1::2], slerp(z_i[:-1], z_i[1:], 0.5))


def test_weights_ask_for_one_mix_and_rows_of_weights_for_many(between):
    pictures = [picture(1), picture(2), picture(3)]
    z_i = between.encode_image(read_images(pictures, 32))
    mixed = between(pictures, weights=[1, 2, 1], **QUICK)
    assert len(mixed.images) == 1
    torch.testing.assert_close(mixed.image_embeds[0], compute_spherical_mean(z_i, torch.tensor([1.0, 2.0, 1.0])))
    rows = between(pictures, weights=[[1, 2, 1], [0, 0, 7]], **QUICK)
    torch.testing.assert_close(rows.images[0], mixed.images[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.image_embeds[1], z_i[2])


def test_texts_pass_through_the_prior_and_begin_from_one_noise(between, pipeline):
    start = torch.randn(2, between.clip.embed_dim, generator=torch.Generator().manual_seed(0))
    settings = {"prior_latents": start, **QUICK}
    expected = pipeline(["red circle", "blue square"], **settings).image_embeds
    found = between(["red circle", "blue square"], frames=2, generator=torch.Generator().manual_seed(1), **settings)
    torch.testing.assert_close(found.image_embeds, expected, atol=1e-5, rtol=0)
    same = between(
        ["red circle", "red circle"],
        frames=2,
        generator=torch.Generator().manual_seed(1),
        **{**settings, "prior_latents": start[:1].repeat(2, 1)},
    )
    torch.testing.assert_close(same.images[0], same.images[1], atol=1e-5, rtol=0)


def test_pictures_and_texts_mix(between):
    expected = between.encode_latents(read_images(picture(), 32))
    found = between(["red circle", picture()], frames=2, generator=torch.Generator().manual_seed(1), **QUICK)
    torch.testing.assert_close(found.images[1:], expected, atol=0.03, rtol=0)
    assert (found.images[0] - expected[0]).abs().max() > 0.1


@pytest.mark.parametrize("inverted", [True, False])
def test_several_generators_draw_what_each_draws_alone(between, inverted):
    def draw(generator):
        anchors = ["red circle", picture(1), "blue square"]
        settings = {"weights": [1, 2, 1], "inverted": inverted, "prior_candidates": 2, **QUICK}
        return between(anchors, generator=generator, **settings)

    alone = [draw(torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    together = draw([torch.Generator().manual_seed(seed) for seed in (3, 4)])
    torch.testing.assert_close(together.images, torch.cat([one.images for one in alone]), atol=1e-4, rtol=0)
    torch.testing.assert_close(together.image_embeds, torch.cat([one.image_embeds for one in alone]))
    assert not torch.allclose(alone[0].images, alone[1].images, atol=1e-2)
    with pytest.raises(InputError, match="generator has 2 generators for 8 mixes"):
        between(["a", "b"], generator=[torch.Generator()] * 2)


def test_without_inversion_the_way_begins_with_a_variation(between, pipeline):
    pictures = [picture(1), picture(2)]
    expected = between.encode_latents(read_images(pictures, 32))
    settings = {"frames": 2, "inverted": False, **QUICK}
    found = [between(pictures, generator=torch.Generator().manual_seed(1), **settings) for _ in range(2)]
    assert (found[0].images - expected).square().mean() > 0.1
    torch.testing.assert_close(found[0].images, found[1].images)


def test_frames_are_the_same_in_batches_of_any_size(between, monkeypatch):
    settings = {"frames": 5, "generator": torch.Generator().manual_seed(1), **QUICK}
    whole = between([picture(1), picture(2)], **settings).images
    monkeypatch.setattr(interpolation, "FRAMES_PER_BATCH", 2)
    torch.testing.assert_close(between([picture(1), picture(2)], **settings).images, whole, atol=1e-4, rtol=0)


def test_a_decoder_that_reads_captions_reads_that_of_the_nearest_anchor(between, monkeypatch):
    read = []
    monkeypatch.setattr(between, "redraw_images", lambda latent, text, *_: read.append(text) or latent.latents)
    between(["red circle", "blue square"], frames=4, **QUICK)
    expected = between.encode_prompt(["red circle", "red circle", "blue square", "blue square"])
    torch.testing.assert_close(read[0].expand().states, expected.expand().states)
    assert (read[0].expand().mask == expected.expand().mask).all()
    between([picture(), "blue square"], frames=4, **QUICK)
    assert read[1].expand().mask.any(dim=1).tolist() == [False, False, True, True]  # of an image, nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchors": []}, "anchors is empty; give at least two"),
        ({"anchors": 3}, "anchors must be a list of texts and images, got int"),
        ({"anchors": ["a"]}, "anchors has one entry; give two or more, or weights"),
        ({"anchors": ["a", " "]}, "anchors must not be empty"),
        ({"anchors": ["a"] * 65}, "anchors has 65 entries; at most 64"),
        ({"weights": [1.0]}, "weights has 1 numbers .1. for 2 anchors; give one for each"),
        ({"weights": [0, 0]}, "weights must have a positive sum, got 0, 0"),
        ({"weights": [1, -1]}, "weights must be finite and not negative"),
        ({"weights": ["a", "b"]}, "weights must be numbers"),
        ({"weights": [[[1, 1]]]}, r"weights have the shape \(1, 1, 2\)"),
        ({"frames": 1}, "frames must be an integer from 2"),
        ({"frames": 1024, "anchors": ["a", "b", "c"]}, "frames 1024 between 3 anchors makes 2047 images"),
        ({"latents": torch.zeros(1)}, "latents is not allowed in an interpolation"),
        ({"anchors": ["a", Path("missing.png")]}, "missing.png"),
        ({"anchors": ["a", torch.zeros(2, 3, 32, 32)]}, "anchors 2 must be a text or one image, got 2 images"),
        ({"anchors": ["a", picture()], "sampler": "ode"}, "sampler must be ddim for inverted images"),
        (
            {"anchors": ["a", picture()], "guidance_scale": Guidance(2.0, momentum=-0.5)},
            "momentum must be 0 for inverted",
        ),
        ({"frames": 2, "steering": Steering(text=["red"] * 3)}, "steering.text has 3 texts for 2 images"),
        ({"upsample": 1}, "this pipeline has no upsampler"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line_before_work_starts(between, monkeypatch, arguments, message):
    monkeypatch.setattr(between, "encode_prompt", lambda *_: pytest.fail("work has started"))
    with pytest.raises((InputError, FileNotFoundError), match=message) as caught:
        between(**{"anchors": ["a", "b"], **arguments})
    assert "\n" not in str(caught.value)


def test_without_a_prior_texts_are_their_own_embeddings(pipeline, caplog):
    alone = InterpolationPipeline.from_pipe(pipeline, prior=None, prior_scheduler=None)
    found = alone(["red circle", picture()], frames=2, **QUICK).image_embeds
    torch.testing.assert_close(found[:1], alone.encode_prompt(["red circle"]).embedding, atol=1e-5, rtol=0)
    assert "this pipeline has no prior" in caplog.text
    assert len(alone([picture(1), picture(2)], frames=3, **QUICK).images) == 3


def test_what_steers_is_given_one_a_frame_and_cut_as_the_batches_are(between, monkeypatch):
    texts = ["red circle", "blue square", "red circle"]
    settings = {"frames": 3, **QUICK}
    whole = between([picture(1), picture(2)], steering=Steering(50.0, text=texts), **settings).images
    monkeypatch.setattr(interpolation, "FRAMES_PER_BATCH", 2)
    parts = between([picture(1), picture(2)], steering=Steering(50.0, text=texts), **settings).images
    torch.testing.assert_close(parts, whole, atol=1e-3, rtol=0)


def test_where_nothing_is_inverted_the_sampler_is_the_one_that_is_asked_for(between):
    settings = {"frames": 2, "inverted": False, **QUICK}
    drawn = [
        between([picture(1), picture(2)], generator=torch.Generator().manual_seed(1), sampler=name, **settings).images
        for name in (None, "ddim", "ode", "ddpm", "ddpm")
    ]
    torch.testing.assert_close(drawn[0], drawn[1])
    torch.testing.assert_close(drawn[3], drawn[4])
    assert min((drawn[0] - drawn[i]).abs().max() for i in (2, 3)) > 1e-3


def run(monkeypatch, *arguments: object) -> int:
    from t2i import cli

    monkeypatch.setattr(sys, "argv", ["t2i", "interpolate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_the_command_writes_frames_in_their_order_or_a_strip(pipeline_folder, tmp_path, monkeypatch, capsys):
    picture().save(tmp_path / "one.png")
    common = [tmp_path / "one.png", "red circle", "--model", pipeline_folder, "--steps", 2, "--prior-steps", 2]
    assert run(monkeypatch, *common, "--frames", 3, "--seed", 1, "--out", tmp_path / "frames") == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert written == sorted(written)
    assert len(written) == 3
    used = read_settings(written[0])
    assert used["anchors"] == ["one.png", "red circle"]
    assert (used["seed"], used["guidance_scale"], used["num_inference_steps"]) == (1, 1, 2)
    assert run(monkeypatch, *common, "--frames", 3, "--strip", "--out", tmp_path / "strip.png") == 0
    assert size_of(tmp_path / "strip.png") == (96, 32)
    assert run(monkeypatch, *common, "--weights", "1,3", "--out", tmp_path / "mix.png") == 0
    assert size_of(tmp_path / "mix.png") == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "red circle"], "no image file 'missing.png'; an anchor is an image file or a text"),
        (["a", "b", "--weights", "1,x"], "weights must be comma-separated numbers"),
        (["a", "b", "--weights", "0,0"], "weights must have a positive sum"),
        (["a"], "anchors has one entry"),
    ],
)
def test_the_command_refuses_what_makes_no_way(arguments, message, monkeypatch, capsys):
    assert run(monkeypatch, *arguments, "--model", "nowhere") == 2
    assert message in capsys.readouterr().err
