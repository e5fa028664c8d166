"""Callbacks after each step, as diffusers documents them: what they get, what they may change, and when they end."""

import numpy as np
import pytest
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)
from t2i.pipelines.calls.callbacks import CALLBACK_TENSORS

from t2i import ImageVariationPipeline, InputError
from tests.helpers.stages import seeds

STEPS = 4
QUICK = {"prior_num_inference_steps": 2, "num_inference_steps": STEPS, "output_type": "latent"}


def draw(pipeline, callback=None, count=1, **settings):
    settings = {"guidance_scale": 3.0, "callback_on_step_end": callback} | settings
    return pipeline(["red circle"] * count, generator=seeds(*range(count)), **QUICK, **settings).images


def test_a_callback_that_returns_none_or_what_it_got_changes_nothing(pipeline):
    plain = draw(pipeline)
    every = {"callback_on_step_end_tensor_inputs": list(CALLBACK_TENSORS)}
    for callback in (lambda *_: None, lambda *given: given[3], lambda *_: {}):
        torch.testing.assert_close(draw(pipeline, callback, **every), plain, rtol=0, atol=0)


@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("several", (False, True))
def test_the_official_cutoff_of_guidance_is_guidance_up_to_that_step(pipeline, several, count):
    """The steps after it equal steps without guidance, which start from the latents that the cutoff left."""
    callback = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    cut = draw(pipeline, MultiPipelineCallbacks([callback]) if several else callback, count)
    assert pipeline.num_timesteps == STEPS and pipeline.guidance_scale == 0
    assert not pipeline.do_classifier_free_guidance
    left: list[torch.Tensor] = []
    draw(pipeline, lambda pipe, step, t, given: left.append(given["latents"]) if step == 2 else None, count)
    swapped = draw(
        pipeline, lambda pipe, step, t, given: {"latents": left[0]} if step == 2 else None, count, guidance_scale=1.0
    )
    torch.testing.assert_close(cut, swapped)
    assert (cut - draw(pipeline, count=count)).abs().max() > 1e-5


def test_a_scale_that_a_callback_sets_is_the_scale_from_the_next_step_on(pipeline):
    def change(pipe, step, t, given):
        assert pipe.guidance_scale == (3.0 if step == 0 else 1.0 if step == 1 else 5.0)
        pipe._guidance_scale = 1.0 if step == 0 else 5.0

    changed = draw(pipeline, change)
    assert (changed - draw(pipeline)).abs().max() > 1e-5
    torch.testing.assert_close(draw(pipeline), draw(pipeline))  # the next call has its own scale again


@pytest.mark.parametrize("scale", [None, 0, np.float32(0.5)])
def test_no_scale_is_no_guidance(pipeline, scale):
    def drop(value):
        return draw(pipeline, lambda pipe, step, t, given: setattr(pipe, "_guidance_scale", value))

    torch.testing.assert_close(drop(scale), drop(1.0), rtol=0, atol=0)
    assert not pipeline.do_classifier_free_guidance
    for value in ("3", float("nan")):
        with pytest.raises(InputError, match="^_guidance_scale must be a number from -inf to inf, got"):
            drop(value)


def test_conditions_can_be_replaced(pipeline):
    """From the first step on with another z_i, the rest of the way is that z_i's."""
    other = torch.nn.functional.normalize(torch.randn(1, 32, generator=seeds(7)[0]), dim=-1)
    names = ["latents", "image_embeds", "negative_image_embeds"]
    got = {}

    def replace(pipe, step, t, given):
        got.update(given)
        return {"image_embeds": other} if step == 0 else None

    drawn = draw(pipeline, replace, callback_on_step_end_tensor_inputs=names)
    assert got.keys() == set(names) and got["image_embeds"].shape == (1, 32)
    torch.testing.assert_close(got["image_embeds"], other)  # what was put in is what later steps see
    left: list[torch.Tensor] = []
    draw(pipeline, lambda pipe, step, t, given: left.append(given["latents"]) if step == 0 else None)
    swap = {"callback_on_step_end": lambda pipe, step, t, given: {"latents": left[0]} if step == 0 else None}
    expected = pipeline(
        "red circle", image_embeds=other, generator=seeds(0), guidance_scale=3.0, **QUICK, **swap
    ).images
    torch.testing.assert_close(drawn, expected)


def test_what_is_changed_in_place_counts(pipeline):
    def blank(pipe, step, t, given):
        given["image_embeds"].zero_()

    names = {"callback_on_step_end_tensor_inputs": ["image_embeds"]}
    assert (draw(pipeline, blank, **names) - draw(pipeline)).abs().max() > 1e-5


def test_an_interrupted_stage_leaves_its_latents(pipeline):
    seen = []

    def stop(pipe, step, t, given):
        seen.append(given["latents"])
        pipe._interrupt = step == 1

    torch.testing.assert_close(draw(pipeline, stop), seen[-1], rtol=0, atol=0)
    assert len(seen) == 2
    assert len(seen) == 2 and draw(pipeline).isfinite().all() and pipeline._interrupt is False


def test_a_callback_of_the_prior(pipeline):
    seen = []

    def watch(pipe, step, t, given):
        assert pipe.num_timesteps == 2
        seen.append((step, given["latents"].shape))
        return {"latents": torch.zeros_like(given["latents"])} if step == 1 else None

    plain = pipeline("red circle", generator=seeds(0), **QUICK).image_embeds
    watched = pipeline("red circle", generator=seeds(0), prior_callback_on_step_end=watch, **QUICK).image_embeds
    assert seen == [(0, (2, 32)), (1, (2, 32))]  # two candidates
    assert (watched - plain).abs().max() > 1e-3
    cut = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    cut.tensor_inputs, cut.callback_fn = [], lambda pipe, *_: setattr(pipe, "_guidance_scale", 0.0) or {}
    unguided = pipeline("red circle", generator=seeds(0), prior_callback_on_step_end=cut, **QUICK).image_embeds
    assert (unguided - plain).abs().max() > 1e-6


def test_callbacks_of_other_pipelines(pipeline):
    images = pipeline("red circle", generator=seeds(0), **QUICK | {"output_type": "pil"}).images
    vary = ImageVariationPipeline.from_pipe(pipeline)
    settings = {"generator": seeds(1), "num_inference_steps": STEPS, "guidance_scale": 3.0}
    calls = []
    vary(images, callback_on_step_end=lambda pipe, step, *_: calls.append((pipe is vary, step)), **settings)
    assert calls == [(True, step) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"callback_on_step_end": 3}, "callback_on_step_end must be a function"),
        ({"callback_on_step_end": SDXLCFGCutoffCallback()}, "got 'add_text_embeds'"),
        ({"callback_on_step_end": IPAdapterScaleCutoffCallback()}, "these models have no IP-Adapter"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "got 'noise'"),
        ({"prior_callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "may contain 'latents'; got"),
        ({"callback_on_step_end": lambda *_: {"noise": 0}}, "returned 'noise'; it may return latents"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(2)}}, r"tensor \(1, 4, 8, 8\), got \(2,\)"),
        ({"callback_on_step_end": lambda *_: 1}, "must return a dict or None, got a int"),
    ),
)
def test_what_a_callback_cannot_do_is_refused(pipeline, settings, message):
    with pytest.raises(InputError, match=message):
        draw(pipeline, **settings)
