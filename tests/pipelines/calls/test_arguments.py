"""Arguments of public methods: what is no text, image or tensor is refused in one line, before any work."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny, DDIMScheduler, VQModel
from PIL import Image
from t2i.pipelines.calls.aliases import call_networks

from t2i import (
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    InputError,
    InterpolationPipeline,
    Text2ImagePipeline,
    TextDiffPipeline,
    UpsamplePipeline,
)
from t2i.networks.upsampler import Upsampler
from tests.helpers.stages import seeds
from tests.networks.test_upsampler import UNET

PICTURE = Image.new("RGB", (32, 32), "red")


def test_one_text_is_one_prompt(pipeline):
    one, listed = pipeline.encode_prompt(prompt="a cat"), pipeline.encode_prompt(["a cat"])
    assert len(one) == 1 and torch.equal(one.embedding, listed.embedding)


@pytest.mark.parametrize(
    ("method", "argument", "message"),
    (
        ("encode_prompt", 3, "prompt must be a text or a list of texts, got 3"),
        ("encode_prompt", [], "prompt is missing"),
        ("encode_prompt", ["a", None], "prompt must be a text or a list of texts"),
        ("encode_image", PICTURE, r"images must be a tensor of shape \(N, 3, H, W\), got Image"),
        ("encode_image", torch.zeros(3, 32, 32), r"images must be a tensor of shape \(N, 3, H, W\), got \(3, 32, 32\)"),
        ("encode_image", torch.full((1, 3, 8, 8), 255.0), r"images must be floats in \[-1, 1\]"),
        ("encode_image", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"images must be floats in \[-1, 1\]"),
        ("encode_latents", torch.zeros(1, 3, 33, 32), "height of images must be a multiple of 4, got 33"),
        ("encode_latents", torch.full((1, 3, 8, 8), torch.nan), "images must be finite"),
        ("decode", torch.zeros(4, 8, 8), r"latents must be a tensor of shape \(N, 4, h, w\), got \(4, 8, 8\)"),
        ("decode_images", torch.zeros(1, 3, 8, 8), r"latents must be a tensor of shape \(N, 4, h, w\)"),
        ("normalize_embeds", torch.zeros(2, 5), r"z_i must be a tensor of shape \(N, 32\), got \(2, 5\)"),
    ),
)
def test_methods_refuse_what_is_no_input(pipeline, method, argument, message):
    with pytest.raises(InputError, match=message):
        getattr(pipeline, method)(argument)


def test_a_form_of_output_that_there_is_not(pipeline):
    with pytest.raises(InputError, match="output_type must be one of pil, np, pt, latent; got 'jpg'"):
        pipeline.decode(torch.zeros(1, 4, 8, 8), "jpg")


@pytest.mark.parametrize("picture", (PICTURE, np.zeros((32, 32, 3), np.uint8), torch.zeros(3, 32, 32)))
def test_prompt_and_picture_in_the_wrong_order(pipeline, picture):
    for kind, more in ((ImageToImagePipeline, ()), (InpaintPipeline, (PICTURE,))):
        with pytest.raises(InputError, match="prompt must be a text, got an image|image 'a cat' is no file"):
            kind.from_pipe(pipeline)("a cat", *more, picture)
    with pytest.raises(InputError, match="source must be a text, got an image"):
        TextDiffPipeline.from_pipe(pipeline)("a cat", picture, "a dog")


@pytest.mark.parametrize("text", ("a cat", Path("a cat")))
def test_a_text_in_the_place_of_an_image_is_no_file_anywhere(pipeline, text):
    kinds = ImageVariationPipeline, InpaintPipeline, InterpolationPipeline
    vary, paint, mix = (kind.from_pipe(pipeline) for kind in kinds)
    for call in (
        lambda: vary(text),
        lambda: vary.invert(text),
        lambda: paint(PICTURE, text, "a dog"),
        lambda: mix([Path("a cat"), "a dog"]),
        lambda: pipeline("a dog", control_image=text),
        lambda: UpsamplePipeline(Upsampler(2, 8, UNET, patch_size=2), DDIMScheduler())(text),
    ):
        with pytest.raises(InputError, match="'a cat' is no file; give an image or the path of one$"):
            call()
    for call in (lambda: vary.invert("a cat", PICTURE), lambda: vary("a cat", [PICTURE])):
        with pytest.raises(InputError, match="^prompt must be a text, got an image .*; give both by name, image=..."):
            call()


@pytest.mark.parametrize("name", ("a cat", "x" * 5000, "nowhere.png", "a\0b"))
def test_a_picture_that_is_no_file(pipeline, name):
    with pytest.raises(InputError, match="^image .* is no file; give an image or the path of one$"):
        ImageToImagePipeline.from_pipe(pipeline)(name, "a cat")


def test_given_embeddings_are_drawn_as_often_as_asked_for(pipeline):
    embeds = torch.randn(2, 32, generator=seeds(0)[0])
    quick = {"num_inference_steps": 2, "output_type": "latent"}
    four = pipeline(image_embeds=embeds, num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), **quick)
    rows = pipeline(image_embeds=embeds.repeat_interleave(2, dim=0), generator=seeds(1, 2, 3, 4), **quick)
    torch.testing.assert_close(four.images, rows.images, rtol=0, atol=0)
    prompts = {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2}
    shown = [
        pipeline(image_embeds=z_i, generator=seeds(1, 2, 3, 4), **prompts, **quick).images
        for z_i in (embeds, embeds.repeat_interleave(2, dim=0))
    ]
    torch.testing.assert_close(*shown, rtol=0, atol=0)
    with pytest.raises(InputError, match="image_embeds has 3 rows for 4 images"):
        pipeline(image_embeds=embeds[[0, 0, 0]], **prompts)


def test_names_of_diffusers_read_and_write_the_parts(pipeline, pipeline_folder):
    assert (pipeline.scheduler, pipeline.unet, pipeline.vae) == (
        pipeline.decoder_scheduler,
        pipeline.decoder,
        pipeline.autoencoder,
    )
    other = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = other
    assert pipeline.decoder_scheduler is other
    assert Text2ImagePipeline.from_pipe(pipeline, scheduler=other).decoder_scheduler is other
    assert Text2ImagePipeline.from_pretrained(pipeline_folder, scheduler=other).decoder_scheduler is other
    with pytest.raises(InputError, match="scheduler is decoder_scheduler, which is given too"):
        Text2ImagePipeline.from_pipe(pipeline, scheduler=other, decoder_scheduler=other)


def test_a_pipeline_from_a_pipe_in_another_precision(pipeline):
    half = Text2ImagePipeline.from_pipe(pipeline, torch_dtype=torch.bfloat16)
    assert half.decoder.dtype == half.clip.dtype == torch.bfloat16
    assert half("a cat", num_inference_steps=2, output_type="pt").images.isfinite().all()
    for arguments, message in (
        ({"dtype": "half"}, "dtype must be a torch.dtype"),
        ({"tokenizer": 3}, "'tokenizer' is no component"),
    ):
        with pytest.raises(InputError, match=message):
            Text2ImagePipeline.from_pipe(pipeline, **arguments)


def test_the_autoencoder_decodes_in_slices_and_tiles(pipeline):
    latents = torch.randn(2, 4, 24, 24, generator=seeds(0)[0])
    whole = pipeline.decode(latents, "pt")
    pipeline.enable_vae_slicing()
    assert pipeline.autoencoder.coder.use_slicing
    torch.testing.assert_close(pipeline.decode(latents, "pt"), whole, atol=1e-5, rtol=0)
    pipeline.disable_vae_slicing()
    pipeline.enable_vae_tiling()
    assert pipeline.autoencoder.coder.tile_latent_min_size >= pipeline.decoder.config.latent_size
    assert (pipeline.decode(latents, "pt") - whole).abs().max() > 1e-4
    pipeline.disable_vae_tiling()
    torch.testing.assert_close(pipeline.decode(latents, "pt"), whole, rtol=0, atol=0)


def test_an_autoencoder_of_another_class_is_refused(pipeline):
    for kind in (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny):
        with pytest.raises(InputError, match=f"^autoencoder must be a .*, a {kind.__name__}$"):
            pipeline.vae = kind()


def test_the_unet_is_changed_by_the_methods_of_diffusers(pipeline):
    quick = {"num_inference_steps": 2, "output_type": "latent"}
    plain = pipeline("a cat", generator=seeds(0), **quick).images
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert (pipeline("a cat", generator=seeds(0), **quick).images - plain).abs().max() > 1e-4
    pipeline.disable_freeu()
    pipeline.fuse_qkv_projections()
    fused = pipeline("a cat", generator=seeds(0), **quick).images
    pipeline.unfuse_qkv_projections()
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(pipeline("a cat", generator=seeds(0), **quick).images, plain, rtol=0, atol=0)


def test_methods_on_networks_that_there_are_not_are_refused(pipeline):
    with pytest.raises(InputError, match="^enable_freeu is not for a Prior: no network in it has that$"):
        call_networks("enable_freeu", [(pipeline.decoder, "unet"), (pipeline.prior, "unet")])
    with pytest.raises(InputError, match="^enable_tiling: .*VQModel"):
        call_networks("enable_tiling", [(SimpleNamespace(coder=VQModel(layers_per_block=1)), "coder")])


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"upsample_steps": 2}, "upsample_steps has no effect without upsample"),
        ({"preview_every": 2}, "preview_every has no effect without on_preview"),
        (
            {"prior_candidates": 3, "image_embeds": torch.ones(1, 32)},
            "prior_candidates has no effect beside image_embeds",
        ),
        (
            {"prior_candidates": 3, "prior_latents": torch.ones(1, 32)},
            "prior_candidates has no effect beside prior_latents",
        ),
        ({"timesteps": [900, 500]}, "num_inference_steps has no effect beside timesteps"),
        ({"guidance_scale": 1.0, "guidance_rescale": 0.5}, "guidance_rescale has no effect: the decoder is not guided"),
        ({"guidance_scale": {"scale": 1.0, "rescale": 0.5}}, "guidance_scale has no effect beyond its scale: 1 is no"),
        ({"sampler": "ddim", "use_clipped_model_output": True}, "has no effect: this scheduler clips nothing"),
        ({"upsample_steps": 4, "preview_every": 1, "prior_candidates": None, "image_embeds": torch.ones(1, 32)}, ""),
    ),
)
def test_arguments_without_an_effect_are_named(pipeline, caplog, settings, message):
    pipeline("a cat", num_inference_steps=2, prior_num_inference_steps=25, output_type="latent", **settings)
    assert message in caplog.text and (message or "no effect" not in caplog.text)


def test_frames_beside_weights_are_named(pipeline, caplog):
    mix = InterpolationPipeline.from_pipe(pipeline)
    mix(["a", "b"], [1.0, 2.0], 5, num_inference_steps=1, prior_num_inference_steps=1, output_type="latent")
    assert "frames has no effect beside weights" in caplog.text
