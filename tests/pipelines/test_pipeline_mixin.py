"""What diffusers' own tests ask of every pipeline, asked of all of ours, in our words.

A test that does not apply to a pipeline names it with the reason. Offloading and layerwise casting have tests of their
own, and so has the parity with diffusers' pipelines.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from t2i.pipelines.base import UnCLIPPipeline

from t2i import InputError, Text2ImagePipeline, pipelines
from t2i.networks.upsampler import Upsampler
from tests.helpers.stages import seeds

STEPS = 2
PROMPTS = ["red circle", "a long caption of a blue square", "green"]
DRAWING = {"num_inference_steps": STEPS, "output_type": "pt"}
PRIOR = {"prior_num_inference_steps": STEPS}


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=seeds(9)[0])


def half_mask() -> torch.Tensor:
    mask = torch.zeros(32, 32)
    mask[16:] = 1
    return mask


@dataclass(frozen=True)
class Case:
    """A pipeline with arguments that draw `count` results; one generator draws a whole way instead of a batch."""

    name: str
    inputs: Callable[[int], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=lambda: DRAWING)
    result: str = "images"
    one_generator: bool = False

    @property
    def kind(self) -> Any:
        return getattr(pipelines, self.name)

    def takes(self, name: str) -> bool:
        return name in inspect.signature(self.kind.__call__).parameters

    def run(self, pipe: Any, count: int = 1, first_seed: int = 0, **more: Any) -> Any:
        """Return what is drawn, one below the other as a tensor if it is a list of tensors."""
        images = count * more.get("num_images_per_prompt", 1)
        generator = seeds(first_seed)[0] if self.one_generator else seeds(*range(first_seed, first_seed + images))
        drawn = pipe(**{**self.inputs(count), **self.settings, "generator": generator} | more)
        result = getattr(drawn, self.result) if not isinstance(drawn, tuple) else drawn[0]
        return torch.stack(result) if isinstance(result, list) and isinstance(result[0], torch.Tensor) else result


CASES = {
    case.name: case
    for case in (
        Case("Text2ImagePipeline", lambda count: {"prompt": PROMPTS[:count]}, DRAWING | PRIOR),
        Case(
            "ImageToImagePipeline",
            lambda count: {"image": pictures(count), "prompt": PROMPTS[:count], "strength": 1.0},
            DRAWING | PRIOR,
        ),
        Case(
            "InpaintPipeline",
            lambda count: {"image": pictures(count), "mask_image": half_mask(), "prompt": PROMPTS[:count]},
            DRAWING | PRIOR,
        ),
        Case(
            "OutpaintPipeline",
            lambda count: {"image": pictures(count), "left": 8, "prompt": PROMPTS[:count]},
            DRAWING | PRIOR,
        ),
        Case("ImageVariationPipeline", lambda count: {"image": pictures(count)}),
        Case("TextDiffPipeline", lambda count: {"image": pictures(count), "source": "red", "target": "blue"}),
        Case(
            "InterpolationPipeline",
            lambda count: {"anchors": PROMPTS[:2], "frames": count + 1},
            DRAWING | PRIOR,
            one_generator=True,
        ),
        Case("UpsamplePipeline", lambda count: {"image": pictures(count)}),
        Case("PriorPipeline", lambda count: {"prompt": PROMPTS[:count]}, PRIOR, "image_embeds"),
    )
}
LEFT_OUT: dict[str, dict[str, str]] = {}  # reasons, by test and pipeline

NO_BATCH = "its results are one way between the anchors, which depends on all of them"
ONE_EACH = "it draws one image for each"
NO_IMAGES = "it returns embeddings, which have one form"
ONLY_LISTS = "its images differ in size, so that they are a list in any form"
NO_CALLBACK = "it has no guidance and no latents; it is watched by on_preview"
NO_GUIDANCE = "the upsampler is not guided"
NO_TEXTS = "it reads no prompts"
NO_PROMPTS = ("ImageVariationPipeline", "TextDiffPipeline", "InterpolationPipeline")
NO_LATENTS = "it makes no latents of an autoencoder"
TEXTS_IN = "it takes texts"
OWN_PARTS = "its parts are those of one stage; from_pipe leads into it and not back"


def for_all(**reasons: str) -> Callable[[Callable], Callable]:
    """Run a test for every pipeline but those that are named with a reason."""

    def decorate(test: Callable) -> Callable:
        LEFT_OUT[test.__name__] = reasons
        names = [name for name in CASES if name not in reasons]
        return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)(test)

    return decorate


@pytest.fixture(scope="session")
def tiny_upsampler() -> tuple[Upsampler, DDIMScheduler]:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    unet = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8} | blocks
    upsampler = Upsampler(2, 16, unet, patch_size=2).eval()
    for parameter in upsampler.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return upsampler, DDIMScheduler(prediction_type="sample")


@pytest.fixture
def pipe(case: Case, pipeline: Text2ImagePipeline, tiny_upsampler: Any) -> Any:
    if case.name == "UpsamplePipeline":
        made = case.kind(*copy.deepcopy(tiny_upsampler))
        made.set_progress_bar_config(disable=True)
        return made
    return case.kind.from_pipe(pipeline)


def close(first: Any, second: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(first, second, atol=atol, rtol=0)


# Saving and loading


@for_all()
def test_what_is_saved_draws_the_same(case, pipe, tmp_path):
    drawn = case.run(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = case.kind.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    close(case.run(loaded), drawn, atol=0)


@for_all()
def test_a_model_in_half_precision_comes_back_in_it(case, pipe, tmp_path):
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "saved", variant="fp16")
    loaded = case.kind.from_pretrained(tmp_path / "saved", dtype=torch.float16, variant="fp16")
    models = {name: part for name, part in loaded.components.items() if isinstance(part, torch.nn.Module)}
    assert {name: part.dtype for name, part in models.items()} == dict.fromkeys(models, torch.float16)
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
    close(case.run(loaded), case.run(bare), atol=0)


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
    pipe.enable_attention_slicing()
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


# This list


def test_a_test_is_left_out_with_a_reason_only():
    functions = {name: value for name, value in globals().items() if name.startswith("test_")}
    tests = {name for name, value in functions.items() if "case" in inspect.signature(value).parameters}
    assert LEFT_OUT.keys() == tests
    for reasons in LEFT_OUT.values():
        assert reasons.keys() <= CASES.keys() and all(reasons.values()) and len(reasons) < len(CASES)


def test_all_pipelines_are_here():
    names = {name for name in pipelines.__all__ if name.endswith("Pipeline")}
    assert names == CASES.keys()
    guided = UnCLIPPipeline | pipelines.PriorPipeline
    assert all(issubclass(case.kind, guided) for case in CASES.values() if case.takes("guidance_scale"))
