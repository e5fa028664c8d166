"""Kandinsky in this project's pipelines, whole: what diffusers' combined pipelines draw from the same noise."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    KandinskyCombinedPipeline,
    KandinskyImg2ImgCombinedPipeline,
    KandinskyImg2ImgPipeline,
    KandinskyInpaintCombinedPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22InpaintPipeline,
)
from diffusers.pipelines.kandinsky import pipeline_kandinsky_inpaint
from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2_inpainting
from PIL import Image
from t2i.pipelines.image_to_image import ImageToImagePipeline
from t2i.pipelines.image_variation import ImageVariationPipeline
from t2i.pipelines.inpaint import InpaintPipeline, OutpaintPipeline
from t2i.pipelines.interpolation import InterpolationPipeline
from t2i.pipelines.text2image import Text2ImagePipeline
from t2i.pipelines.text_diff import TextDiffPipeline
from torch import Generator, Tensor

from t2i.errors import InputError
from t2i.sampling.sample import split_generators
from tests.helpers.kandinsky_folders import (
    kandinsky_21_combined,
    kandinsky_21_inpaint,
    kandinsky_21_prior,
    kandinsky_22_combined,
    kandinsky_22_inpaint,
    kandinsky_22_prior,
    kandinsky_decoder_parts,
    kandinsky_prior_parts,
    kandinsky_scheduler,
)
from tests.helpers.public_folders import EMBED_DIM

# The combined pipeline of 2.2 passes on an argument that diffusers itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*callback_steps:FutureWarning")
VERSIONS = ("2.1", "2.2")
FOLDERS = {"2.1": kandinsky_21_combined, "2.2": kandinsky_22_combined}
PRIORS = {"2.1": kandinsky_21_prior, "2.2": kandinsky_22_prior}
INPAINT = {"2.1": kandinsky_21_inpaint, "2.2": kandinsky_22_inpaint}
COMBINED = {"2.1": KandinskyCombinedPipeline, "2.2": KandinskyV22CombinedPipeline}
REDRAWING = {"2.1": KandinskyImg2ImgCombinedPipeline, "2.2": KandinskyV22Img2ImgCombinedPipeline}
INPAINTING = {"2.1": KandinskyInpaintCombinedPipeline, "2.2": KandinskyV22InpaintCombinedPipeline}
SCHEDULERS = {"ddpm": kandinsky_scheduler("2.2"), "ddim": kandinsky_scheduler("2.1")}
PROMPTS = ["a cat", "the red dog and a blue cat on the chair"]
SIZE = {"height": 16, "width": 16}
QUICK = {"num_inference_steps": 4, "guidance_scale": 4.0}


@functools.cache
def pipeline(version: str, masks: bool = False) -> Text2ImagePipeline:
    """Through the door: the combined folder, or the inpainting decoder's with that of the prior."""
    settings = {"prior": PRIORS[version]()} if masks else {}
    return quiet(Text2ImagePipeline.from_pretrained(INPAINT[version]() if masks else FOLDERS[version](), **settings))


def ours(kind: type, version: str, name: str, masks: bool = False) -> Any:
    return quiet(kind.from_pipe(pipeline(version, masks), decoder_scheduler=SCHEDULERS[name]))


def combined(version: str, name: str, kinds: dict[str, type] = COMBINED, masks: bool = False) -> Any:
    prior = {"prior_" + key: part for key, (_, part) in kandinsky_prior_parts(version).items()}
    parts = {key: part for key, (_, part) in kandinsky_decoder_parts(version, masks).items()}
    return quiet(kinds[version](**prior, **parts | {"scheduler": SCHEDULERS[name]}))


def decoding(kind: type, version: str, name: str, masks: bool = False) -> Any:
    parts = {key: part for key, (_, part) in kandinsky_decoder_parts(version, masks).items()}
    return quiet(kind(**parts | {"scheduler": SCHEDULERS[name]}))


def quiet(pipe: DiffusionPipeline) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int = 2) -> list[Generator]:
    return [Generator().manual_seed(11 + number) for number in range(count)]


def of_stages(count: int = 2) -> tuple[list[Generator], ...]:
    """The prior's and the decoder's, as our pipelines make them of `generators(count)`."""
    return split_generators(generators(count), count)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def close(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), atol=1e-4, rtol=1e-5)


