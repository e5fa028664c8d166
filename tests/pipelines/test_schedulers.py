"""Schedulers that a user puts into a pipeline: one check at every door, and each task with each kind of scale."""

import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UnCLIPScheduler,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from t2i.pipelines.options import DecoderOptions, build_options

from t2i import (
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    PriorPipeline,
    Text2ImagePipeline,
    UpsamplePipeline,
)
from t2i.diffusion import samplers
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.samplers import find_training_scheduler, remember_training
from t2i.errors import InputError
from t2i.networks.upsampler import Upsampler
from tests.helpers.kandinsky_folders import kandinsky_22_combined
from tests.helpers.stages import seeds
from tests.networks.test_upsampler import UNET

# Of what diffusers calls of NumPy, and of torchsde's rounding
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Should have t:UserWarning")
REFUSED = ("DDIMInverse", "DPMSolverMultistepInverse", "EDMEuler", "IPNDM", "CMStochasticIterative", "LCM")
REFUSED += ("RePaint",)
DRAWING = {"num_inference_steps": 3, "prior_num_inference_steps": 2, "prior_candidates": 1, "output_type": "latent"}


def picture(seed=0, size=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def kind_of(name):
    return getattr(diffusers, f"{name}Scheduler")


def open_doors(pipeline, name, value, folder=None):
    """Each way to put a component into a pipeline. folder: with a sound one in its place."""
    kind, parts = type(pipeline), dict(pipeline.components)
    alias = {real: other for other, real in pipeline.component_aliases.items()}.get(name, name)
    return {
        "constructor": lambda: kind(**{**parts, name: value}),
        "from_pipe": lambda: kind.from_pipe(pipeline, **{name: value}),
        "from_pipe by alias": lambda: kind.from_pipe(pipeline, **{alias: value}),
        "from_pretrained": lambda: kind.from_pretrained(folder, **{name: value}),
        "from_pretrained by alias": lambda: kind.from_pretrained(folder, **{alias: value}),
        "assignment": lambda: setattr(pipeline, name, value),
        "register_modules": lambda: pipeline.register_modules(**{name: value}),
        "register_modules by alias": lambda: pipeline.register_modules(**{alias: value}),
        "alias": lambda: setattr(pipeline, alias, value),
    }


@pytest.fixture(scope="module")
def whole_folder(loaded_pipeline, make_once):
    """A pipeline with an upsampler, as every kind of pipeline loads it."""
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    parts = {"upsampler": Upsampler(2, 8, UNET, patch_size=2), "upsampler_scheduler": scheduler}
    return make_once("whole", Text2ImagePipeline.from_pipe(loaded_pipeline, **parts).save_pretrained)


SCHEDULED = [
    (Text2ImagePipeline, "decoder"),
    (PriorPipeline, "prior"),
    (UpsamplePipeline, "upsampler"),
]


@pytest.mark.parametrize(("kind", "model"), SCHEDULED)
def test_a_scheduler_of_other_predictions_is_refused_at_every_door(kind, model, whole_folder):
    pipe, name = kind.from_pretrained(whole_folder), f"{model}_scheduler"
    before = getattr(pipe, name)
    made = before.config.prediction_type
    read = "epsilon" if made == "sample" else "sample"
    scheduler = DDPMScheduler.from_config(before.config, prediction_type=read)
    message = f"^the {name}, a DDPMScheduler, has the prediction_type {read}, but the {model} was trained with {made}; "
    message += rf"DDPMScheduler.from_config\(pipeline.{name}.config\) takes it over$"
    for open_door in open_doors(pipe, name, scheduler, whole_folder).values():
        with pytest.raises(InputError, match=message):
            open_door()
    assert getattr(pipe, name) is before and pipe.config[name][1] == type(before).__name__
    good = DDPMScheduler.from_config(before.config)
    doors = open_doors(pipe, name, good, whole_folder)
    for door in ("from_pipe by alias", "from_pretrained by alias", "alias"):
        built = doors[door]() or pipe
        assert getattr(built, name) is good and set(built.components) == set(pipe.components)


@pytest.mark.parametrize(("kind", "model"), SCHEDULED)
def test_other_noise_levels_are_said_once_at_every_door(kind, model, whole_folder, caplog):
    pipe, name = kind.from_pretrained(whole_folder), f"{model}_scheduler"
    before = getattr(pipe, name)
    other = DDPMScheduler.from_config(before.config, beta_schedule="linear", trained_betas=None, beta_end=0.002)
    assert not caplog.records
    for door, open_door in open_doors(pipe, name, other, whole_folder).items():
        pipe.register_modules(**{name: before})
        caplog.clear()
        open_door()
        (record,) = caplog.records
        assert (
            f"the {name}, a DDPMScheduler, has other noise levels than the {model} was trained with" in record.message
        )
        assert f"DDPMScheduler.from_config(pipeline.{name}.config) takes them over" in record.message, door


def test_a_model_and_its_scheduler_are_replaced_one_after_the_other_and_together(pipeline, whole_folder):
    """A call refuses the one without the other; and of a model from nowhere nothing is known."""
    other = Text2ImagePipeline.from_pretrained(whole_folder)
    kept = other.decoder_scheduler.config
    assert find_training_scheduler(other.decoder) is other.decoder_scheduler
    foreign = DDIMScheduler.from_config(kept, prediction_type="epsilon")
    remember_training(other.decoder, foreign)
    pipeline.decoder = other.decoder
    with pytest.raises(
        InputError, match="the decoder_scheduler, a .*, has the prediction_type .* trained with epsilon"
    ):
        pipeline("red circle", **DRAWING)
    pipeline.scheduler = foreign
    assert pipeline("red circle", **DRAWING).images.isfinite().all()
    unknown = type(other.decoder).from_config(other.decoder.config)
    with pytest.raises(InputError, match="epsilon"):
        pipeline.register_modules(decoder_scheduler=DDIMScheduler.from_config(kept))
    pipeline.register_modules(decoder=unknown, scheduler=DDIMScheduler.from_config(kept))
    assert pipeline.decoder is unknown
    with pytest.raises(InputError, match="scheduler is decoder_scheduler, which is given too"):
        pipeline.register_modules(scheduler=foreign, decoder_scheduler=foreign)


def test_all_parts_of_another_clip_are_taken_together_or_not_at_all(pipeline, pipeline_folder):
    other = Text2ImagePipeline.from_pretrained(pipeline_folder)
    other.clip.register_to_config(fingerprint="0" * 16)
    for part in (other.prior, other.decoder):
        part.register_to_config(clip_fingerprint=other.clip.identity)
    assert other.clip.identity != pipeline.clip.identity
    before = dict(pipeline.components)
    with pytest.raises(InputError, match="the prior was trained with the CLIP"):
        pipeline.register_modules(clip=other.clip, decoder=other.decoder)
    assert all(pipeline.components[name] is part for name, part in before.items())
    pipeline.register_modules(clip=other.clip, decoder=other.decoder, prior=other.prior)
    assert pipeline.prior is other.prior


def test_a_public_prior_keeps_the_callers_scheduler():
    scheduler = DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2")
    loaded = Text2ImagePipeline.from_pretrained(kandinsky_22_combined(), prior_scheduler=scheduler)
    assert loaded.prior_scheduler is scheduler
    wrong = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    for kind, name in ((Text2ImagePipeline, "prior_scheduler"), (PriorPipeline, "scheduler")):
        with pytest.raises(InputError, match="has the prediction_type epsilon, but the prior was trained with sample"):
            kind.from_pretrained(
                kandinsky_22_combined(), **{name if kind is Text2ImagePipeline else "prior_scheduler": wrong}
            )


def test_what_a_pipeline_of_few_parts_does_not_have_is_refused(pipeline, whole_folder):
    with pytest.raises(InputError, match="^this pipeline has no upsampler, which UpsamplePipeline needs; give ups"):
        UpsamplePipeline.from_pipe(pipeline)
    pipeline.prior = pipeline.prior_scheduler = None
    with pytest.raises(InputError, match="^this pipeline has no prior, which PriorPipeline needs; give prior=...$"):
        PriorPipeline.from_pipe(pipeline)
    with pytest.raises(InputError, match="^'decoder' is no component; they are clip, prior, prior_scheduler$"):
        PriorPipeline.from_pipe(Text2ImagePipeline.from_pretrained(whole_folder), decoder=pipeline.decoder)
    half = PriorPipeline.from_pipe(Text2ImagePipeline.from_pretrained(whole_folder), torch_dtype=torch.bfloat16)
    assert half.prior.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "door", ["constructor", "from_pipe", "from_pretrained", "assignment", "register_modules", "alias"]
)
def test_a_scheduler_that_cannot_draw_is_refused_at_every_door_with_those_that_can(
    pipeline, pipeline_folder, monkeypatch, door
):
    monkeypatch.setattr(samplers, "list_sampling_schedulers", lambda like: ["DDIM"])  # it takes a second
    before = dict(pipeline.components)
    for name in REFUSED:
        scheduler = kind_of(name).from_config(pipeline.decoder_scheduler.config)
        with pytest.raises(InputError, match=f"the decoder_scheduler, a {name}.*schedulers.*work: DDIM") as caught:
            open_doors(pipeline, "decoder_scheduler", scheduler, pipeline_folder)[door]()
        assert "\n" not in str(caught.value)
    for name in ("clip", "decoder", "decoder_scheduler", "autoencoder") if door != "from_pretrained" else ():
        with pytest.raises(InputError, match=f"^{name} is None, but this pipeline needs one$"):
            open_doors(pipeline, name, None)[door]()
    with pytest.raises(InputError, match="^decoder_scheduler must be a SchedulerMixin, got 'ddim', a str"):
        open_doors(pipeline, "decoder_scheduler", "ddim", pipeline_folder)[door]()
    assert pipeline.config.decoder_scheduler[1] == type(pipeline.decoder_scheduler).__name__
    assert all(pipeline.components[name] is part for name, part in before.items())


