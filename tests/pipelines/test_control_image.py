"""Kandinsky 2.2's ControlNet: images drawn by a control image, as diffusers' pipelines draw them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import KandinskyV22ControlnetImg2ImgPipeline, KandinskyV22ControlnetPipeline
from PIL import Image
from t2i.pipelines import inputs
from t2i.pipelines.image_to_image import ImageToImagePipeline
from t2i.pipelines.image_variation import ImageVariationPipeline
from t2i.pipelines.inpaint import InpaintPipeline, OutpaintPipeline
from t2i.pipelines.inputs import fit_control_images, read_control_images
from t2i.pipelines.interpolation import InterpolationPipeline
from t2i.pipelines.memory_needed import count_bytes_needed
from t2i.pipelines.text2image import Text2ImagePipeline
from torch import Generator, Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from t2i import cli
from t2i.errors import InputError
from t2i.sampling.sample import split_generators
from tests.helpers.kandinsky_folders import (
    kandinsky_22_combined,
    kandinsky_22_controlnet,
    kandinsky_22_prior,
    kandinsky_scheduler,
    tiny_controlnet_unet,
    tiny_movq,
)
from tests.helpers.public_folders import EMBED_DIM

SCHEDULERS = {"ddpm": kandinsky_scheduler("2.2"), "ddim": kandinsky_scheduler("2.1")}
SIZE = {"height": 16, "width": 16}
QUICK = {"num_inference_steps": 2}
DEPTH = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))  # grey, as depth maps are
OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8))
PICTURE = Image.fromarray(np.random.default_rng(2).integers(0, 255, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipeline() -> Text2ImagePipeline:
    loaded = Text2ImagePipeline.from_pretrained(kandinsky_22_controlnet(), prior=kandinsky_22_prior())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def make_hint(*images: Image.Image) -> Tensor:
    """As the example in diffusers' documentation makes it of a depth map."""
    return torch.stack([pil_to_tensor(image.convert("RGB")).float() / 255 for image in images])


def build_reference(kind: type, name: str) -> Any:
    reference = kind(unet=tiny_controlnet_unet(), movq=tiny_movq(), scheduler=SCHEDULERS[name])
    reference.set_progress_bar_config(disable=True)
    return reference


def build_generators(count: int) -> list[Generator]:
    return [Generator().manual_seed(11 + number) for number in range(count)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_text_is_drawn_as_diffusers_draws_it(pipeline: Text2ImagePipeline, scale: float, name: str) -> None:
    z_i, away = random(2, EMBED_DIM, seed=1), random(2, EMBED_DIM, seed=2)
    settings = {"num_inference_steps": 3, "guidance_scale": scale, "output_type": "np"}
    settings |= {"image_embeds": z_i, "negative_image_embeds": away}
    drawing = Text2ImagePipeline.from_pipe(pipeline, decoder_scheduler=SCHEDULERS[name])
    mine = drawing(["a cat", "a dog"], control_image=[DEPTH, OTHER], generator=build_generators(2), **settings).images
    generators = split_generators(build_generators(2), 2)[1]
    hint, reference = make_hint(DEPTH, OTHER), build_reference(KandinskyV22ControlnetPipeline, name)
    theirs = reference(hint=hint, generator=generators, **settings, **SIZE).images
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    # One image for all, as a tensor; its own seed alone decides the first image
    shared = drawing(["a cat", "a dog"], control_image=hint[:1], generator=build_generators(2), **settings).images
    np.testing.assert_allclose(shared[0], theirs[0], atol=1e-4)
    assert np.abs(shared[1] - theirs[1]).max() > 0.01


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_is_redrawn_as_diffusers_does(pipeline: Text2ImagePipeline, name: str) -> None:
    drawing = ImageToImagePipeline.from_pipe(pipeline, decoder_scheduler=SCHEDULERS[name])
    away = random(1, EMBED_DIM, seed=2)
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "strength": 0.5, "image": PICTURE}
    settings |= {"output_type": "pt", "negative_image_embeds": away}
    mine = drawing(control_image=DEPTH, generator=build_generators(1), **settings)
    reference = build_reference(KandinskyV22ControlnetImg2ImgPipeline, name)
    settings |= {"image_embeds": mine.image_embeds, "generator": split_generators(build_generators(1), 1)[1]}
    theirs = reference(hint=make_hint(DEPTH), **settings, **SIZE).images
    torch.testing.assert_close(mine.images, theirs, atol=1e-4, rtol=0)


