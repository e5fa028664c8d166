"""Habits of loading, saving and calling."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from t2i import (
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    InputError,
    InterpolationPipeline,
    PriorPipeline,
    Text2ImagePipeline,
)
from tests.commands.test_cli import run
from tests.helpers.habits import PRIOR, QUICK, differs, draw, other, photo, refuse, same, works
from tests.helpers.kandinsky_folders import kandinsky_22_controlnet, kandinsky_22_prior
from tests.helpers.karlo_folders import karlo
from tests.helpers.stages import seeds


def upper_half(width: int = 32, height: int = 32, white: int = 255) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2] = white
    return Image.fromarray(mask)


# Load and save


@differs("`DiffusionPipeline.from_pretrained`")
def load_by_a_class_of_diffusers(pipeline_folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(pipeline_folder)
    loaded = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder, trust_remote_code=True)
    assert type(loaded) is Text2ImagePipeline
    assert isinstance(ImageVariationPipeline.from_pretrained(pipeline_folder), ImageVariationPipeline)


@works("`from_pretrained(torch_dtype=, variant=, unet=, scheduler=)`")
def load_with_arguments_of_diffusers(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, variant="fp16")
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    settings = {"torch_dtype": torch.bfloat16, "variant": "fp16", "scheduler": scheduler, "unet": pipe.unet}
    loaded = Text2ImagePipeline.from_pretrained(tmp_path, **settings)
    assert loaded.prior.dtype == torch.bfloat16
    assert loaded.unet is pipe.unet and loaded.decoder_scheduler is scheduler


@works("`from_pipe`, `**pipe.components`")
def share_components(pipe: Any) -> None:
    assert ImageToImagePipeline.from_pipe(pipe).unet is pipe.unet
    same(draw(Text2ImagePipeline(**pipe.components)), draw(pipe))


@works("`save_pretrained(variant=, max_shard_size=)`")
def save_in_shards(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    assert len(list(tmp_path.glob("decoder/*.fp16-*.safetensors")) + list(tmp_path.glob("decoder/*.fp16*"))) > 1
    same(draw(Text2ImagePipeline.from_pretrained(tmp_path, variant="fp16")), draw(pipe))


@differs("`safe_serialization=False`, `.bin` files")
def load_pickles(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="only .safetensors is loaded; `t2i convert "):
        Text2ImagePipeline.from_pretrained(tmp_path)


@differs("`from_single_file`")
def load_a_single_file() -> None:
    assert not hasattr(Text2ImagePipeline, "from_single_file")


@works("`KandinskyV22PriorPipeline`")
def sample_the_prior_apart(pipe: Any) -> None:
    sampled = PriorPipeline.from_pipe(pipe)("red circle", "green", generator=seeds(1)[0], **PRIOR)
    drawn = pipe(**sampled, guidance_scale=3.0, **QUICK)
    same(drawn.image_embeds, draw_result(pipe, negative_prompt="green").image_embeds)
    reader = Text2ImagePipeline.from_pretrained(karlo())  # its decoder also reads the prompt
    reader.set_progress_bar_config(disable=True)
    sampled = PriorPipeline.from_pipe(reader)("red circle", generator=seeds(1)[0], **PRIOR)
    same(draw_result(reader, **sampled).images, draw_result(reader).images)


@differs("`image_embeds, negative_image_embeds = prior_pipe(prompt).to_tuple()`")
def unpack_what_the_prior_returns(pipe: Any) -> None:
    prior = PriorPipeline.from_pipe(pipe)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0}
    for negative in (None, "green"):
        embeds, unwanted = prior("red circle", negative, generator=seeds(1)[0], **settings).to_tuple()
        assert (unwanted is None) == (negative is None)
        drawn = pipe(image_embeds=embeds, negative_image_embeds=unwanted, num_images_per_prompt=2, **QUICK).images
        assert drawn.shape == (2, 3, 32, 32)


def draw_result(pipe: Any, **settings: Any) -> Any:
    return pipe("red circle", generator=seeds(1)[0], **QUICK, **settings)


# Call


@works("lists of `prompt`, `negative_prompt`, `generator`")
def draw_a_list(pipe: Any) -> None:
    texts = {"prompt": ["red circle", "a dog"], "negative_prompt": ["green", "blue"]}
    several = pipe(**texts, num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), **QUICK).images
    same(several[3:], pipe("a dog", "blue", generator=seeds(4), **QUICK).images)


@differs("one `generator` for several images")
def share_a_generator(pipe: Any) -> None:
    several = draw(pipe, num_images_per_prompt=2)
    same(several[:1], draw(pipe))  # in diffusers, noise of one batch is drawn at once
    other(several[1:], several[:1])


@differs("`height`, `width`")
def choose_a_size(pipe: Any) -> None:
    assert draw(pipe, height=48, width=32).shape == (1, 3, 48, 32)
    with pytest.raises(InputError, match="height must be a multiple of"):
        draw(pipe, height=33)


@works("`latents`, `output_type`, `return_dict=False`")
def give_and_take_latents(pipe: Any) -> None:
    noise = torch.randn(1, *pipe.latent_shape, generator=seeds(3)[0])
    z_i = draw_result(pipe).image_embeds
    result = [pipe(image_embeds=z_i, latents=noise, generator=seeds(n), **QUICK).images for n in (1, 2)]
    same(*result)
    latents, returned = pipe(image_embeds=z_i, latents=noise, return_dict=False, **QUICK | {"output_type": "latent"})
    same(returned, z_i)
    with torch.no_grad():
        same((pipe.vae.decode(latents) / 2 + 0.5).clamp(0, 1), result[0])
    assert draw(pipe, output_type="np").shape == (1, 32, 32, 3) and draw(pipe, output_type="pil")[0].size == (32, 32)


@differs("`prompt_embeds`")
def give_encodings(pipe: Any) -> None:
    text = pipe.encode_prompt("red circle").expand()
    for embeds in (text, (text.states, text.embedding, text.mask)):
        same(pipe(prompt_embeds=embeds, generator=seeds(1), **QUICK).images, draw(pipe))
    with pytest.raises(InputError, match="the prior also reads the text's one embedding"):
        pipe(prompt_embeds=text.states)


@works("`timesteps`, `sigmas`, `eta`, `guidance_rescale`")
def choose_noise_levels(pipe: Any) -> None:
    plain = draw(pipe, guidance_scale=3.0)
    for settings in ({"timesteps": [900, 300]}, {"eta": 0.9}, {"guidance_rescale": 0.7}):
        other(draw(pipe, guidance_scale=3.0, **settings), plain)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert draw(pipe, sigmas=[5.0, 1.0, 0.0]).isfinite().all()


@differs("Karlo's `decoder_guidance_scale`, `decoder_num_inference_steps`")
def name_the_decoder(pipe: Any) -> None:
    refuse(pipe, decoder_guidance_scale=2.0)
    refuse(pipe, decoder_num_inference_steps=2)
    other(draw(pipe, guidance_scale=9.0), draw(pipe, guidance_scale=1.0))


@differs("`hint`")
def draw_by_a_depth_map() -> None:
    pipe = Text2ImagePipeline.from_pretrained(kandinsky_22_controlnet(), prior=kandinsky_22_prior())
    pipe.set_progress_bar_config(disable=True)
    z_i = torch.randn(1, pipe.clip.embed_dim, generator=seeds(0)[0])
    settings = {"image_embeds": z_i, "num_inference_steps": 2, "output_type": "pt"}
    with pytest.raises(TypeError, match="unknown argument 'hint'"):
        pipe(hint=photo(), **settings)
    drawn = [pipe(control_image=photo(seed=n), generator=seeds(1), **settings).images for n in (0, 1)]
    other(*drawn)


@differs("`pipe(prompt, image)`")
def swap_prompt_and_image(pipe: Any) -> None:
    redraw = ImageToImagePipeline.from_pipe(pipe)
    with pytest.raises(InputError, match="prompt must be a text, got"):
        redraw("red circle", photo())
    by_name = redraw(prompt="red circle", image=photo(), generator=seeds(1), **QUICK)
    same(by_name.images, redraw(photo(), "red circle", generator=seeds(1), **QUICK).images)


@differs("`image` of another shape")
def give_a_wide_picture(pipe: Any) -> None:
    redraw, wide = ImageToImagePipeline.from_pipe(pipe), photo(64, 32)
    drawn = [redraw(one, "a", generator=seeds(1), **QUICK).images for one in (wide, wide.crop((16, 0, 48, 32)))]
    same(*drawn)


@works("white of `mask_image` is painted")
def paint_where_it_is_white(pipe: Any) -> None:
    paint = InpaintPipeline.from_pipe(pipe)
    settings = {"prompt": "red circle", "image": photo(), "generator": seeds(1), **QUICK, "output_type": "pil"}
    painted = np.asarray(paint(mask_image=upper_half(white=128), **settings).images[0])
    assert (painted[16:] == np.asarray(photo())[16:]).all() and (painted[:16] != np.asarray(photo())[:16]).any()


@works("`mask_image` of another size, `padding_mask_crop`")
def give_a_small_mask(pipe: Any) -> None:
    paint, settings = InpaintPipeline.from_pipe(pipe), {"prompt": "red circle", **QUICK}
    masks = (upper_half(), upper_half(16, 16))
    same(*(paint(photo(), mask, generator=seeds(1), **settings).images for mask in masks))
    painted = paint(photo(64, 64), upper_half(64, 64), padding_mask_crop=8, **settings).images
    assert painted.shape == (1, 3, 64, 64)
    same(painted[0, :, 33:], torch.from_numpy(np.array(photo(64, 64))).permute(2, 0, 1)[:, 33:] / 255)


@works("`negative_prompt` of a variation")
def vary_away_from_a_text(pipe: Any) -> None:
    vary = ImageVariationPipeline.from_pipe(pipe)
    settings = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 9.0}
    drawn = [vary(photo(), generator=seeds(1), negative_prompt=text, **settings).images for text in (None, "a dog")]
    other(*drawn)


@differs("`prior.interpolate`")
def mix_texts_and_pictures(pipe: Any) -> None:
    assert not hasattr(PriorPipeline, "interpolate")
    frames = InterpolationPipeline.from_pipe(pipe)(["a cat", photo()], frames=3, generator=seeds(1)[0], **QUICK).images
    assert frames.shape == (3, 3, 32, 32)


@differs("`clip_skip`, `cross_attention_kwargs`")
def give_what_is_not_taken(pipe: Any) -> None:
    refuse(pipe, clip_skip=1)
    refuse(pipe, cross_attention_kwargs={})


@works('"PNG info" of a web UI')
def read_settings_of_an_image(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    theirs = PngInfo()
    theirs.add_text("parameters", "a cat\nNegative prompt: a dog\nSteps: 20, Sampler: Euler a, Seed: 3, Size: 8x8")
    photo(8, 8).save(tmp_path / "a.png", pnginfo=theirs)
    status, out, _ = run(monkeypatch, capsys, "show", tmp_path / "a.png")
    shown = ["prompt: a cat", "negative_prompt: a dog", "Steps: 20", "Sampler: Euler a", "Seed: 3", "Size: 8x8"]
    assert status == 0 and out.splitlines() == shown


@differs('"send to txt2img"')
def draw_with_the_settings_of_an_image(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, pipeline_folder: Path, tmp_path: Path
) -> None:
    words = ["generate", "--model", pipeline_folder, "--out"]
    settings = ["red circle", "--seed", 7, "--steps", 2, "--prior-steps", 2, "--guidance-scale", 3]
    _, out, _ = run(monkeypatch, capsys, *words, tmp_path / "one", *settings)
    first = Path(out.strip())
    _, out, _ = run(monkeypatch, capsys, *words, tmp_path / "two", "--like", first)
    again = Path(out.strip())
    assert again != first and again.read_bytes() == first.read_bytes()
    photo(8, 8).save(tmp_path / "a.png")
    status, _, err = run(monkeypatch, capsys, *words, tmp_path / "two", "--like", tmp_path / "a.png")
    assert status == 2 and "contains no settings" in err
