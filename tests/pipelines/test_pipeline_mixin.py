"""What diffusers' own tests check of every pipeline, checked of all of ours, in our words.

A test that does not apply to a pipeline names it with the reason. tests/diffusers_checks.txt has each check of
diffusers with the test here or elsewhere, or the reason why there is none.
"""

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from t2i.pipelines.base import UnCLIPPipeline

from t2i import InputError, Text2ImagePipeline, pipelines
from tests.helpers.offloading import record_inputs
from tests.helpers.pipelines import (
    CASES,
    LEFT_OUT,
    PROMPTS,
    STEPS,
    for_all,
    list_models,
    pictures,
    pipe,
    tiny_upsampler,
)

__all__ = ["pipe", "tiny_upsampler"]  # fixtures

NO_BATCH = "its results are one way between the anchors, which depends on all of them"
ONE_EACH = "it draws one image for each"
NO_IMAGES = "it returns embeddings, which have one form"
ONLY_LISTS = "its images differ in size, so that they are a list in any form"
NO_CALLBACK = "it has no guidance and no latents; it is watched by on_preview"
NO_GUIDANCE = "the upsampler is not guided"
NO_TEXTS = "it reads no prompts"
NO_LATENTS = "it makes no latents of an autoencoder"
TEXTS_IN = "it takes texts"
OWN_PARTS = "its parts are those of one stage; from_pipe leads into it and not back"
NO_MAP = "device_map is refused, in one line: `to` moves the few parts"
NO_UNET = "it has no decoder, whose U-Net this changes"
NO_COUNTERPART = "diffusers has no pipeline for this task"
REFUSED = {"v_prediction": {"EDMEulerScheduler", "KDPM2AncestralDiscreteScheduler"}}  # schedulers that cannot draw
REFUSED["sample"] = REFUSED["v_prediction"] | {"KDPM2DiscreteScheduler", "EulerAncestralDiscreteScheduler"}
REFUSED["sample"] |= {"PNDMScheduler"}
ONE_STAGE = {"UpsamplePipeline": NO_UNET, "PriorPipeline": NO_UNET}


