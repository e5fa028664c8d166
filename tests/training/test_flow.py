"""Rectified flow from the configuration to the picture: stages that are trained, stored and drawn with."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from t2i import (
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    InterpolationPipeline,
    Text2ImagePipeline,
    TextDiffPipeline,
)
from t2i.config import load_config
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.samplers import SAMPLERS
from t2i.errors import InputError
from t2i.evaluation.likelihood import LikelihoodSettings, evaluate_model_likelihood
from tests.helpers.stages import arguments, seeds, train

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "decoder.md"
STAGES = ("prior", "decoder", "upsampler")
# The tiny configurations are of other processes, whose arguments are left out by null
FLOW = {f"scheduler.{name}": "null" for name in ("beta_schedule", "clip_sample", "timestep_spacing")}
FLOW |= {"scheduler.prediction_type": "flow_prediction", "scheduler.shift": 3.0}
OF_UPSAMPLER = {"scheduler.beta_start": "null", "scheduler.beta_end": "null", "loss_weighting": "none"}
DRAWING = {"num_inference_steps": 3, "prior_num_inference_steps": 2, "prior_candidates": 2, "output_type": "latent"}
SOLVER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def flow_settings(stage, runs):
    frozen = {"prior": ("clip",), "decoder": ("clip", "autoencoder"), "upsampler": ()}[stage]
    return FLOW | {part: runs / part for part in frozen} | (OF_UPSAMPLER if stage == "upsampler" else {})


@pytest.fixture(scope="module")
def flow_runs(shapes, runs, make_once):
    def train_stages(folder):
        for stage in STAGES:
            train(stage, shapes, folder, **flow_settings(stage, runs))

    return make_once("flow_runs", train_stages)


@pytest.fixture(scope="module")
def flow_folder(runs, flow_runs, make_once):
    from t2i.pipelines.jobs.assemble import assemble_pipeline_folder

    folders = {stage: str(flow_runs / stage) for stage in STAGES}
    folders |= {stage: str(runs / stage) for stage in ("clip", "autoencoder")}
    return make_once("flow_tiny", lambda folder: assemble_pipeline_folder(flow_runs, folder, **folders))


@pytest.fixture(scope="module")
def stored_pipeline(flow_folder):
    pipeline = Text2ImagePipeline.from_pretrained(flow_folder)
    for part in (pipeline.prior, pipeline.decoder):  # three steps leave layers that started at zero almost there
        generator = torch.Generator().manual_seed(0)
        for parameter in part.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(stored_pipeline):
    return copy.deepcopy(stored_pipeline)


def draw(pipeline, **settings):
    return pipeline("red circle", generator=seeds(1), **{**DRAWING, **settings}).images


def picture(size=(32, 32)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stores_diffusers_flow_scheduler_with_its_shift(stage, flow_runs):
    stored = json.loads((flow_runs / stage / "scheduler" / "scheduler_config.json").read_text())
    assert stored["_class_name"] == "FlowMatchEulerDiscreteScheduler" and stored["shift"] == 3.0
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(flow_runs / stage / "scheduler").shift == 3.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"scheduler.beta_schedule": "linear"},
            "scheduler.beta_schedule does not go with scheduler.prediction_type=fl",
        ),
        (
            {"scheduler.clip_sample": False, "scheduler.beta_start": 0.1},
            "; leave out with scheduler.beta_start=null scheduler.clip_sample=null$",
        ),
        ({"loss_weighting": "min_snr"}, "loss_weighting=min_snr does not go with scheduler.prediction_type=flow"),
        ({"model.learned_variance": True}, "model.learned_variance does not go with scheduler.prediction_type=flow"),
        ({"logit_std": 0}, "logit_std must be from 0.01 to 10, got 0"),
        (
            {"scheduler.prediction_type": "sample", "scheduler.shift": "null", "logit_mean": 1},
            "logit_mean and logit_std",
        ),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_settings_that_do_not_go_with_a_flow_are_refused_at_the_start(stage, overrides, message, runs, tmp_path):
    from importlib import import_module

    if stage == "upsampler" and "model.learned_variance" in overrides:
        pytest.skip("has no such setting")
    config = import_module(f"t2i.training.train_{stage}").Config
    settings = flow_settings(stage, runs) | overrides
    with pytest.raises(InputError, match=message) as caught:
        load_config(config, stage, arguments(stage, tmp_path, tmp_path, **settings))
    assert "\n" not in str(caught.value)


def test_the_command_of_the_page_trains_a_decoder(shapes, runs, tmp_path):
    from t2i.training.train_decoder import Config, main

    [command] = re.findall(r"^t2i train decoder (.*)$", PAGE.read_text(), re.MULTILINE)
    given = load_config(Config, "decoder", command.split())
    tiny = [f"{part}={runs / part}" for part in ("clip", "autoencoder")]
    tiny += ["cache=null", f"data.path={shapes}", "data.image_size=32", f"train.output={tmp_path / 'decoder'}"]
    tiny += ["data.balance_by=null", "data.in_sentence=0", "data.sentences=null"]  # of the emoji's data
    tiny += [
        "train.steps=1",
        "train.batch_size=2",
        "train.mixed_precision=no",
        "train.trackers=[]",
        "train.validate_every=0",
    ]
    main(load_config(Config, "decoder", [*command.split(), *tiny, "train.sample_every=0"]))
    stored = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "decoder" / "scheduler")
    assert stored.shift == given.scheduler["shift"] == 4.0


def test_a_stage_is_trained_further_by_adapters_and_by_no_other_objective(shapes, runs, flow_runs, tmp_path):
    settings = {part: runs / part for part in ("clip", "autoencoder")} | {"init": flow_runs / "decoder"}
    with pytest.raises(InputError, match="trained with scheduler.prediction_type 'flow_prediction', this run has 'v_p"):
        train("decoder", shapes, tmp_path, **settings)
    train("decoder", shapes, tmp_path, 2, **settings, **FLOW | {"lora.rank": 2, "scheduler.shift": 2.0})
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "decoder" / "scheduler").shift == 2.0
    assert (tmp_path / "decoder" / "adapters" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", [None, *SAMPLERS])
def test_a_prompt_is_drawn_by_every_sampler_with_previews(pipeline, name):
    previews = []
    drawn = draw(pipeline, sampler=name, prior_sampler=name, on_preview=previews.append)
    assert drawn.isfinite().all() and {preview.stage for preview in previews} == {"prior", "decoder"}
    assert all(preview.estimate.isfinite().all() for preview in previews)
    assert previews[-1].step == previews[-1].steps


def test_schedulers_are_exchanged_as_in_diffusers(pipeline):
    """And lead to about the same picture, those of higher order nearer to each other than to Euler's."""
    z_i = pipeline("red circle", generator=seeds(1), **DRAWING).image_embeds
    first, drawn = pipeline.decoder_scheduler, {}
    for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler):
        pipeline.decoder_scheduler = kind.from_config(
            first.config, **(SOLVER if kind is DPMSolverMultistepScheduler else {})
        )
        drawn[kind] = draw(pipeline, image_embeds=z_i, num_inference_steps=16, guidance_scale=1.0)
    euler, heun, solver = drawn.values()
    with pytest.raises(InputError, match="trained with flow_prediction; UniPC.*config, .*use_flow_sigmas=True, flow_s"):
        pipeline.decoder_scheduler = UniPCMultistepScheduler.from_config(first.config)
    assert (heun - solver).abs().mean() < (euler - solver).abs().mean() < 0.2 * heun.std()