def test_the_own_prior_draws_for_it_and_the_null_is_the_references(pipeline: Text2ImagePipeline) -> None:
    plain = Text2ImagePipeline.from_pretrained(kandinsky_22_combined())
    plain.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "pt"}
    mine = pipeline("a cat", control_image=DEPTH, generator=build_generators(1), **steps)
    theirs = plain("a cat", generator=build_generators(1), **steps)
    assert torch.equal(mine.image_embeds, theirs.image_embeds)
    torch.testing.assert_close(pipeline.decoder.null(1).embedding, plain.decoder.null(1).embedding)


def test_images_of_one_prompt_share_its_control_image(pipeline: Text2ImagePipeline) -> None:
    settings = {**QUICK, "prior_num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "pt"}
    both = pipeline(["a cat", "a cat"], control_image=[DEPTH, OTHER], generator=build_generators(4), **settings).images
    alone = pipeline("a cat", control_image=DEPTH, generator=build_generators(2), **settings).images
    torch.testing.assert_close(both[:2], alone, atol=1e-4, rtol=0)
    seen = []
    pipeline("a cat", control_image=DEPTH, on_preview=lambda preview: seen.append(preview.images()), **settings)
    assert len(seen) == 4 and all(len(images) == 2 for images in seen)


def test_a_control_image_is_resized_as_given_images_are() -> None:
    rows, columns = np.mgrid[:32, :80]
    wide = Image.fromarray(np.stack([rows * 7, columns * 3, rows + columns], axis=-1).astype(np.uint8))
    exact = make_hint(wide)
    torch.testing.assert_close(fit_control_images(read_control_images(wide), 2, (32, 80)), exact.repeat(2, 1, 1, 1))
    torch.testing.assert_close(fit_control_images(read_control_images(exact), 1, (32, 80)), exact)
    square = fit_control_images(read_control_images(wide), 1, (64, 64))  # twice as large, the middle of the long side
    doubled = wide.resize((160, 64), Image.Resampling.BICUBIC).crop((48, 0, 112, 64))
    assert (square - make_hint(doubled)).abs().max() < 1.01 / 255  # PIL rounds to bytes after each pass
    assert fit_control_images(read_control_images(wide), 1, (64, 32)).shape == (1, 3, 64, 32)


def test_variations_and_interpolations_are_drawn_by_it_and_its_own_noise_gives_a_picture_back(
    pipeline: Text2ImagePipeline,
) -> None:
    vary = ImageVariationPipeline.from_pipe(pipeline, decoder_scheduler=SCHEDULERS["ddim"])
    settings: dict[str, Any] = {"control_image": DEPTH, "output_type": "latent", "num_inference_steps": 12}
    back = vary(PICTURE, eta=0.0, **settings).images
    assert vary(PICTURE, num_images_per_prompt=2, **settings | QUICK).images.shape == (2, 4, 8, 8)
    latent = vary.invert(PICTURE, num_inference_steps=12, control_image=DEPTH)
    torch.testing.assert_close(vary(latent, eta=0.0, **settings).images, back)
    between = InterpolationPipeline.from_pipe(vary)
    assert between([PICTURE, "a cat"], frames=2, **settings | QUICK).images.shape == (2, 4, 8, 8)
    kept = vary.encode_latents(make_hint(PICTURE) * 2 - 1)
    other = vary(latent, eta=0.0, **settings | {"control_image": OTHER}).images
    assert (back - kept).abs().mean() < 0.5 * (other - kept).abs().mean()


def test_memory_of_other_sizes_is_counted(pipeline: Text2ImagePipeline) -> None:
    options = {"control_image": DEPTH, "guidance_scale": 1.0}
    small, large = (
        count_bytes_needed(pipeline, None, pipeline.resolve_options(**options, height=side, width=side)[1], 1)
        for side in (64, 128)
    )
    assert large > 3 * small > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "control_image is missing; this decoder is a ControlNet"),
        ({"control_image": [DEPTH, DEPTH, DEPTH]}, "control_image has 3 images for 2 prompts or images; give 1 or 2"),
        ({"control_image": 2 * make_hint(DEPTH)}, "control_image has values from 0 to"),
        ({"control_image": "no-such-file.png"}, "no-such-file.png"),
        ({"control_image": random(1, 64, 64, seed=0)}, "control_image has the shape"),
    ],
)
def test_what_cannot_be_drawn_by_is_refused(pipeline: Text2ImagePipeline, given: dict[str, Any], said: str) -> None:
    with pytest.raises((InputError, OSError), match=said):
        pipeline(["a cat", "a dog"], **given)


