"""Stable unCLIP in this project's pipelines and in diffusers': with the same noise the same images."""

import copy
import functools
from inspect import signature

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline
from PIL import Image
from t2i.pipelines.image_variation import ImageVariationPipeline
from t2i.pipelines.inpaint import InpaintPipeline
from t2i.pipelines.interpolation import InterpolationPipeline
from t2i.pipelines.text2image import Text2ImagePipeline
from torch import Generator, Tensor

from t2i.errors import InputError
from t2i.files.component import Component
from t2i.interop.prior_transformer import load_prior_transformer
from t2i.networks.public.transformers_clip import TransformersCLIP
from t2i.sampling.sample import split_generators
from tests.helpers.public_folders import EMBED_DIM
from tests.helpers.stable_unclip_folders import stable_unclip, stable_unclip_images
from tests.interop.test_stable_unclip import drawn, ours, reference

PROMPTS = ["a red cat and a dog", "cat"]
SCHEDULERS = {"own": None, "ddim": DDIMScheduler, "ddpm": DDPMScheduler}
# Those without fresh noise; each at the scale of x that is its own
SCHEDULERS |= {
    name: getattr(diffusers, f"{name}Scheduler") for name in ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete")
}
SCHEDULERS |= {name: getattr(diffusers, f"{name}MultistepScheduler") for name in ("DEIS", "DPMSolver", "UniPC")}


@functools.cache
def stable(images: bool = False):
    decoder, text_encoder, autoencoder = ours(images)
    if images:
        folder = stable_unclip_images()
        tower = Component(folder / "image_encoder", folder, stem="model")
        clip = TransformersCLIP.from_components(vision=tower, processor=folder / "feature_extractor")
    else:
        folder = stable_unclip()
        tower = Component(folder / "prior_text_encoder", folder, stem="model")
        clip = TransformersCLIP.from_components(text=tower, tokenizer=folder / "prior_tokenizer")
    theirs = reference(images)
    own = type(theirs.scheduler).from_config(theirs.scheduler.config)
    prior = {}
    if not images:
        prior["prior"] = load_prior_transformer(Component(folder / "prior", folder), clip)
        prior["prior_scheduler"] = DDPMScheduler.from_config(theirs.prior_scheduler.config)
    made = Text2ImagePipeline(clip, decoder, own, autoencoder, text_encoder=text_encoder, **prior)
    made.set_progress_bar_config(disable=True)
    return made


def with_scheduler(name: str, images: bool):
    """Both pipelines with another scheduler, of the same noise schedule."""
    theirs, mine = reference(images), stable(images)
    if (kind := SCHEDULERS[name]) is not None:
        original = theirs.scheduler
        theirs = type(theirs)(
            **{**theirs.components, "scheduler": kind.from_config(original.config, clip_sample=False)}
        )
        theirs.set_progress_bar_config(disable=True)
        mine = type(mine).from_pipe(mine, decoder_scheduler=kind.from_config(original.config, clip_sample=False))
    return theirs, mine


def same_noise(monkeypatch, theirs, noise: Tensor) -> None:
    """What diffusers noises embeddings with; its pipeline has no argument for it."""
    plain = type(theirs).noise_image_embeddings
    monkeypatch.setattr(
        type(theirs),
        "noise_image_embeddings",
        lambda self, image_embeds, noise_level, generator=None: plain(self, image_embeds, noise_level, noise),
    )


