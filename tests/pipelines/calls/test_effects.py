"""Every argument of every call has an effect, or is refused, or is named as one that has none: all are tried."""

import hashlib
import inspect
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from t2i.pipelines import (
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    InterpolationPipeline,
    OutpaintPipeline,
    PriorPipeline,
    TextDiffPipeline,
)
from t2i.pipelines.options import DecoderOptions, PriorOptions

from t2i import InputError, Text2ImagePipeline
from t2i.networks.regression_prior import RegressionPrior
from t2i.sampling.steering import Steering
from tests.helpers.stages import seeds


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=seeds(seed)[0])


def change(pipeline: Any, step: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return other latents, by the number of tensors that are handed over."""
    return {"latents": tensors["latents"] * (1 - 0.1 * len(tensors))}


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
MASK = np.zeros((32, 32), np.uint8)
MASK[8:] = 255
# Another value for each argument, one that draws something else where it has an effect
VALUES: dict[str, Any] = {
    "prompt": "blue square",
    "negative_prompt": "green",
    "decoder_negative_prompt": "green",
    "prior_num_inference_steps": 3,
    "prior_guidance_scale": 6.0,
    "prior_latents": noise(1, 32),
    "prior_candidates": 24,
    "prior_temperature": 0.5,
    "prior_sampler": "dpmsolver++",
    "prior_callback_on_step_end": change,
    "num_inference_steps": 5,
    "guidance_scale": 7.0,
    "guidance_rescale": 0.8,
    "latents": noise(1, 4, 8, 8),
    "steering": Steering(30.0, text="red"),
    "output_type": "np",
    "sampler": "dpmsolver++",
    "eta": 0.7,
    "use_clipped_model_output": True,
    "timesteps": [800, 300],
    "sigmas": [3.0, 1.0],
    "upsample": 1,
    "upsample_steps": 2,
    "upsample_level": 0.5,
    "height": 48,
    "width": 48,
    "noise_level": 5,
    "image_embeds_noise": noise(1, 32),
    "negative_image_embeds": noise(1, 32, seed=6),
    "control_image": IMAGE,
    "super_res_num_inference_steps": 3,
    "super_res_latents": noise(1, 3, 32, 32),
    "callback_on_step_end": change,
    "callback_on_step_end_tensor_inputs": ["latents", "image_embeds"],
    "on_preview": len,
    "preview_every": 2,
    "strength": 0.5,
    "inverted": False,
    "frames": 4,
    "theta": 0.9,
    "direction": "prior",
    "mask_channel": "alpha",
    "padding_mask_crop": 4,
}
# "latents" alone; and what is given in other forms, or decides the form of the result
UNTRIED = {"prior_callback_on_step_end_tensor_inputs", "prompt_embeds", "negative_prompt_embeds", "image_embeds"}
UNTRIED |= {"image", "mask_image", "source", "target", "anchors", "weights", "left", "right", "top", "bottom"}
UNTRIED |= {"num_images_per_prompt", "generator", "return_dict", "resolved"}
GUIDED = {"guidance_scale": 3.0, "prior_guidance_scale": 3.0}
QUICK = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "pt"}
SETTINGS: dict[str, dict[str, Any]] = {
    "guided": GUIDED | QUICK,
    "unguided": {"guidance_scale": 1.0, "prior_guidance_scale": 1.0} | QUICK,
    "noise": {"prior_latents": noise(1, 32, seed=7), "latents": noise(1, 4, 8, 8, seed=8)} | GUIDED | QUICK,
    "levels": GUIDED | {"timesteps": [900, 500], "prior_num_inference_steps": 2, "output_type": "pt"},
    "watched": {"on_preview": len, "callback_on_step_end": change, "prior_callback_on_step_end": change}
    | GUIDED
    | QUICK,
    "latents": GUIDED | QUICK | {"output_type": "latent"},
}
GIVEN = {"image_embeds": noise(1, 32, seed=9)}
PHOTO = {"image": IMAGE, "strength": 1.0}
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (Text2ImagePipeline, {"prompt": "red circle"}),
    "embeddings": (Text2ImagePipeline, {"prompt": "red circle"} | GIVEN),
    "prior": (PriorPipeline, {"prompt": "red circle"}),
    "image": (ImageToImagePipeline, PHOTO),
    "image and text": (ImageToImagePipeline, PHOTO | {"prompt": "red circle"}),
    "image and embeddings": (ImageToImagePipeline, PHOTO | GIVEN),
    "mask": (InpaintPipeline, {"image": IMAGE, "mask_image": MASK, "prompt": "red circle"}),
    "margin": (OutpaintPipeline, {"image": IMAGE, "left": 8}),
    "variation": (ImageVariationPipeline, {"image": IMAGE}),
    "inversion": (ImageVariationPipeline, {"image": IMAGE, "eta": 0.5}),
    "edit": (TextDiffPipeline, {"image": IMAGE, "source": "red circle", "target": "blue square"}),
    "edit by the prior": (
        TextDiffPipeline,
        # Of its 16 candidates the same one may be taken as of more
        {"image": IMAGE, "source": "red circle", "target": "blue square", "direction": "prior", "prior_candidates": 2},
    ),
    "texts": (InterpolationPipeline, {"anchors": ["red circle", "blue square"], "frames": 2}),
    "images": (InterpolationPipeline, {"anchors": [IMAGE, IMAGE.rotate(90)], "frames": 2}),
    "mix": (InterpolationPipeline, {"anchors": ["red circle", IMAGE], "weights": [1.0, 2.0]}),
}
TRIED = [(call, "guided") for call in CALLS] + [("text", setting) for setting in SETTINGS if setting != "guided"]
TRIED += [("embeddings", "unguided"), ("prior", "unguided"), ("image and text", "unguided")]


def draw(pipe: Any, arguments: dict[str, Any]) -> str:
    """Return what can be seen of a call: its results, and its previews."""
    seen: list[int] = []
    watch = {"on_preview": lambda preview: seen.append(preview.step)} if "on_preview" in arguments else {}
    results = pipe(generator=seeds(3)[0], return_dict=False, **arguments | watch)
    return f"{[summarize(result) for result in results]} {seen}"


def summarize(result: Any) -> str:
    data = np.asarray([] if result is None else result)
    return f"{type(result).__name__} {data.shape} {hashlib.sha256(data.tobytes()).hexdigest()}"


def find_silent_arguments(pipe: Any, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the arguments whose other value changes nothing without a word, or something in spite of a warning."""
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments = {name: value for name, value in arguments.items() if name in taken}
    # The prior alone takes its options under two names, one of which may be given
    arguments = {name: value for name, value in arguments.items() if f"prior_{name}" not in arguments.keys() & taken}
    plain, silent = draw(pipe, arguments), []
    for name, value in VALUES.items():
        if name not in taken or name in arguments and name not in {"strength", "prior_candidates", *GUIDED, *QUICK}:
            continue
        caplog.clear()
        try:
            changed = draw(pipe, arguments | {name: value}) != plain
        except InputError:
            continue
        warned = any(message.startswith(f"{name} has no effect") for message in caplog.messages)
        if changed == warned:
            silent.append(f"{name} {'changes something and warns' if changed else 'changes nothing'}")
    return silent


@pytest.mark.parametrize(("call", "setting"), TRIED, ids=["-".join(one) for one in TRIED])
def test_no_argument_is_silently_without_effect(pipeline, caplog, call, setting):
    kind, arguments = CALLS[call]
    silent = find_silent_arguments(kind.from_pipe(pipeline), arguments | SETTINGS[setting], caplog)
    assert not silent, "; ".join(silent)


@pytest.mark.parametrize("lacking", ("prior", "steps", "captions"))
@pytest.mark.parametrize("call", ("text", "embeddings", "variation"))
def test_no_argument_is_silently_without_effect_on_other_models(pipeline, caplog, call, lacking):
    torch.manual_seed(0)
    if lacking == "captions":
        config = {**pipeline.decoder.config, "text_width": None}
        pipeline.decoder = type(pipeline.decoder).from_config(config).eval()
        for parameter in pipeline.decoder.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
    else:
        identity = pipeline.clip.identity
        regression = RegressionPrior(32, pipeline.clip.text_width, "mlp", 8, clip_fingerprint=identity).eval()
        pipeline.register_modules(prior=regression if lacking == "steps" else None, prior_scheduler=None)
    kind, arguments = CALLS[call]
    silent = find_silent_arguments(kind.from_pipe(pipeline), arguments | SETTINGS["guided"], caplog)
    assert not silent, "; ".join(silent)


def test_every_argument_of_every_call_is_tried():
    calls = [kind.__call__ for kind, _ in CALLS.values()]
    taken = {name for call in calls for name in inspect.signature(call).parameters} - {"self"}
    assert taken - VALUES.keys() == UNTRIED and VALUES.keys() <= taken
    assert {field.name for options in (PriorOptions, DecoderOptions) for field in fields(options)} <= taken
    # Cases are declared for arguments that there are
    assert [name for call in calls for name in call.effects.idle if name not in call.effects.defaults] == []