def test_a_control_image_is_read_once(
    pipeline: Text2ImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its number, for a preview of the prior, and for the drawing."""
    read: list[Path] = []
    open_image = inputs.open_image
    monkeypatch.setattr(inputs, "open_image", lambda path: (read.append(path), open_image(path))[1])
    DEPTH.save(tmp_path / "depth.png")
    settings: dict[str, Any] = {"num_inference_steps": 1, "prior_num_inference_steps": 1, "output_type": "latent"}
    previews: dict[str, Any] = {"on_preview": lambda preview: preview.images(), "guidance_rescale": 0.5}
    pipeline("a cat", control_image=tmp_path / "depth.png", **settings, **previews)
    assert read == [tmp_path / "depth.png"]


def test_what_does_not_go_with_a_control_image_is_refused(pipeline: Text2ImagePipeline) -> None:
    mask, control = Image.new("L", (16, 16)), {"control_image": DEPTH}
    mask.paste(255, (0, 0, 8, 16))
    with pytest.raises(InputError, match="a ControlNet, which does not inpaint"):
        InpaintPipeline.from_pipe(pipeline)(PICTURE, mask, "a cat", **control)
    with pytest.raises(InputError, match="a ControlNet, which does not inpaint"):
        OutpaintPipeline.from_pipe(pipeline)(PICTURE, left=8)
    with pytest.raises(InputError, match="control_image must be one image in an interpolation"):
        InterpolationPipeline.from_pipe(pipeline)(["a cat", "a dog"], control_image=[DEPTH, OTHER])
    plain = Text2ImagePipeline.from_pretrained(kandinsky_22_combined())
    with pytest.raises(InputError, match="control_image needs a ControlNet decoder"):
        plain("a cat", **control)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["t2i", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_the_command_line_draws_by_a_file_and_records_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DEPTH.save(tmp_path / "depth.png")
    PICTURE.save(tmp_path / "cat.png")
    model = ["--model", str(kandinsky_22_controlnet()), "--prior", str(kandinsky_22_prior()), "--steps", "2"]
    control = ["--control-image", str(tmp_path / "depth.png")]
    run(["generate", "a cat", *model, *control, "--out", str(tmp_path / "drawn.png")], monkeypatch)
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert json.loads(drawn.info["t2i"])["control_image"] == str(tmp_path / "depth.png")
    redraw = ["image-to-image", str(tmp_path / "cat.png"), *model, *control, "--out", str(tmp_path / "redrawn.png")]
    run(redraw, monkeypatch)
    assert (tmp_path / "redrawn.png").is_file()