def test_the_schedulers_that_are_named_instead_can_be_assigned(pipeline):
    """At these levels KDPM2AncestralDiscrete is not finite on some processors: it is named where it can be assigned."""
    config = {**pipeline.decoder_scheduler.config, "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    pipeline.register_modules(scheduler=DDIMScheduler.from_config(config), decoder=copy_unknown(pipeline.decoder))
    with pytest.raises(InputError, match="LCMScheduler, is for consistency models, which this is not; ") as caught:
        pipeline.scheduler = kind_of("LCM").from_config(config)
    named = str(caught.value).partition(" work: ")[2].split(", ")
    assert "LCM" not in named and {"DDIM", "EulerDiscrete", "PNDM"} <= set(named)
    for name in named:
        pipeline.scheduler = kind_of(name).from_config(config)


def copy_unknown(model):
    """A model with the same weights, of which no schedule is known."""
    same = type(model).from_config(model.config)
    same.load_state_dict(model.state_dict())
    return same.eval()


def test_a_model_of_another_clip_cannot_be_assigned(pipeline):
    prior = pipeline.prior
    pipeline.prior = prior
    prior.register_to_config(clip_fingerprint="0" * 16)
    with pytest.raises(InputError, match="the prior was trained with the CLIP 0000000000000000, this pipeline has"):
        pipeline.prior = prior


def test_levels_that_end_in_pure_noise_are_the_trained_ones(pipeline, caplog):
    config = pipeline.decoder_scheduler.config
    pipeline.decoder_scheduler = EulerDiscreteScheduler.from_config(config)
    pipeline.decoder_scheduler = EulerDiscreteScheduler.from_config(config, rescale_betas_zero_snr=True)
    assert not caplog.records


def test_a_prior_and_its_scheduler_can_be_taken_out_one_after_the_other(pipeline):
    prior, scheduler = pipeline.prior, pipeline.prior_scheduler
    for part in ("prior", "prior_scheduler"):
        setattr(pipeline, part, None)
        with pytest.raises(InputError, match="only the diffusion prior goes with a scheduler"):
            pipeline("red circle", **DRAWING)
        pipeline.prior, pipeline.prior_scheduler = prior, scheduler
    pipeline.prior = None
    pipeline.prior_scheduler = None
    assert pipeline("red circle", **DRAWING).images.isfinite().all()


def test_the_upsamplers_scheduler_is_checked_too():
    upsampler = Upsampler(2, 8, UNET, patch_size=2)
    good = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    pipeline = UpsamplePipeline(upsampler, good)
    for value, message in ((kind_of("IPNDM")(), "the upsampler_scheduler, a IPNDM"), (None, "is None")):
        with pytest.raises(InputError, match=message):
            pipeline.upsampler_scheduler = value
        with pytest.raises(InputError, match=message):
            UpsamplePipeline(upsampler, value)


@pytest.fixture(scope="module")
def kandinsky():
    pipeline = Text2ImagePipeline.from_pretrained(kandinsky_22_combined())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_kandinsky(pipeline, **settings):
    torch.manual_seed(0)  # some of diffusers' schedulers take no generators
    return pipeline("a cat", generator=seeds(1), **{**DRAWING, "num_inference_steps": 6, **settings}).images


@pytest.mark.parametrize("name", [scheduler.name for scheduler in KarrasDiffusionSchedulers])
def test_schedulers_from_the_configuration_of_kandinskys_draw(kandinsky, name):
    """Whose variance is learned, which hardly any other scheduler reads."""
    kind = kind_of(name.removesuffix("Scheduler"))
    if kind.__module__.startswith("diffusers.utils.dummy"):
        pytest.skip("needs another package")
    saved = kandinsky.decoder_scheduler
    scheduler = kind.from_config(saved.config)
    try:
        if name == "EDMEulerScheduler":
            with pytest.raises(InputError, match="EDMEulerScheduler, cannot sample"):
                kandinsky.decoder_scheduler = scheduler
            return
        kandinsky.decoder_scheduler = scheduler
        assert kandinsky.decoder_scheduler is scheduler
        drawn = draw_kandinsky(kandinsky)
        if name != "DDPMScheduler":  # which reads it
            kandinsky.decoder_scheduler = kind.from_config({**saved.config, "variance_type": None})
        without = draw_kandinsky(kandinsky)
    finally:
        kandinsky.decoder_scheduler = saved
    assert drawn.isfinite().all()
    torch.testing.assert_close(drawn, without, atol=0, rtol=0)


def test_diffusers_unclip_scheduler_draws_what_the_folders_does(pipeline, kandinsky):
    plain = UnCLIPScheduler(**dict(kandinsky.prior_scheduler.config))
    assert type(plain) is UnCLIPScheduler and type(kandinsky.prior_scheduler) is UnCLIPRespacedScheduler
    saved, expected = kandinsky.prior_scheduler, draw_kandinsky(kandinsky, prior_num_inference_steps=5)
    try:
        kandinsky.prior_scheduler = plain
        drawn = draw_kandinsky(kandinsky, prior_num_inference_steps=5)
    finally:
        kandinsky.prior_scheduler = saved
    torch.testing.assert_close(drawn, expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_pictures_are_inverted_by_ddim_whatever_scheduler_is_in_the_pipeline(pipeline, kind):
    """Also with guidance that needs noise levels, and after a sampling that leaves levels of its own."""
    variation = ImageVariationPipeline.from_pipe(pipeline)
    settings = {"num_inference_steps": 4, "guidance_scale": Guidance(2.0, norm=0.5)}
    expected = variation.invert(picture(), **settings).latents
    other = Text2ImagePipeline.from_pipe(pipeline)
    other.decoder_scheduler = kind.from_config(pipeline.decoder_scheduler.config)
    other("red circle", generator=seeds(1), **DRAWING)
    found = ImageVariationPipeline.from_pipe(other).invert(picture(), **settings).latents
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverSinglestep"])
@pytest.mark.parametrize("task", [ImageToImagePipeline, InpaintPipeline])
def test_given_pictures_keep_what_they_have_to_with_schedulers_of_other_scales(pipeline, name, task):
    torch.manual_seed(0)
    pipeline.decoder_scheduler = kind_of(name).from_config(pipeline.decoder_scheduler.config)
    draw, size = task.from_pipe(pipeline), (32, 48) if task is InpaintPipeline else (32, 32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    previews = []
    settings = {"generator": seeds(1), "num_inference_steps": 4, "strength": 0.5, "on_preview": previews.append}
    if task is InpaintPipeline:
        mask = Image.new("L", image.size, 0)
        mask.paste(255, (0, 0, 10, 32))
        settings["mask_image"] = mask
    result = draw(image, output_type="latent", **settings).images
    known = draw.encode_latents(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1)
    assert previews[-1].step == previews[-1].steps == len(previews)
    for preview in previews:
        assert preview.estimate.std() < 3 * max(known.std(), 1)  # at Euler's own scale it would be far more
    if task is InpaintPipeline:
        torch.testing.assert_close(result[..., 4:], known[..., 4:], atol=1e-5, rtol=0)
    assert result.isfinite().all() and result.std() < 3 * max(known.std(), 1)


def test_timesteps_sigmas_and_guidance_rescale_are_taken_by_the_decoder(pipeline):
    def draw(**settings):
        return pipeline("red circle", generator=seeds(1), **{**DRAWING, "num_inference_steps": 4, **settings}).images

    seen = []

    def watch(_, step, t, tensors):
        seen.append(float(t))
        return tensors

    draw(timesteps=[900, 500.0, 20], callback_on_step_end=watch)
    assert seen == [900, 500, 20]
    rescaled = draw(guidance_scale=3.0, guidance_rescale=0.7)
    torch.testing.assert_close(rescaled, draw(guidance_scale=Guidance(3.0, rescale=0.7)), atol=0, rtol=0)
    assert (rescaled - draw(guidance_scale=3.0)).abs().max() > 1e-3
    with pytest.raises(InputError, match="ExactDDIMScheduler does not take sigmas; EulerDiscreteScheduler takes them"):
        draw(sigmas=[10, 1, 0])
    pipeline.decoder_scheduler = EulerDiscreteScheduler.from_config(pipeline.decoder_scheduler.config)
    previews = []
    assert draw(sigmas=np.array([10, 1, 0.1, 0]), on_preview=previews.append).isfinite().all()
    assert [preview.steps for preview in previews if preview.stage == "decoder"] == [3, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": [5, 9]}, r"timesteps must fall to 0 or more, got \[5, 9\]"),
        ({"timesteps": []}, "timesteps must be a list of 1 to 1001 finite numbers"),
        ({"timesteps": "abc"}, "timesteps must be a list of numbers, got 'abc'"),
        ({"sigmas": [1.0]}, "sigmas must be a list of 2 to 1001 finite numbers"),
        ({"sigmas": [3, 1], "timesteps": [3, 1]}, "timesteps and sigmas exclude each other"),
        ({"guidance_rescale": 2}, "guidance_rescale must be from 0 to 1, got 2"),
    ],
)
def test_noise_levels_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_options(options)


def test_given_noise_levels_decide_the_number_of_steps():
    assert DecoderOptions(timesteps=torch.tensor([9, 5, 1])).num_inference_steps == 3
    assert DecoderOptions(50, sigmas=[9.5, 5, 0]).num_inference_steps == 2


def test_a_clipping_scheduler_draws_as_in_diffusers_and_either_way(pipeline):
    settings = {"clip_sample": True, "clip_sample_range": 0.3}
    pipeline.decoder_scheduler = DDIMScheduler.from_config(pipeline.decoder_scheduler.config, **settings)

    def draw(**options):
        return pipeline("red circle", generator=seeds(1), **DRAWING, **options).images

    assert (draw() - draw(use_clipped_model_output=True)).abs().max() > 1e-3
    with pytest.raises(InputError, match="use_clipped_model_output needs the sampler ddim"):
        draw(use_clipped_model_output=True, sampler="unipc")


def test_a_scheduler_that_is_used_again_has_no_state_of_the_last_picture(pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.decoder_scheduler = DPMSolverMultistepScheduler.from_config(
            pipeline.decoder_scheduler.config, use_karras_sigmas=True
        )
    first, second = (pipeline("red circle", generator=seeds(1), **DRAWING).images for _ in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
