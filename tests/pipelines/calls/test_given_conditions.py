"""Conditions that are given in place of prompts and images, and the prior that makes them by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from t2i.pipelines import OutpaintPipeline

from t2i import ImageToImagePipeline, InpaintPipeline, InputError, PriorPipeline, Text2ImagePipeline
from tests.helpers.stages import seeds

QUICK = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "output_type": "latent"}


def same(first, second):
    torch.testing.assert_close(first.images, second.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(first.image_embeds, second.image_embeds, rtol=0, atol=1e-6)


def as_tuple(pipeline, prompt):
    text = pipeline.encode_prompt(prompt).expand()
    return text.states, text.embedding, text.mask


@pytest.mark.parametrize("form", ("encoding", "tuple"))
def test_encodings_draw_what_their_prompts_draw(pipeline, form, monkeypatch):
    prompts, negative = ["red circle", "a long blue square"], "green"
    drawn = pipeline(prompts, negative, 2, seeds(1, 2, 3, 4), **QUICK)
    encode = pipeline.encode_prompt if form == "encoding" else lambda prompt: as_tuple(pipeline, prompt)
    embeds = {"prompt_embeds": encode(prompts), "negative_prompt_embeds": encode(negative)}
    monkeypatch.setattr(pipeline.clip, "encode_tokens", lambda *_: pytest.fail("the texts are encoded already"))
    same(pipeline(num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), **embeds, **QUICK), drawn)


def test_weighted_states_draw_something_else(pipeline):
    states, pooled, mask = as_tuple(pipeline, "red circle")
    plain = pipeline("red circle", generator=seeds(1), **QUICK)
    weighted = pipeline(prompt_embeds=(states * 1.3, pooled, mask), generator=seeds(1), **QUICK)
    assert (weighted.image_embeds - plain.image_embeds).abs().max() > 1e-4


def test_embeddings_have_the_length_of_the_clips(pipeline):
    states, pooled, mask = as_tuple(pipeline, "red circle")
    embeds = {"prompt_embeds": (states, 3 * pooled, mask), "generator": seeds(1)}
    torch.testing.assert_close(
        pipeline(**embeds, **QUICK).images, pipeline("red circle", generator=seeds(1), **QUICK).images
    )


@pytest.mark.parametrize("kind", (ImageToImagePipeline, InpaintPipeline, OutpaintPipeline))
def test_pictures_are_drawn_from_with_given_conditions(pipeline, kind):
    picture, mask = torch.rand(2, 3, 32, 32, generator=seeds(0)[0]), torch.zeros(32, 32)
    mask[8:] = 1
    more = {InpaintPipeline: {"mask_image": mask}, OutpaintPipeline: {"left": 8}}.get(kind, {})
    pipe, text = kind.from_pipe(pipeline), pipeline.encode_prompt("red circle")
    by_prompt = pipe(picture, prompt="red circle", generator=seeds(1, 2), **more, **QUICK)
    same(pipe(picture, prompt_embeds=text, generator=seeds(1, 2), **more, **QUICK), by_prompt)
    given = {"image_embeds": by_prompt.image_embeds, "prompt": "red circle"}
    same(pipe(picture, generator=seeds(1, 2), **given, **more, **QUICK), by_prompt)


def test_an_image_is_given_as_its_latents(pipeline):
    pipe, picture = ImageToImagePipeline.from_pipe(pipeline), torch.rand(2, 3, 32, 32, generator=seeds(0)[0])
    latents = pipeline.encode_latents(2 * picture - 1)
    by_prompt = {"prompt": "red circle", "num_images_per_prompt": 2, "generator": seeds(1, 2, 3, 4)}
    expected = pipe(picture, **by_prompt, **QUICK)
    same(pipe(latents, **by_prompt | {"generator": seeds(1, 2, 3, 4)}, **QUICK), expected)
    # Without a prompt, what they show is what CLIP sees in the decoded latents
    shown = pipe(latents, generator=seeds(1, 2), **QUICK).image_embeds
    torch.testing.assert_close(shown, pipe(pipeline.decode(latents, "pt"), generator=seeds(1, 2), **QUICK).image_embeds)
    with pytest.raises(InputError, match=r"image \(latents\) must be a tensor of shape \(N, 4, h, w\)"):
        pipe(latents[..., :0])


def test_latents_are_painted_in_as_what_they_decode_to(pipeline):
    latents, mask = torch.randn(1, 4, 8, 12, generator=seeds(0)[0]), torch.zeros(32, 48)
    mask[:, 24:] = 1
    shown, settings = pipeline.decode(latents, "pt"), {"prompt": "red circle", **QUICK, "output_type": "pt"}
    for kind, more in ((InpaintPipeline, {"mask_image": mask}), (OutpaintPipeline, {"right": 8})):
        pipe = kind.from_pipe(pipeline)
        painted = pipe(latents, generator=seeds(1), **more, **settings)
        same(painted, pipe(shown, generator=seeds(1), **more, **settings))
        torch.testing.assert_close(painted.images[..., :24], shown[..., :24])


@pytest.mark.parametrize(
    ("embeds", "message"),
    (
        (torch.zeros(1, 5, 32), "the prior also reads the text's one embedding"),
        ((torch.zeros(1, 5, 31), torch.zeros(1, 32)), r"prompt_embeds \(states\) must be a tensor of shape"),
        ((torch.zeros(5, 32), torch.zeros(1, 32)), r"prompt_embeds\[0\] must be a tensor of shape \(B, L, W\)"),
        ("a cat", "prompt_embeds must be a TextEncoding or a tuple"),
    ),
)
def test_other_encodings_are_refused(pipeline, embeds, message):
    with pytest.raises(InputError, match=message):
        pipeline(prompt_embeds=embeds)


def test_encodings_beside_prompts_are_refused(pipeline):
    text = pipeline.encode_prompt(["a", "b"])
    with pytest.raises(InputError, match="prompt and prompt_embeds are both given"):
        pipeline("a cat", prompt_embeds=text)
    with pytest.raises(InputError, match="negative_prompt_embeds has 2 rows for 1 prompts"):
        pipeline("a cat", negative_prompt_embeds=text)
    wide = replace(text.expand(), mask=text.expand().mask[:, :1])
    with pytest.raises(InputError, match=r"prompt_embeds \(mask\) must be a tensor of shape"):
        pipeline(prompt_embeds=wide)


def test_the_prior_alone_samples_what_the_whole_pipeline_draws(pipeline, pipeline_folder):
    options = {"prior_num_inference_steps": 2, "num_images_per_prompt": 2}
    prior = PriorPipeline.from_pipe(pipeline)
    sampled = prior("red circle", "green", generator=seeds(1, 2), **options)
    drawn = pipeline("red circle", "green", generator=seeds(1, 2), **options, num_inference_steps=2)
    torch.testing.assert_close(sampled.image_embeds, drawn.image_embeds, rtol=0, atol=0)
    assert sampled.negative_image_embeds.shape == (2, 32)
    alone, nothing = prior(prompt_embeds=prior.encode_prompt("red circle"), return_dict=False)
    assert alone.shape == (1, 32) and nothing is None
    pipeline(**sampled, num_inference_steps=2, guidance_scale=3.0)
    same_weights = PriorPipeline.from_pretrained(pipeline_folder).prior.state_dict()
    assert same_weights.keys() == prior.prior.state_dict().keys()
    with pytest.raises(InputError, match="prompt is missing"):
        prior()


def test_the_prior_alone_takes_and_returns_what_diffusers_does(pipeline):
    prior, steps = PriorPipeline.from_pipe(pipeline), []

    def watch(pipe, step, t, given):
        steps.append((pipe is prior, step, sorted(given)))

    noise = torch.randn(2, 32, generator=seeds(5)[0])
    theirs = {"num_inference_steps": 3, "guidance_scale": 4.0, "latents": noise, "callback_on_step_end": watch}
    theirs["callback_on_step_end_tensor_inputs"] = ["latents"]
    ours = {f"prior_{name}": value for name, value in theirs.items()}
    texts = {"prompt": ["red circle", "blue"], "negative_prompt": "green"}
    first, second = (prior(**texts, **options, return_dict=False) for options in (theirs, ours))
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert steps == 2 * [(True, step, ["latents"]) for step in range(3)]
    arrays = prior(**texts, **theirs, output_type="np").to_tuple()
    assert all(np.array_equal(array, tensor.numpy()) for array, tensor in zip(arrays, first))
    z_i, nothing = prior("red circle", num_inference_steps=2).to_tuple()
    assert z_i.shape == (1, 32) and nothing is None
    for options, message in (
        ({"latents": noise[:1], "prior_latents": noise[:1]}, "latents is prior_latents, which is given too"),
        ({"output_type": "pil"}, "output_type must be one of pt, np; got 'pil'"),
        ({"guidance_scale": -1}, "prior_guidance_scale"),
    ):
        with pytest.raises(InputError, match=message):
            prior("red circle", **options)


@pytest.mark.parametrize("kind", (Text2ImagePipeline, ImageToImagePipeline, InpaintPipeline))
def test_z_i_to_guide_away_from_is_repeated_for_the_images_of_a_prompt(pipeline, kind):
    """As diffusers' decoders repeat what their prior's pipeline returns."""
    picture, mask = torch.rand(2, 3, 32, 32, generator=seeds(0)[0]), torch.zeros(32, 32)
    mask[8:] = 1
    given = {"prompt": ["red", "blue"]} if kind is Text2ImagePipeline else {"image": picture}
    given |= {"mask_image": mask} if kind is InpaintPipeline else {}
    sampled = PriorPipeline.from_pipe(pipeline)(["red", "blue"], "green", generator=seeds(1, 2), num_inference_steps=2)
    settings = given | {"num_images_per_prompt": 2, "guidance_scale": 3.0, "num_inference_steps": 2}
    settings |= {"output_type": "latent"}
    rows = {name: z.repeat_interleave(2, dim=0) for name, z in sampled.items()}
    pipe = kind.from_pipe(pipeline)
    drawn, repeated = (pipe(**z, generator=seeds(1, 2, 3, 4), **settings) for z in (sampled, rows))
    same(drawn, repeated)
    three = rows | {"negative_image_embeds": rows["negative_image_embeds"][:3]}
    with pytest.raises(InputError, match="negative_image_embeds has 3 rows for 4 images"):
        pipe(**three, **settings)


def test_the_prior_alone_is_saved_and_loaded(pipeline, tmp_path):
    prior = PriorPipeline.from_pipe(pipeline)
    prior.save_pretrained(tmp_path / "prior")
    again = PriorPipeline.from_pretrained(tmp_path / "prior")
    options = {"prior_num_inference_steps": 2}
    before, after = (one("a cat", generator=seeds(1), **options).image_embeds for one in (prior, again))
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    without = Text2ImagePipeline.from_pipe(pipeline, prior=None, prior_scheduler=None)
    with pytest.raises(InputError, match="this pipeline has no prior"):
        PriorPipeline.from_pipe(without)


def test_a_caption_that_a_decoder_lacks_is_named(pipeline, caplog):
    """diffusers' Kandinsky 2.1 refuses it; its users give an empty text for no caption."""
    z_i, picture = torch.randn(1, 32, generator=seeds(0)[0]), torch.rand(1, 3, 32, 32, generator=seeds(1)[0])
    other = ImageToImagePipeline.from_pipe(pipeline)
    for draw in (pipeline, lambda **given: other(picture, **given)):
        draw(image_embeds=z_i, **QUICK)
        assert 'prompt is missing: this decoder reads captions beside image_embeds; give it, or ""' in caplog.text
        caplog.clear()
        draw(image_embeds=z_i, prompt="", **QUICK)
        draw(image_embeds=z_i, prompt="red circle", **QUICK)
        draw(image_embeds=torch.zeros(1, 32), **QUICK)  # no image, and so no caption
        assert "prompt" not in caplog.text
    with pytest.raises(InputError, match="prompt must not be empty"):
        pipeline("", **QUICK)
