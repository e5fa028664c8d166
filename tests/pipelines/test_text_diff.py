"""Edits of an image by the direction from one caption to another."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from t2i.pipelines import Interrupted, TextDiffPipeline
from t2i.pipelines.inputs import read_images

from t2i import InputError, Text2ImagePipeline
from t2i.diffusion.guidance import Guidance
from t2i.sampling.steering import Steering

QUICK = {"num_inference_steps": 8, "output_type": "latent"}


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def read_settings(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.text["t2i"])


@pytest.fixture
def edit(pipeline: Text2ImagePipeline) -> TextDiffPipeline:
    return TextDiffPipeline.from_pipe(pipeline)


def test_turned_by_nothing_the_picture_comes_back(edit):
    expected = edit.encode_latents(read_images(picture(), 32))
    found = edit(picture(), "red circle", "blue square", theta=0, **QUICK)
    torch.testing.assert_close(found.images, expected, atol=0.03, rtol=0)


def test_the_embedding_turns_by_its_share_of_the_angle_to_the_difference_of_the_captions(edit):
    z_i = edit.encode_image(read_images(picture(), 32))[0].double()
    before, after = edit.encode_prompt(["red circle", "blue square"]).embedding.double()
    direction = F.normalize(after - before, dim=0)
    angle = torch.acos(z_i @ direction)
    for theta in (0.25, 0.6):
        turned = edit(picture(), "red circle", "blue square", theta=theta, **QUICK).image_embeds[0].double()
        assert torch.acos(turned @ z_i).item() == pytest.approx(theta * angle.item(), abs=1e-3)
        assert torch.acos(turned @ direction).item() == pytest.approx((1 - theta) * angle.item(), abs=1e-3)


def test_turned_all_the_way_nothing_of_the_embedding_is_left(edit):
    embeds = edit([picture(1), picture(2)], "red circle", "blue square", theta=1, **QUICK).image_embeds
    torch.testing.assert_close(embeds[0], embeds[1])


def test_several_thetas_are_drawn_from_one_inversion_each_as_alone(edit, monkeypatch):
    inversions = []
    invert = edit.invert_images
    monkeypatch.setattr(type(edit), "invert_images", lambda self, *given: inversions.append(1) or invert(*given))
    thetas, given = [0.0, 0.4, 1.0], [picture(1), picture(2)]
    found = edit(given, "red circle", "blue square", theta=thetas, **QUICK)
    assert len(found.images) == 6 and len(inversions) == 1
    for number, theta in enumerate(thetas):
        alone = edit(given, "red circle", "blue square", theta=theta, **QUICK)
        torch.testing.assert_close(found.images[number::3], alone.images, atol=1e-4, rtol=1e-4)
    for wrong in ([], [0.5, 2]):
        with pytest.raises(InputError, match="theta"):
            edit(picture(), "red circle", "blue square", theta=wrong)


def test_there_and_back_are_opposite_directions(edit):
    there = edit(picture(), "red circle", "blue square", theta=1, **QUICK).image_embeds
    back = edit(picture(), "blue square", "red circle", theta=1, **QUICK).image_embeds
    torch.testing.assert_close(there, -back)


def test_a_picture_inverted_once_is_edited_many_times(edit):
    latent = edit.invert(picture(), num_inference_steps=8)
    for target in ("blue square", "green circle"):
        expected = edit(picture(), "red circle", target, **QUICK).images
        torch.testing.assert_close(edit(latent, "red circle", target, **QUICK).images, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"theta": 1.5}, "theta must be from 0 to 1, got 1.5"),
        ({"theta": "far"}, "theta must be a number from 0 to 1, got 'far'"),
        ({"target": "red circle "}, "source and target are the same, 'red circle'"),
        ({"target": ["red circle", "blue square"]}, "target has 2 texts for 1"),
        ({"target": " "}, "target must not be empty"),
        ({"source": []}, "source is missing"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents is not allowed here: the noise comes from the image"),
        ({"sampler": "ode"}, "sampler must be ddim for inverted images, got ode"),
        ({"eta": 0.5}, "eta must be 0 for inverted images"),
        ({"guidance_scale": Guidance(2.0, momentum=-0.5)}, "guidance_scale.momentum must be 0 for inverted images"),
        ({"steering": Steering()}, "steering needs a class_name, a text or an image"),
        ({"upsample": 1}, "this pipeline has no upsampler"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line_before_work_starts(edit, monkeypatch, arguments, message):
    for work in ("encode_image", "encode_tokens"):
        monkeypatch.setattr(edit.clip, work, lambda *_: pytest.fail("work has started"))
    with pytest.raises(InputError, match=message) as caught:
        edit(**{"image": picture(), "source": "red circle", "target": "blue square", **arguments})
    assert "\n" not in str(caught.value)


def test_the_inversion_is_previewed_and_can_be_interrupted(edit):
    seen = []

    def stop(preview):
        seen.append(preview)
        if preview.step == 5:
            edit.interrupt()

    with pytest.raises(Interrupted, match="after step 5 of 8 of the inversion"):
        edit(picture(), "red circle", "blue square", on_preview=stop, **QUICK)
    assert [(one.stage, one.step, one.steps) for one in seen] == [("inversion", i, 8) for i in range(1, 6)]
    assert seen[0].images()[0].size == (32, 32)
    away = [(one.estimate - edit.encode_latents(read_images(picture(), 32))).square().mean() for one in seen]
    assert away == sorted(away)  # from the image to noise


def test_captions_that_say_the_same_to_the_model_are_refused(edit):
    with pytest.raises(InputError, match="this CLIP embeds source"):
        edit(picture(), "red circle " * 40, "red circle " * 41, **QUICK)  # cut where the model's captions end


def test_the_command_edits_a_picture_and_writes_how_into_it(pipeline_folder, tmp_path, monkeypatch, capsys):
    from t2i import cli

    picture().save(tmp_path / "one.png")
    command = ["t2i", "edit", str(tmp_path / "one.png"), "--from", "red circle", "--model", str(pipeline_folder)]
    out = tmp_path / "edited.png"
    monkeypatch.setattr(sys, "argv", [*command, "--to", "blue square", "--steps", "2", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    used = read_settings(out)
    assert not ended.value.code
    assert (used["source"], used["target"], used["num_inference_steps"]) == ("red circle", "blue square", 2)
    monkeypatch.setattr(sys, "argv", [*command, "--to", "red circle"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "source and target are the same" in capsys.readouterr().err
