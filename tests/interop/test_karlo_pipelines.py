"""Karlo's folders in this project's pipelines, image by image beside diffusers' own (deprecated) pipelines."""

from collections import Counter
from pathlib import Path
from typing import Any

import diffusers.schedulers.scheduling_unclip as theirs
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
from PIL import Image
from torch import Generator, Tensor

from t2i import (
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    InterpolationPipeline,
    OutpaintPipeline,
    Text2ImagePipeline,
    TextDiffPipeline,
)
from t2i.diffusion.guidance import Guidance
from t2i.errors import InputError
from tests.helpers.karlo_folders import karlo, karlo_parts, karlo_variations
from tests.helpers.public_folders import (
    EMBED_DIM,
    prior_scheduler,
    tiny_image_processor,
    tiny_image_tower,
    tiny_prior_transformer,
)
from tests.helpers.references.karlo import noise
from tests.helpers.stages import seeds

ONE, MIXED = ["a red cat"], ["cat", "a red dog and a red cat", "dog"]
STEPS = {"prior_num_inference_steps": 4, "super_res_num_inference_steps": 3}


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """What the steps draw depends on the stage and the step alone: ours gives each stage generators of its own."""
    drawn: Counter = Counter()

    def randn_tensor(shape: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        stage = tuple(shape[1:])
        drawn[stage] += 1
        return torch.randn(shape, generator=Generator().manual_seed(1000 * drawn[stage] + sum(stage)), dtype=dtype)

    monkeypatch.setattr(theirs, "randn_tensor", randn_tensor)
    return drawn


def starts(count: int) -> dict[str, Tensor]:
    """The noise that every stage starts from, by the names of diffusers' pipeline.

    At the first timestep 1 / 20,000 of an image is left, so that an error of rounding, 1e-7, becomes one of 2e-3 in
    the clean pixels that are not clamped. Of noise like this there are none.
    """
    return {
        "prior_latents": noise(count, EMBED_DIM, seed=10),
        "decoder_latents": noise(count, 3, 8, 8, seed=20),
        "super_res_latents": noise(count, 3, 16, 16, seed=30),
    }


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference() -> Any:
    """From its components, for it cannot load its own folder."""
    parts = {name: part for name, (_, part) in karlo_parts().items()}
    return quiet(UnCLIPPipeline(prior=tiny_prior_transformer(), prior_scheduler=prior_scheduler(), **parts))


@pytest.fixture
def pipeline() -> Text2ImagePipeline:
    return quiet(Text2ImagePipeline.from_pretrained(karlo()))


@pytest.mark.parametrize("prompts", [ONE, MIXED], ids=["one", "mixed"])
@pytest.mark.parametrize("scales", [(4.0, 8.0), (1.0, 1.0), (4.0, 1.0)])
def test_the_final_picture_is_the_one_that_diffusers_draws(
    pipeline: Text2ImagePipeline, prompts: list[str], scales: tuple[float, float], same_noise: Counter
):
    given, guided = starts(len(prompts)), dict(zip(("prior_guidance_scale", "decoder_guidance_scale"), scales))
    expected = reference()(prompts, decoder_num_inference_steps=4, output_type="np", **given, **guided, **STEPS).images
    drawn = same_noise.copy()
    same_noise.clear()
    given["latents"], guided["guidance_scale"] = given.pop("decoder_latents"), guided.pop("decoder_guidance_scale")
    ours = pipeline(prompts, num_inference_steps=4, output_type="np", **given, **guided, **STEPS).images
    assert ours.shape == (len(prompts), 16, 16, 3) and ours.std() > 0.05
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert same_noise == drawn == {(EMBED_DIM,): 3, (3, 8, 8): 3, (3, 16, 16): 2}


def test_several_pictures_of_each_prompt_stand_in_diffusers_order(pipeline: Text2ImagePipeline, same_noise: Counter):
    given, prompts = starts(4), MIXED[:2]
    settings = {"num_images_per_prompt": 2, "output_type": "np"} | STEPS
    expected = reference()(prompts, decoder_num_inference_steps=3, **given, **settings).images
    same_noise.clear()
    given["latents"] = given.pop("decoder_latents")
    ours = pipeline(prompts, num_inference_steps=3, **given, **settings).images  # with the usual guidance of both
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_image_variations_are_those_that_diffusers_draws(same_noise: Counter):
    parts = {name: part for name, (_, part) in karlo_parts().items()}
    images = {"image_encoder": tiny_image_tower(), "feature_extractor": tiny_image_processor()}
    pixels = noise(20, 20, 3).mul(60).add(128).clamp(0, 255).byte().numpy()
    picture, given = Image.fromarray(pixels).resize((16, 16)), starts(2)
    del given["prior_latents"]
    settings = {"super_res_num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "np"}
    expected = quiet(UnCLIPImageVariationPipeline(**parts, **images))
    expected = expected(picture, decoder_num_inference_steps=4, **given, **settings).images
    same_noise.clear()
    given["latents"] = given.pop("decoder_latents")
    ours = quiet(ImageVariationPipeline.from_pretrained(karlo_variations()))
    drawn = ours(picture, num_inference_steps=4, **given, **settings).images
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_a_picture_depends_on_its_own_seed_alone(pipeline: Text2ImagePipeline):
    settings = {"num_inference_steps": 2, "output_type": "pt", "prior_candidates": 1} | STEPS
    both = pipeline(MIXED[:2], generator=seeds(1, 2), **settings).images
    alone = pipeline(MIXED[1], generator=seeds(2), **settings).images
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(both, pipeline(MIXED[:2], generator=seeds(1, 2), **settings).images)


def test_one_step_in_every_stage_is_enough_for_a_picture(pipeline: Text2ImagePipeline):
    one = {"prior_num_inference_steps": 1, "num_inference_steps": 1, "super_res_num_inference_steps": 1}
    assert pipeline("cat", **one).images[0].size == (16, 16)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++", "unipc", "ode", "sde"])
def test_every_sampler_draws_from_it(pipeline: Text2ImagePipeline, sampler: str):
    settings = {"prior_sampler": sampler, "sampler": sampler, "num_inference_steps": 3, "output_type": "pt"}
    guidance = {"guidance_scale": Guidance(4.0, rescale=0.5, interval=(0.1, 0.9)), "negative_prompt": "dog"}
    images = pipeline(MIXED, generator=seeds(1, 2, 3), **settings, **guidance, **STEPS).images
    assert images.shape == (3, 3, 16, 16) and images.isfinite().all()


def test_previews_are_of_every_stage_and_every_step(pipeline: Text2ImagePipeline):
    seen: list[tuple[str, int, int]] = []

    def look(preview: Any) -> None:
        seen.append((preview.stage, preview.step, preview.images()[0].size[0] if preview.stage != "prior" else 16))

    pipeline("cat", num_inference_steps=2, on_preview=look, **STEPS)
    stages = Counter(stage for stage, _, _ in seen)
    assert stages == {"prior": 4, "decoder": 2, "super_resolution": 3}
    assert {side for _, _, side in seen} == {16}


def test_a_pipeline_is_the_same_after_saving(pipeline: Text2ImagePipeline, tmp_path: Path):
    settings = {"num_inference_steps": 2, "output_type": "pt"} | STEPS
    pipeline.save_pretrained(tmp_path)
    again = quiet(Text2ImagePipeline.from_pretrained(tmp_path))
    drawn, expected = (one("cat", generator=seeds(1), **settings).images for one in (again, pipeline))
    torch.testing.assert_close(drawn, expected)


def test_it_draws_in_half_precision_read_as_such(pipeline: Text2ImagePipeline):
    half = quiet(Text2ImagePipeline.from_pretrained(karlo(), torch_dtype=torch.bfloat16))
    assert half.decoder.dtype == half.autoencoder.dtype == half.prior.dtype == torch.bfloat16
    settings = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0} | STEPS
    assert half("cat", generator=seeds(1), **settings).images.isfinite().all()


PICTURE = torch.rand(3, 16, 16, generator=Generator().manual_seed(3))
EDITS: dict[str, tuple[type, tuple, dict[str, Any], tuple[int, int, int]]] = {
    "variation of its own noise": (ImageVariationPipeline, (PICTURE,), {"eta": 0.5}, (1, 16, 16)),
    "image to image": (ImageToImagePipeline, (PICTURE,), {"strength": 0.7, "prompt": "cat"}, (1, 16, 16)),
    "outpainting": (OutpaintPipeline, (PICTURE,), {"left": 4, "prompt": "cat"}, (1, 16, 20)),
    "interpolation": (InterpolationPipeline, (["cat", PICTURE],), {"frames": 3}, (3, 16, 16)),
    "text diff": (TextDiffPipeline, (PICTURE, "cat", "dog"), {}, (1, 16, 16)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_pictures_are_edited_by_it(edit: str):
    kind, given, settings, (count, height, width) = EDITS[edit]
    steps = {"num_inference_steps": 3, "super_res_num_inference_steps": 2, "output_type": "pt"}
    pipeline = quiet(kind.from_pretrained(karlo_variations(), prior=karlo()))  # with all that Karlo has
    images = pipeline(*given, generator=Generator().manual_seed(1), **settings, **steps).images
    assert images.shape == (count, 3, height, width) and images.isfinite().all()


def test_what_is_not_painted_stays_pixel_for_pixel():
    painter = quiet(InpaintPipeline.from_pretrained(karlo_variations()))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    steps = {"num_inference_steps": 2, "super_res_num_inference_steps": 2}
    drawn = painter(PICTURE, mask, generator=seeds(1), output_type="pt", **steps).images
    torch.testing.assert_close(drawn[..., :8], PICTURE[None, ..., :8], atol=1e-6, rtol=0)
    assert (drawn[..., 8:] - PICTURE[None, ..., 8:]).abs().max() > 0.05


def test_a_variation_by_the_model_without_an_image_encoder_says_what_is_missing():
    with pytest.raises(InputError, match="no image encoder"):
        quiet(ImageVariationPipeline.from_pretrained(karlo()))(Image.new("RGB", (16, 16)), num_inference_steps=2)