@pytest.mark.parametrize("level", [0, 400])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize(("count", "scheduler"), [(1, "own"), (2, "own"), (2, "ddim")])
def test_given_embeddings_become_the_pictures_of_diffusers(monkeypatch, level, scale, count, scheduler):
    theirs, mine = with_scheduler(scheduler, True)
    z_i, noise, x = drawn(count, 20), drawn(count, 20, seed=1), drawn(count, 4, 8, 8, seed=2)
    same_noise(monkeypatch, theirs, noise)
    settings = {"num_inference_steps": 4, "guidance_scale": scale, "latents": x, "noise_level": level}
    prompts = PROMPTS[:count]
    expected = theirs(prompt=prompts, image_embeds=z_i, output_type="pt", **settings).images
    got = mine(prompts, image_embeds=z_i, image_embeds_noise=noise, output_type="pt", **settings).images
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what diffusers calls of NumPy
@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name not in ("own", "ddim", "ddpm")])
def test_a_scheduler_in_the_place_of_the_own_draws_what_it_draws_in_diffusers(monkeypatch, scheduler):
    theirs, mine = with_scheduler(scheduler, True)
    z_i, noise, x = drawn(1, 20), drawn(1, 20, seed=1), drawn(1, 4, 8, 8, seed=2)
    same_noise(monkeypatch, theirs, noise)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    theirs.scheduler.set_timesteps(4)
    start = x * theirs.scheduler.init_noise_sigma  # diffusers scales the latents that it draws alone
    expected = theirs(prompt=PROMPTS[:1], image_embeds=z_i, latents=start, **settings).images
    got = mine(PROMPTS[:1], image_embeds=z_i, image_embeds_noise=noise, latents=x, **settings).images
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("scheduler", ["own", "ddim"])
def test_prompts_become_the_pictures_of_diffusers(monkeypatch, count, scale, scheduler):
    """Through a Karlo prior, sampled by diffusers' DDPM; the small variant's own scheduler is PNDM."""
    theirs, mine = with_scheduler(scheduler, False)
    noise, x = drawn(count, EMBED_DIM, seed=1), drawn(count, 4, 8, 8, seed=2)
    same_noise(monkeypatch, theirs, noise)
    settings = {"num_inference_steps": 5, "latents": x, "noise_level": 90, "output_type": "pt"}
    settings |= {"prior_num_inference_steps": 5, "prior_latents": drawn(count, EMBED_DIM, seed=3)}
    settings |= {"prior_guidance_scale": scale, "guidance_scale": 2.5 * scale if scale > 1 else 1.0}
    generators = [Generator().manual_seed(seed) for seed in range(count)]
    own, _ = split_generators([one.clone_state() for one in generators], count)
    embeddings = []
    finish = type(theirs.prior).post_process_latents
    monkeypatch.setattr(
        theirs.prior, "post_process_latents", lambda x: embeddings.append(finish(theirs.prior, x)) or embeddings[0]
    )
    expected = theirs(PROMPTS[:count], generator=own, **settings).images
    got = mine(PROMPTS[:count], generator=generators, image_embeds_noise=noise, **settings)
    torch.testing.assert_close(got.image_embeds, embeddings[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.images, expected, atol=1e-5, rtol=1e-5)


def pictures(count: int) -> list[Image.Image]:
    values = torch.rand(count, 16, 16, 3, generator=Generator().manual_seed(5))
    return [Image.fromarray((255 * one).byte().numpy()) for one in values]


@pytest.mark.parametrize("negative", [None, ["a dog", "red"]])
@pytest.mark.parametrize("prompts", [None, PROMPTS])
@pytest.mark.parametrize("scheduler", ["own", "ddpm"])
def test_variations_are_those_of_diffusers(monkeypatch, prompts, negative, scheduler):
    theirs, mine = with_scheduler(scheduler, True)
    noise, x = drawn(2, 20, seed=1), drawn(2, 4, 8, 8, seed=2)
    same_noise(monkeypatch, theirs, noise)
    settings = {"num_inference_steps": 4, "latents": x, "noise_level": 30, "output_type": "pt"}
    generators = [Generator().manual_seed(seed) for seed in (1, 2)]
    _, own = split_generators([one.clone_state() for one in generators], 2)
    settings["negative_prompt"] = negative
    expected = theirs(pictures(2), prompts, generator=own, **settings).images
    mine = ImageVariationPipeline.from_pipe(mine)
    got = mine(pictures(2), prompts, generator=generators, image_embeds_noise=noise, **settings).images
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_negative_prompt_of_diffusers_is_one_of_the_decoder_with_zero_embeddings(monkeypatch):
    theirs, mine = reference(True), stable(True)
    z_i, noise, x = drawn(2, 20), drawn(2, 20, seed=1), drawn(2, 4, 8, 8, seed=2)
    same_noise(monkeypatch, theirs, noise)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "latents": x, "output_type": "pt"}
    expected = theirs(prompt=PROMPTS, image_embeds=z_i, negative_prompt=["a dog", "red"], **settings).images
    nothing = torch.zeros(2, 20)
    settings |= {"decoder_negative_prompt": ["a dog", "red"], "negative_image_embeds": nothing}
    got = mine(PROMPTS, image_embeds=z_i, image_embeds_noise=noise, **settings).images
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_other_sides_and_half_precision(monkeypatch):
    theirs, mine = reference(True), stable(True)
    z_i, noise, x = drawn(1, 20), drawn(1, 20, seed=1), drawn(1, 4, 4, 12, seed=2)
    same_noise(monkeypatch, theirs, noise)
    settings = {"num_inference_steps": 3, "latents": x, "output_type": "pt", "height": 8, "width": 24}
    expected = theirs(prompt="cat", image_embeds=z_i, **settings).images
    got = mine("cat", image_embeds=z_i, image_embeds_noise=noise, **settings).images
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    halves = {name: copy.deepcopy(mine.components[name]).bfloat16() for name in ("clip", "decoder", "autoencoder")}
    half = type(mine).from_pipe(mine, **halves, text_encoder=copy.deepcopy(mine.text_encoder).bfloat16())
    rounded = half("cat", image_embeds=z_i, image_embeds_noise=noise, **settings).images
    assert 0 < (rounded.float() - got).abs().mean() < 0.05