def zero(version: str, count: int) -> Tensor:
    """What the reference's prior pipeline returns to be guided away from."""
    return combined(version, "ddim").prior_pipe.get_zero_embed(count)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("version", VERSIONS)
def test_given_embeddings_are_drawn_as_diffusers_draws_them(version: str, scale: float, name: str) -> None:
    z_i, settings = random(2, EMBED_DIM, seed=1), {"num_inference_steps": 4, "guidance_scale": scale}
    away = random(2, EMBED_DIM, seed=2) if scale == 4 and name == "ddim" else None
    mine = ours(Text2ImagePipeline, version, name)(
        PROMPTS,
        image_embeds=z_i,
        negative_image_embeds=away,
        generator=generators(),
        output_type="np",
        **settings,
    )
    own = {"image_embeds": z_i, "negative_image_embeds": zero(version, 2) if away is None else away}
    own |= {"prompt": PROMPTS} if version == "2.1" else {}
    theirs = combined(version, name).decoder_pipe(**own, **settings, **SIZE, generator=of_stages()[1], output_type="np")
    close(mine.images, theirs.images)
    assert np.abs(mine.images[0] - mine.images[1]).max() > 0.01


STEPS = {"num_inference_steps": 4, "prior_num_inference_steps": 3}
ALONE = {"prior_candidates": 1}  # as the reference: it does not choose the best of several


@pytest.fixture
def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image's decoder goes on with the generator of its prior, as in the combined pipelines."""
    for module in ("text2image", "image_to_image"):  # inpainting splits them in the latter
        monkeypatch.setattr(
            f"t2i.pipelines.{module}.split_generators", lambda generators, count: (generators, generators)
        )


@pytest.fixture
def mask_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference without its `prepare_mask`, which moves the mask (see test_interop_kandinsky)."""
    for module in (pipeline_kandinsky_inpaint, pipeline_kandinsky2_2_inpainting):
        monkeypatch.setattr(module, "prepare_mask", lambda mask: mask)


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("version", VERSIONS)
def test_captions_become_the_pictures_of_the_combined_pipeline(version: str, scale: float, name: str) -> None:
    settings = {**STEPS, "guidance_scale": scale, "prior_guidance_scale": scale, "output_type": "np"}
    pipe, reference = ours(Text2ImagePipeline, version, name), combined(version, name)
    mine = pipe(PROMPTS, generator=generators(), **settings, **ALONE)
    theirs = reference(PROMPTS, generator=generators(), **settings, **SIZE)
    close(mine.images, theirs.images)
    prior = {"num_inference_steps": 3, "guidance_scale": scale, "generator": generators()}
    close(mine.image_embeds, reference.prior_pipe(PROMPTS, **prior).image_embeds)
    # Alone, without the padding to the longer caption.
    close(pipe(PROMPTS[0], generator=generators(1), **settings, **ALONE).images, theirs.images[:1])


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_usual_is_what_the_combined_pipeline_does_unasked(version: str) -> None:
    """Guidance of 4 in both stages; the 100 steps of the decoder are only compared."""
    pipe = ours(Text2ImagePipeline, version, "ddim")
    mine = pipe(PROMPTS[:1], generator=generators(1), **STEPS, **ALONE, output_type="np")
    theirs = combined(version, "ddim")(PROMPTS[:1], generator=generators(1), **STEPS, **SIZE, output_type="np")
    close(mine.images, theirs.images)
    assert (pipe.default_decoder_options, pipe.image_size) == ({"num_inference_steps": 100, "guidance_scale": 4.0}, 16)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_negative_prompt_guides_the_prior_as_in_diffusers_and_its_embedding_the_decoder(version: str) -> None:
    """The reference draws the negative prompt's own z_i beside, unguided: here it is given, for ours guides it."""
    negatives, reference = ["dogs", "a blue chair"], combined(version, "ddim")
    (priors, decoders), settings = of_stages(), {**QUICK, "output_type": "np"}
    z_i, away = reference.prior_pipe(
        PROMPTS, negatives, num_inference_steps=3, generator=[*priors, *of_stages(4)[0][2:]], return_dict=False
    )
    own = {"image_embeds": z_i, "negative_image_embeds": away} | ({"prompt": PROMPTS} if version == "2.1" else {})
    theirs = reference.decoder_pipe(**own, **settings, **SIZE, generator=decoders).images
    mine = ours(Text2ImagePipeline, version, "ddim")(
        PROMPTS,
        negatives,
        prior_num_inference_steps=3,
        negative_image_embeds=away,
        generator=generators(),
        **settings,
        **ALONE,
    )
    close(mine.image_embeds, z_i)
    close(mine.images, theirs)