def close(first: Any, second: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(first, second, atol=atol, rtol=0)


def get_rounding(case: Any) -> float:
    """Return what a loaded pipeline may differ by: an upsampler's convolutions round by where weights lie in memory."""
    return 1e-6 if case.kind.__name__ == "UpsamplePipeline" else 0.0


# Arguments and results


@for_all(**{name: NO_COUNTERPART for name, case in CASES.items() if case.in_diffusers is None})
def test_arguments_have_the_names_of_diffusers(case):
    there = inspect.signature(getattr(diffusers, case.in_diffusers).__call__).parameters
    here = inspect.signature(case.kind.__call__).parameters
    assert there.keys() - here.keys() == case.not_taken
    optional = {"generator", "return_dict", *here.keys() & {"num_inference_steps", "latents", "output_type"}}
    assert all(here[name].default is not inspect.Parameter.empty for name in optional)


@for_all()
def test_a_result_has_the_shape_and_the_range_that_are_documented(case, pipe):
    drawn = case.run(pipe)
    count, size = 1 + case.one_generator, {"OutpaintPipeline": (32, 40), "UpsamplePipeline": (64, 64)}
    expected = (1, pipe.clip.embed_dim) if case.result == "image_embeds" else (count, 3, *size.get(case.name, (32, 32)))
    assert drawn.shape == expected and drawn.isfinite().all()
    assert case.result == "image_embeds" or 0 <= drawn.min() < drawn.max() <= 1


@for_all(**ONE_STAGE)
def test_names_of_diffusers_are_the_real_parts(case, pipe):
    assert (pipe.unet, pipe.vae, pipe.scheduler) == (pipe.decoder, pipe.autoencoder, pipe.decoder_scheduler)


# Saving and loading


@for_all()
def test_what_is_saved_draws_the_same(case, pipe, tmp_path):
    drawn = case.run(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = case.kind.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    close(case.run(loaded), drawn, atol=get_rounding(case))


@for_all()
def test_a_model_in_half_precision_comes_back_in_it(case, pipe, tmp_path):
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "saved", variant="fp16")
    loaded = case.kind.from_pretrained(tmp_path / "saved", dtype=torch.float16, variant="fp16")
    models = list_models(loaded)
    assert {name: part.dtype for name, part in models.items()} == dict.fromkeys(models, torch.float16)
    for name in models:
        files = [path.name for path in (tmp_path / "saved" / name).glob("*.safetensors")]
        assert files and all(".fp16." in file for file in files)
    for name, part in models.items():
        stored = getattr(pipe, name).state_dict()
        assert all(torch.equal(tensor, stored[key]) for key, tensor in part.state_dict().items())
    with pytest.raises((InputError, OSError), match="bf16|variant"):
        case.kind.from_pretrained(tmp_path / "saved", variant="bf16")


@for_all()
def test_parts_that_may_be_missing_are_none_after_loading(case, pipe, tmp_path):
    optional = case.kind._optional_components
    models = {name for name in optional if not name.endswith("_scheduler")}
    # A scheduler goes with its model, which the prior's pipeline needs
    parts = dict.fromkeys(name for name in optional if name.removesuffix("_scheduler") in models)
    bare = case.kind(**{**pipe.components, **parts})
    bare.set_progress_bar_config(disable=True)
    bare.save_pretrained(tmp_path / "saved")
    loaded = case.kind.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert all(getattr(loaded, name) is None for name in parts)
    close(case.run(loaded), case.run(bare), atol=get_rounding(case))


@for_all()
def test_the_parts_build_the_pipeline_again(case, pipe):
    again = case.kind(**pipe.components)
    again.set_progress_bar_config(disable=True)
    close(case.run(again), case.run(pipe), atol=0)


@for_all(UpsamplePipeline=OWN_PARTS, PriorPipeline=OWN_PARTS)
def test_a_pipeline_from_a_pipe_and_back_draws_the_same(case, pipe):
    drawn, config = case.run(pipe), dict(pipe.config)
    there = Text2ImagePipeline.from_pipe(pipe)
    back = case.kind.from_pipe(there)
    assert dict(back.config) == config and back._progress_bar_config == pipe._progress_bar_config
    assert all(getattr(back, name) is part for name, part in pipe.components.items())
    close(case.run(back), drawn, atol=0)


@for_all()
def test_all_parts_go_to_a_device_and_a_dtype(case, pipe):
    pipe.to(dtype=torch.bfloat16)
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert all(part.dtype == torch.bfloat16 for part in models)
    assert torch.as_tensor(case.run(pipe)).isfinite().all()
    pipe.to("meta")
    assert pipe.device.type == "meta"
    assert all(tensor.device.type == "meta" for part in models for tensor in part.state_dict().values())


@for_all()
def test_half_precision_draws_nearly_the_same(case, pipe):
    drawn = case.run(pipe).double()
    for dtype in (torch.float16, torch.bfloat16):
        half = torch.as_tensor(case.run(pipe.to(dtype=dtype))).double()
        assert half.isfinite().all()
        assert torch.cosine_similarity(half.flatten(), drawn.flatten(), dim=0) > 0.95


@for_all()
def test_a_part_is_loaded_in_a_dtype_of_its_own(case, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    own = next(name for name in ("decoder", "upsampler", "prior") if getattr(pipe, name, None) is not None)
    loaded = case.kind.from_pretrained(tmp_path, dtype={own: torch.bfloat16, "default": torch.float16})
    dtypes = {name: part.dtype for name, part in list_models(loaded).items()}
    assert dtypes == dict.fromkeys(dtypes, torch.float16) | {own: torch.bfloat16}


@for_all(UpsamplePipeline=NO_MAP, PriorPipeline=NO_MAP)
def test_a_device_map_places_all_parts(case, pipe, tmp_path):
    drawn = case.run(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = case.kind.from_pretrained(tmp_path, device_map="cpu")
    loaded.set_progress_bar_config(disable=True)
    close(case.run(loaded), drawn, atol=0)


# Of what diffusers calls of NumPy, and of torchsde's rounding
@pytest.mark.filterwarnings("ignore:__array_wrap__", "ignore:Should have t[ab]")
@for_all()
def test_every_karras_scheduler_draws_or_is_refused(case, pipe):
    shape, config = case.run(pipe).shape, pipe.scheduler.config
    steps = {name: 5 for name in case.settings if name.endswith("num_inference_steps")}
    refused = set()
    for name in (scheduler.name for scheduler in KarrasDiffusionSchedulers):
        try:
            pipe.scheduler = getattr(diffusers, name).from_config(config, skip_prk_steps=True)
        except InputError:
            refused.add(name)
            continue
        except ImportError:  # it needs a library that is no dependency
            continue
        drawn = case.run(pipe, **steps)
        assert drawn.shape == shape and drawn.isfinite().all(), name
    assert refused == REFUSED[config.prediction_type]


# Batches and forms of the result


@for_all()
def test_a_batch_has_as_many_results_as_inputs(case, pipe):
    for count in (1, 2, 3):
        assert len(case.run(pipe, count)) == count + case.one_generator


@for_all(InterpolationPipeline=NO_BATCH)
def test_a_result_does_not_depend_on_its_batch(case, pipe):
    close(case.run(pipe, 3)[:1], case.run(pipe, 1))


@for_all(InterpolationPipeline=NO_BATCH, TextDiffPipeline=ONE_EACH, UpsamplePipeline=ONE_EACH)
def test_several_results_for_each_input(case, pipe):
    both = case.run(pipe, 2, num_images_per_prompt=2)
    assert len(both) == 4
    close(both[:2], case.run(pipe, 1, num_images_per_prompt=2))


@for_all()
def test_the_tuple_has_what_the_output_has(case, pipe):
    close(case.run(pipe, return_dict=False), case.run(pipe), atol=0)


@for_all(PriorPipeline=NO_IMAGES, UpsamplePipeline=ONLY_LISTS)
def test_all_forms_show_the_same_picture(case, pipe):
    tensor, array, images = (case.run(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    close(torch.from_numpy(array).movedim(-1, 1), tensor, atol=0)
    close(VaeImageProcessor.pil_to_numpy(images), array.astype(np.float32), atol=0.51 / 255)


TAKES_IMAGES = [case for case in CASES.values() if case.takes("image")]


@for_all(**{name: TEXTS_IN for name in CASES if CASES[name] not in TAKES_IMAGES})
def test_a_picture_may_have_any_form(case, pipe):
    [image] = VaeImageProcessor.numpy_to_pil(pictures(1).movedim(1, -1).numpy())
    array = np.array(image)
    forms = (image, [image], array, torch.from_numpy(array).movedim(-1, 0), array.astype(np.float32) / 255)
    first, *others = (case.run(pipe, image=form) for form in forms)
    for other in others:
        close(other, first, atol=1e-4)


# Steps


@for_all(UpsamplePipeline=NO_CALLBACK)
def test_a_callback_gets_the_tensors_that_it_asks_for(case, pipe):
    seen = []
    prefix = "prior_" if case.name == "PriorPipeline" else ""

    def end_in_zeros(given_pipe, step, t, tensors):
        assert given_pipe is pipe and tensors.keys() == set(names)
        seen.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else tensors

    for names in (["latents"], pipe._callback_tensor_inputs):
        more = {} if prefix else {"output_type": "latent"}
        callback = {f"{prefix}callback_on_step_end": end_in_zeros}
        drawn = case.run(pipe, **callback, **{f"{prefix}callback_on_step_end_tensor_inputs": list(names)}, **more)
        assert seen == list(range(STEPS))
        seen.clear()
        if not prefix:
            assert not drawn.any()


@for_all(UpsamplePipeline=NO_CALLBACK)
def test_a_callback_changes_the_guidance(case, pipe):
    prefix = "prior_" if case.name == "PriorPipeline" else ""
    scales = []

    def raise_scale(given_pipe, step, t, tensors):
        scales.append(given_pipe.guidance_scale)
        given_pipe._guidance_scale += 2.0

    settings = {f"{prefix}guidance_scale": 3.0, f"{prefix}callback_on_step_end": raise_scale}
    changed = case.run(pipe, **settings)
    assert scales == [3.0 + 2 * step for step in range(STEPS)]
    assert (changed - case.run(pipe, **{f"{prefix}guidance_scale": 3.0})).abs().max() > 1e-6


@for_all(UpsamplePipeline=NO_GUIDANCE)
def test_a_scale_of_one_is_no_guidance(case, pipe):
    """The model is evaluated once a step, not twice, and what it would be guided away from has no effect."""
    name, part = ("prior_guidance_scale", "prior") if case.name == "PriorPipeline" else ("guidance_scale", "decoder")
    model = getattr(pipe, part)
    rows: list[int] = []
    step = model.step
    model.step = lambda x, *rest: (rows.append(len(x)), step(x, *rest))[1]
    off = case.run(pipe, **{name: 1.0})
    unguided, _ = max(rows), rows.clear()
    guided = case.run(pipe, **{name: 4.0})
    assert max(rows) == 2 * unguided
    assert (guided - off).abs().max() > 1e-6


@for_all(
    UpsamplePipeline=NO_TEXTS,
    ImageVariationPipeline=NO_TEXTS,
    TextDiffPipeline=NO_TEXTS,
    InterpolationPipeline=NO_TEXTS,
)
def test_prompts_are_encoded_apart_from_the_drawing(case, pipe, monkeypatch):
    drawn = case.run(pipe)
    text = pipe.encode_prompt(PROMPTS[0])
    monkeypatch.setattr(pipe.clip, "encode_tokens", lambda *_: pytest.fail("the prompt is encoded already"))
    close(case.run(pipe, prompt=None, prompt_embeds=text), drawn)


@for_all()
def test_attention_in_slices_is_the_same(case, pipe):
    drawn = case.run(pipe)
    for size in (1, 2, "auto", "max"):
        pipe.enable_attention_slicing(size)
        close(case.run(pipe), drawn, atol=1e-4)
    pipe.disable_attention_slicing()
    close(case.run(pipe), drawn, atol=1e-5)


@for_all()
def test_the_progress_bar_counts_steps_and_can_be_turned_off(case, pipe, capfd):
    case.run(pipe)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    case.run(pipe)
    assert f"{STEPS}/{STEPS}" in capfd.readouterr().err


@for_all(UpsamplePipeline=NO_LATENTS, PriorPipeline=NO_LATENTS)
def test_the_autoencoder_in_slices_draws_the_same(case, pipe):
    drawn = case.run(pipe, 2)
    pipe.enable_vae_slicing()
    close(case.run(pipe, 2), drawn)


@for_all(UpsamplePipeline=NO_LATENTS, PriorPipeline=NO_LATENTS)
def test_the_autoencoder_in_tiles_draws_nearly_the_same(case, pipe):
    latents = torch.randn(1, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    whole = pipe.decode(latents, "pt")
    pipe.enable_vae_tiling()
    with record_inputs(pipe.vae.coder.decoder) as seen:
        tiled = pipe.decode(latents, "pt")
        assert len(seen) == 4 and max(seen) == (1, 4, 16, 16)
        seen.clear()
        case.run(pipe)
        assert len(seen) == 1 or case.name == "OutpaintPipeline"  # one tile holds what the decoder draws
    assert tiled.shape == whole.shape and 0 < (tiled - whole).abs().max() < 0.5


@for_all(**ONE_STAGE)
def test_freeu_changes_the_images_and_is_undone(case, pipe):
    drawn = case.run(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert (case.run(pipe) - drawn).abs().max() > 1e-4
    pipe.disable_freeu()
    assert all(getattr(block, name) is None for block in pipe.unet.unet.up_blocks for name in ("s1", "s2", "b1", "b2"))
    close(case.run(pipe), drawn, atol=0)


@for_all(**ONE_STAGE)
def test_fused_projections_draw_the_same_and_are_undone(case, pipe):
    drawn, networks = case.run(pipe), (pipe.unet.unet, pipe.vae.coder)
    before = [network.attn_processors for network in networks]
    pipe.fuse_qkv_projections()
    processors = [one for network in networks for one in network.attn_processors.values()]
    assert {type(one).__name__ for one in processors} == {"FusedAttnProcessor2_0"}
    close(case.run(pipe), drawn, atol=1e-4)
    pipe.unfuse_qkv_projections()
    assert [network.attn_processors for network in networks] == before
    close(case.run(pipe), drawn, atol=0)


# This list


def test_a_test_is_left_out_with_a_reason_only():
    functions = {name: value for name, value in globals().items() if name.startswith("test_")}
    tests = {name for name, value in functions.items() if "case" in inspect.signature(value).parameters}
    assert tests and tests <= LEFT_OUT.keys()
    for reasons in LEFT_OUT.values():
        assert reasons.keys() <= CASES.keys() and all(reasons.values()) and len(reasons) < len(CASES)


def test_all_pipelines_are_here():
    names = {name for name in pipelines.__all__ if name.endswith("Pipeline")}
    assert names == CASES.keys()
    guided = UnCLIPPipeline | pipelines.PriorPipeline
    assert all(issubclass(case.kind, guided) for case in CASES.values() if case.takes("guidance_scale"))