def test_usual_steps_and_guidance_are_those_of_diffusers():
    defaults = signature(StableUnCLIPImg2ImgPipeline.__call__).parameters
    usual = stable(True).default_decoder_options
    assert {name: defaults[name].default for name in usual} == usual


def test_the_noise_of_a_picture_is_its_own_whatever_the_batch():
    mine, z_i = stable(True), drawn(3, 20)
    settings = {"num_inference_steps": 2, "noise_level": 500, "output_type": "pt"}
    seeds = [Generator().manual_seed(seed) for seed in (1, 2, 3)]
    together = mine(image_embeds=z_i, generator=seeds, **settings).images
    alone = mine(image_embeds=z_i[1:2], generator=[Generator().manual_seed(2)], **settings).images
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    same = {"image_embeds": z_i[:1].repeat(2, 1), "latents": drawn(1, 4, 8, 8).repeat(2, 1, 1, 1), **settings}
    first, second = mine(generator=seeds[:2], **same).images
    assert (first - second).abs().max() > 1e-4  # of the noise of z_i alone


def test_what_cannot_be_is_said():
    mine, variations = stable(True), ImageVariationPipeline.from_pipe(stable(True))
    with pytest.raises(InputError, match="no prior and no text encoder of its CLIP: it draws from images"):
        mine("a red cat")
    with pytest.raises(InputError, match="no image encoder in the folder"):
        ImageVariationPipeline.from_pipe(stable())(pictures(1))
    for level in (-1, 1000, 2.5):
        with pytest.raises(InputError, match=f"noise_level must be an integer from 0 to .*, got {level}"):
            variations(pictures(1), noise_level=level)
    with pytest.raises(InputError, match=r"image_embeds_noise must be a tensor of shape \(1, 20\), got \(2, 20\)"):
        variations(pictures(1), image_embeds_noise=drawn(2, 20))
    with pytest.raises(InputError, match="noise_level must be 0 for inverted images"):
        variations(pictures(1), eta=0.0, noise_level=3)


def test_a_decoder_without_noising_refuses_its_options(pipeline):
    with pytest.raises(InputError, match="noise_level needs a decoder that adds noise to image_embeds"):
        pipeline("a red circle", noise_level=3)
    with pytest.raises(InputError, match="image_embeds_noise needs a decoder"):
        pipeline("a red circle", image_embeds_noise=torch.zeros(1, pipeline.clip.embed_dim))


def test_a_picture_is_inverted_and_drawn_again_by_the_same_condition(monkeypatch):
    mine, told = ImageVariationPipeline.from_pipe(stable(True)), []
    step = mine.decoder.step

    def watched(x: Tensor, t: Tensor, context) -> Tensor:
        told.append(context.arguments["class_labels"])
        return step(x, t, context)

    monkeypatch.setattr(mine.decoder, "step", watched)
    mine(pictures(2), eta=0.0, num_inference_steps=20, output_type="latent")
    assert len(told) > 40 and all(torch.equal(labels, told[0]) for labels in told)


def test_pictures_are_interpolated_and_inpainted():
    mine = InterpolationPipeline.from_pipe(stable(True))
    settings = {"num_inference_steps": 2, "noise_level": 100, "generator": Generator().manual_seed(0)}
    assert len(mine(pictures(2), frames=3, inverted=False, **settings).images) == 3
    with pytest.raises(InputError, match="image_embeds_noise is not allowed in an interpolation"):
        mine(pictures(2), frames=3, image_embeds_noise=drawn(3, 20))
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9] = 255
    picture = pictures(1)[0]
    for model, more in ((mine, {}), (stable(), {"prompt": "a dog", "strength": 0.5, "prior_num_inference_steps": 2})):
        seen = []
        watch = {"on_preview": lambda preview, seen=seen: seen.append(preview.step == preview.steps)}
        painted = InpaintPipeline.from_pipe(model)(
            picture, mask, **settings | {"num_inference_steps": 4} | more | watch
        )
        assert np.array_equal(np.asarray(painted.images[0])[mask == 0], np.asarray(picture)[mask == 0])
        assert seen[-1]