# Images that are not only of noise

ROWS, COLUMNS = np.mgrid[:16, :16]
PICTURE = np.stack([ROWS * 16, COLUMNS * 16, (ROWS + COLUMNS) * 8], axis=-1).astype(np.uint8)
MASK = np.zeros((16, 16), np.uint8)
MASK[:, 8:] = 255


def z_i_of(version: str) -> Tensor:
    pipe = combined(version, "ddim")
    pixels = pipe.prior_image_processor(Image.fromarray(PICTURE), return_tensors="pt").pixel_values
    return pipe.prior_image_encoder(pixels).image_embeds


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_is_redrawn_as_diffusers_does(name: str) -> None:
    image, strength = Image.fromarray(PICTURE), {"strength": 0.5}
    settings = {**QUICK, "output_type": "latent"}
    mine = ours(ImageToImagePipeline, "2.2", name)(image, generator=generators(1), **settings, **strength)
    close(mine.image_embeds, z_i_of("2.2"))
    own = {"image_embeds": z_i_of("2.2"), "negative_image_embeds": zero("2.2", 1)}
    theirs = decoding(KandinskyV22Img2ImgPipeline, "2.2", name)(
        **own, image=image, generator=of_stages(1)[1], **settings, **strength, **SIZE
    )
    close(mine.images, theirs.images)


@pytest.mark.usefixtures("mask_as_given")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_is_inpainted_as_diffusers_does(name: str) -> None:
    image, mask = Image.fromarray(PICTURE), Image.fromarray(MASK)
    pipe = ours(InpaintPipeline, "2.2", name, masks=True)
    mine = pipe(image, mask, generator=generators(1), output_type="latent", **QUICK).images
    own: dict[str, Any] = {"image_embeds": z_i_of("2.2"), "negative_image_embeds": zero("2.2", 1)}
    own |= {"image": image, "mask_image": mask, "generator": of_stages(1)[1], **QUICK, **SIZE}
    close(mine, decoding(KandinskyV22InpaintPipeline, "2.2", name, True)(**own, output_type="latent").images)


@pytest.mark.usefixtures("mask_as_given")
@pytest.mark.parametrize("task", ["redrawn", "inpainted"])
def test_what_is_not_wanted_guides_the_decoder_of_2_2_away_in_every_task(task: str) -> None:
    """As in diffusers. Kandinsky's own repository deviates: there, the decoder's negative prompt is only for captions,
    and an image is redrawn and inpainted as if there were none."""
    image, away, masks = Image.fromarray(PICTURE), random(1, EMBED_DIM, seed=9), task == "inpainted"
    settings: dict[str, Any] = {**QUICK, "output_type": "latent", "image": image}
    settings |= {"mask_image": Image.fromarray(MASK)} if masks else {"strength": 0.5}
    kind, theirs = (
        (InpaintPipeline, KandinskyV22InpaintPipeline) if masks else (ImageToImagePipeline, KandinskyV22Img2ImgPipeline)
    )
    pipe = ours(kind, "2.2", "ddim", masks)
    mine = pipe(**settings, generator=generators(1), negative_image_embeds=away).images
    own = {"image_embeds": z_i_of("2.2"), "negative_image_embeds": away, "generator": of_stages(1)[1]}
    close(mine, decoding(theirs, "2.2", "ddim", masks)(**own, **settings, **SIZE).images)
    assert (mine - pipe(**settings, generator=generators(1)).images).abs().max() > 0.1
    with pytest.raises(InputError, match="negative_image_embeds must be a tensor of shape"):
        pipe(**settings, negative_image_embeds=away[0])