def test_a_pipeline_is_stored_with_the_scheduler_that_it_has(pipeline, tmp_path):
    pipeline.decoder_scheduler = UniPCMultistepScheduler.from_config(pipeline.decoder_scheduler.config, **SOLVER)
    pipeline.save_pretrained(tmp_path / "model")
    again = Text2ImagePipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert type(again.prior_scheduler) is FlowMatchEulerDiscreteScheduler
    torch.testing.assert_close(draw(again), draw(pipeline), atol=0, rtol=0)


def test_a_picture_does_not_depend_on_its_batch_and_settings_change_it(pipeline):
    both = pipeline("red circle", num_images_per_prompt=2, generator=seeds(1, 2), **DRAWING).images
    torch.testing.assert_close(both[:1], draw(pipeline), atol=1e-5, rtol=0)
    plain = draw(pipeline, guidance_scale=3.0)
    for settings in (
        {"guidance_rescale": 0.7},
        {"guidance_scale": Guidance(3.0, interval=(0.0, 0.5))},
        {"eta": 1.0, "sampler": "ddim"},
        {"timesteps": [1000, 500, 10.5]},
        {"sigmas": [1.0, 0.5, 0.0]},
    ):
        assert (draw(pipeline, **{"guidance_scale": 3.0} | settings) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [None, FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_pictures_are_redrawn_and_painted_in_and_keep_what_they_have_to(pipeline, kind):
    if kind is not None:
        settings = SOLVER if kind is DPMSolverMultistepScheduler else {}
        pipeline.decoder_scheduler = kind.from_config(pipeline.decoder_scheduler.config, **settings)
    image = picture((32, 48))
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (0, 0, 10, 32))
    settings = {"generator": seeds(1), "num_inference_steps": 4, "strength": 0.5, "output_type": "latent"}
    painter = InpaintPipeline.from_pipe(pipeline)
    painted = painter(image, mask_image=mask, **settings).images
    known = painter.encode_latents(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1)
    torch.testing.assert_close(painted[..., 4:], known[..., 4:], atol=1e-5, rtol=0)
    redrawn = ImageToImagePipeline.from_pipe(pipeline)(picture(), **settings).images
    assert redrawn.isfinite().all()


def test_a_picture_comes_back_from_its_noise_and_is_varied_interpolated_and_turned(pipeline):
    variation = ImageVariationPipeline.from_pipe(pipeline)
    latent = variation.invert(picture(), num_inference_steps=20)
    settings = {"num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "latent"}
    turned = TextDiffPipeline.from_pipe(pipeline)(latent, "red circle", "blue square", theta=0.0, **settings).images
    known = variation.encode_latents(torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1)
    torch.testing.assert_close(turned, known, atol=5e-3, rtol=0)
    assert variation(picture(), generator=seeds(1), num_inference_steps=3, output_type="latent").images.isfinite().all()
    frames = InterpolationPipeline.from_pipe(pipeline)(["red circle", "blue square"], frames=3, **DRAWING).images
    assert len(frames) == 3 and frames.isfinite().all()


def test_pictures_are_upsampled_and_the_likelihood_is_measured(pipeline, shapes, tmp_path):
    drawn = draw(pipeline, upsample=1, upsample_steps=2, output_type="pt")
    assert drawn.shape[-2:] == (64, 64) and drawn.isfinite().all()
    result = evaluate_model_likelihood(pipeline, shapes, tmp_path / "likelihood.json", LikelihoodSettings(2, 3, 3))
    for stage in ("prior", "decoder"):
        figures = result["train"][stage]
        assert np.isfinite(figures["ode"]["bits"]) and figures["bound_prior"]["bits"] == 0


def test_a_classifier_may_have_the_decoders_scheduler(labelled, runs, tmp_path):
    """It learns noise levels, on latents scaled as those of other processes."""
    settings = {part: runs / part for part in ("clip", "autoencoder")} | FLOW
    train("classifier", labelled, tmp_path, 2, **settings, **{"train.log_every": 1})
    lines = [json.loads(line) for line in (tmp_path / "classifier" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line) and lines
