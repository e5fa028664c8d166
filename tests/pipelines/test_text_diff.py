"""Edits of an image by the direction from one caption to another."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from t2i.pipelines import Interrupted, PriorPipeline, TextDiffPipeline
from t2i.pipelines.inputs import read_images
from t2i.pipelines.inversion import BipartiteLatent
from t2i.pipelines.text_diff import DIRECTIONS

from t2i import InputError, Text2ImagePipeline
from t2i.commands import editing
from t2i.diffusion.geometry import slerp
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.sampling_loop import generate_noise
from t2i.sampling.embeddings import build_candidate_generators
from t2i.sampling.sample import split_generators
from t2i.sampling.steering import Steering
from tests.helpers.stages import seeds

QUICK = {"num_inference_steps": 8, "output_type": "latent"}
CAPTIONS = ["red circle", "blue square"]
BY_PRIOR = {"direction": "prior", "prior_num_inference_steps": 3, "num_inference_steps": 2, "output_type": "latent"}


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
        ({"direction": "image"}, "direction must be one of text, prior; got 'image'"),
        ({"direction": "prior", "theta": 2}, "theta must be from 0 to 1, got 2"),
        ({"direction": "prior", "prior_candidates": 0}, "prior_candidates must be an integer from 1 to 64, got 0"),
        ({"direction": "prior", "prior_latents": torch.zeros(2, 32)}, "prior_latents must be a tensor of shape"),
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


@pytest.mark.parametrize("phi", [0.05, 0.7, 2.5])
def test_the_way_of_texts_passes_the_target_at_a_fraction_that_depends_on_their_angle(phi):
    a, b = torch.tensor([[1.0, 0, 0], [math.cos(phi), math.sin(phi), 0]], dtype=torch.float64)
    theta = phi / (math.pi / 2 + phi / 2)
    torch.testing.assert_close(slerp(a, F.normalize(b - a, dim=0), theta), b)


def imagine(pipeline: Text2ImagePipeline, *numbers: int, **options: Any) -> torch.Tensor:
    """Return what the prior draws for both captions, (2, D), with one seed."""
    settings = (
        {"prior_num_inference_steps": 3} | ({} if "prior_latents" in options else {"prior_candidates": 1}) | options
    )
    return PriorPipeline.from_pipe(pipeline)(CAPTIONS, generator=seeds(*numbers), **settings).image_embeds


def test_the_way_of_the_prior_ends_at_what_it_draws_for_the_target_from_the_same_noise(edit, pipeline):
    before, after = imagine(pipeline, 3, 3).double()
    latent = BipartiteLatent(before[None].float(), torch.randn(1, 4, 8, 8, generator=seeds(0)[0]))
    settings = BY_PRIOR | {"prior_candidates": 1}
    thetas = [0.0, 0.3, 1.0]
    found = edit(latent, *CAPTIONS, theta=thetas, generator=seeds(3, 3, 3), **settings).image_embeds.double()
    torch.testing.assert_close(found[0], before, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[2], after, atol=1e-5, rtol=0)
    # On the great circle of the paper, on which the target lies at its own fraction
    phi = torch.acos(before @ after)
    whole = phi / (math.pi / 2 + phi / 2)
    torch.testing.assert_close(
        found[1], slerp(before, F.normalize(after - before, dim=0), 0.3 * whole), atol=1e-5, rtol=0
    )
    # The default is the whole way
    torch.testing.assert_close(edit(latent, *CAPTIONS, generator=seeds(3), **settings).image_embeds, found[2:].float())


def test_what_an_image_has_beside_the_source_stays_when_the_prior_gives_the_way(edit, pipeline):
    z_i = edit.encode_image(read_images(picture(), 32))
    before, after = imagine(pipeline, 3, 3)
    found = edit(picture(), *CAPTIONS, generator=seeds(3), prior_candidates=1, **BY_PRIOR).image_embeds
    torch.testing.assert_close(found, F.normalize(z_i + after - before, dim=-1), atol=1e-5, rtol=0)


def test_of_several_candidates_the_noise_counts_whose_source_is_nearest_to_the_image(edit, pipeline):
    options = {"prior_sampler": "ddim"}  # the noise to start from alone decides
    [stream], _ = split_generators(seeds(0)[0], 1)
    noises = generate_noise((32,), build_candidate_generators(stream, 6), torch.device("cpu"))
    pairs = torch.stack([imagine(pipeline, 0, 0, prior_latents=noise.repeat(2, 1), **options) for noise in noises])
    z_i = edit.encode_image(read_images(picture(), 32))
    chosen = (pairs[:, 0] @ z_i[0]).argmax().item()
    assert chosen != 0, "another one than without candidates"
    before, after = pairs[chosen]
    given = BY_PRIOR | options | {"prior_candidates": 6}
    assert edit.resolve_options().prior.prior_candidates == 16
    found = edit(picture(), *CAPTIONS, generator=seeds(0), **given).image_embeds
    torch.testing.assert_close(found, F.normalize(z_i + after - before, dim=-1), atol=1e-5, rtol=0)
    # Noise that is given is the one candidate
    given |= {"prior_latents": noises[:1]}
    found = edit(picture(), *CAPTIONS, generator=seeds(9), **given).image_embeds
    torch.testing.assert_close(found, F.normalize(z_i + pairs[0][1] - pairs[0][0], dim=-1), atol=1e-5, rtol=0)


def test_a_change_by_the_prior_depends_on_its_seed_alone_not_on_its_batch(edit):
    given = [picture(1), picture(2)]
    both = edit(given, *CAPTIONS, theta=[0.5, 1.0], generator=seeds(1, 1, 2, 2), **BY_PRIOR)
    for number, theta in ((0, 0.5), (1, 1.0)):
        alone = edit(picture(2), *CAPTIONS, theta=theta, generator=seeds(2), **BY_PRIOR)
        torch.testing.assert_close(both.images[2 + number], alone.images[0], atol=1e-4, rtol=1e-4)
    other = edit(picture(2), *CAPTIONS, theta=1.0, generator=seeds(1), **BY_PRIOR)
    assert not torch.allclose(other.image_embeds, both.image_embeds[3:], atol=1e-4)


def test_a_model_without_a_prior_has_no_direction_of_it(edit):
    edit.register_modules(prior=None, prior_scheduler=None)
    with pytest.raises(InputError, match="^direction is 'prior', but this model has no prior; give it one, or"):
        edit(picture(), *CAPTIONS, direction="prior")


def test_options_of_the_prior_are_idle_where_texts_give_the_direction(edit, caplog):
    edit(picture(), *CAPTIONS, prior_candidates=4, **QUICK)
    assert caplog.messages == ["prior_candidates has no effect without direction='prior'"]


def test_captions_that_say_the_same_to_the_model_are_refused(edit):
    with pytest.raises(InputError, match="this CLIP embeds source"):
        edit(picture(), "red circle " * 40, "red circle " * 41, **QUICK)  # cut where the model's captions end


def run_edit(monkeypatch: Any, *words: object) -> int:
    from t2i import cli

    monkeypatch.setattr(sys, "argv", ["t2i", "edit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_the_command_edits_a_picture_and_writes_how_into_it(pipeline_folder, tmp_path, monkeypatch, capsys):
    picture().save(tmp_path / "one.png")
    words = [tmp_path / "one.png", "--from", "red circle", "--model", pipeline_folder, "--steps", "2", "--to"]
    assert run_edit(monkeypatch, *words, "blue square", "--out", tmp_path / "edited.png") == 0
    used = read_settings(tmp_path / "edited.png")
    assert (used["source"], used["target"], used["num_inference_steps"]) == (*CAPTIONS, 2)
    assert (used["direction"], used["theta"], used["seed"]) == ("text", 0.35, 0)
    assert not [name for name in used if name.startswith("prior")]
    assert run_edit(monkeypatch, *words, "red circle") == 2
    assert "source and target are the same" in capsys.readouterr().err


def test_the_command_edits_by_the_prior_and_writes_how_into_it(pipeline_folder, tmp_path, monkeypatch, capsys):
    picture().save(tmp_path / "one.png")
    words = [tmp_path / "one.png", "--from", "red circle", "--to", "blue square", "--model", pipeline_folder]
    words += ["--steps", "2", "--prior-steps", "3", "--candidates", "1", "--prior-guidance-scale", "3", "--seed", "5"]
    assert run_edit(monkeypatch, *words, "--direction", "prior", "--out", tmp_path / "edited.png") == 0
    used = read_settings(tmp_path / "edited.png")
    assert (used["direction"], used["theta"], used["seed"]) == ("prior", 1, 5)
    assert (used["prior_num_inference_steps"], used["prior_candidates"], used["prior_guidance_scale"]) == (3, 1, 3)
    edit = TextDiffPipeline.from_pretrained(pipeline_folder)
    options = {"num_inference_steps": 2, "prior_num_inference_steps": 3, "prior_candidates": 1}
    options |= {"prior_guidance_scale": 3.0, "direction": "prior"}
    [expected] = edit(tmp_path / "one.png", *CAPTIONS, generator=seeds(5), **options).images
    assert Image.open(tmp_path / "edited.png").tobytes() == expected.tobytes()
    # It does nothing for the direction of texts
    assert run_edit(monkeypatch, *words, "--out", tmp_path / "other.png") == 2
    assert capsys.readouterr().err.endswith("--prior-steps needs --direction prior, and does nothing without it\n")
    assert run_edit(monkeypatch, *words[:7], "--direction", "up") == 2
    assert "direction must be one of text, prior; got 'up'" in capsys.readouterr().err


def test_the_command_offers_the_directions_of_the_pipeline():
    assert editing.DIRECTIONS == DIRECTIONS