@pytest.mark.usefixtures("mask_as_given", "one_stream")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_caption_is_painted_into_a_picture_as_in_the_combined_pipeline(
    version: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's 2.1 deviates: it never puts the known latents back, and so changes all of the image."""
    image, mask = Image.fromarray(PICTURE), Image.fromarray(MASK)
    pipe = ours(InpaintPipeline, version, name, masks=True)
    settings = {**STEPS, "output_type": "np", "image": image, "mask_image": mask, "prompt": PROMPTS[1]}
    theirs = combined(version, name, INPAINTING, masks=True)(**settings, **SIZE, generator=generators(1)).images
    settings |= {**ALONE, "output_type": "latent"}
    mine = pipe(**settings, generator=generators(1)).images
    kept = pipe.encode_latents(torch.as_tensor(PICTURE).permute(2, 0, 1)[None] / 127.5 - 1)
    close(mine[..., :4], kept[..., :4])
    if version == "2.1":
        monkeypatch.setattr("t2i.pipelines.stages.build_blend_callback", lambda *_: lambda i, t, x: x)
        mine = pipe(**settings, generator=generators(1)).images
        assert (mine - kept)[..., :4].abs().max() > 0.1
    close(pipe.decode(mine, "np"), theirs)


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_picture_is_redrawn_for_a_caption_as_in_the_combined_pipeline(
    version: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's 2.1 deviates: it noises the image by a schedule of its own, not by that of its scheduler, and
    at another timestep than it then starts from. Told of the level where sampling starts, it agrees."""
    image, scheduler = Image.fromarray(PICTURE), SCHEDULERS[name]
    settings = {**STEPS, "output_type": "np", "image": image, "prompt": PROMPTS[1], "strength": 0.5}
    reference = combined(version, name, REDRAWING)
    mine = ours(ImageToImagePipeline, version, name)(**settings, **ALONE, generator=generators(1)).images
    if version == "2.1":
        unlike = reference(**settings, **SIZE, generator=generators(1)).images
        assert np.abs(unlike - mine).max() > 0.01

        def noised(self: Any, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
            assert int(t[0]) == 498 != scheduler.timesteps[2]
            return scheduler.add_noise(x, noise, scheduler.timesteps[2:3])

        monkeypatch.setattr(KandinskyImg2ImgPipeline, "add_noise", noised)
    theirs = reference(**settings, **SIZE, generator=generators(1)).images
    close(mine, theirs)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_pipeline_works_on_them(version: str, masks: bool) -> None:
    image, other, steps = Image.fromarray(PICTURE), Image.fromarray(PICTURE[::-1].copy()), {"num_inference_steps": 2}

    def of(kind: type) -> Any:
        return ours(kind, version, "ddim", masks)

    drawn = {
        "variation": of(ImageVariationPipeline)(image, **steps),
        "interpolation": of(InterpolationPipeline)([image, other], frames=3, **steps),
        "text diff": of(TextDiffPipeline)(image, "a cat", "a dog", **steps),
        "inpainting": of(InpaintPipeline)(image, Image.fromarray(MASK), prompt="a cat", **steps),
        "outpainting": of(OutpaintPipeline)(image, left=8, **steps),
        "image to image": of(ImageToImagePipeline)(image, prompt="a cat", **steps),
    }
    sizes = {name: {image.size for image in output.images} for name, output in drawn.items()}
    assert sizes == {name: {(24, 16) if name == "outpainting" else (16, 16)} for name in drawn}
    assert len(drawn["interpolation"].images) == 3


@pytest.mark.parametrize("version", VERSIONS)
def test_saved_it_loads_as_a_pipeline_of_this_project_and_draws_the_same(version: str, tmp_path: Path) -> None:
    pipe, settings = pipeline(version), {**STEPS, "output_type": "np"}
    pipe.save_pretrained(tmp_path / "saved")
    again = quiet(Text2ImagePipeline.from_pretrained(tmp_path / "saved"))
    drawn = [one(PROMPTS[1], generator=generators(1), **settings).images for one in (pipe, again)]
    assert np.array_equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("version", VERSIONS)
def test_it_draws_in_half_precision(version: str, dtype: torch.dtype) -> None:
    pipe = quiet(Text2ImagePipeline.from_pretrained(FOLDERS[version](), torch_dtype=dtype))
    models = (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    assert {part.dtype for part in models} == {dtype}
    output = pipe(PROMPTS, generator=generators(), **STEPS, output_type="np")
    assert output.image_embeds.dtype == torch.float32 and np.isfinite(output.images).all()
