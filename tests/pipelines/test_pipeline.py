"""The pipeline: what it draws, what it refuses, and what its folder holds."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from t2i.pipelines import Interrupted
from t2i.pipelines.jobs.assemble import assemble_pipeline, assemble_pipeline_folder
from t2i.training import train_decoder

from t2i import InputError, Text2ImagePipeline
from t2i.config import load_config
from t2i.diffusion.ddim import build_scheduler_like
from t2i.diffusion.guidance import Guidance
from t2i.networks.decoder import Decoder
from tests.helpers.processes.forked import run_program
from tests.helpers.stages import CONFIGS, arguments, seeds, train

QUICK = {"prior_num_inference_steps": 3, "num_inference_steps": 4}


def draw(pipeline, prompt, generator, **settings):
    return pipeline(prompt, generator=generator, output_type="pt", **{**QUICK, **settings}).images


def test_a_picture_depends_on_its_own_seed_alone(pipeline):
    """Alone, in batches of 2, 3 and 8, at every position, whatever the other prompts and their lengths are."""
    alone = draw(pipeline, "red circle", seeds(5))
    for count in (2, 3, 8):
        for position in range(count):
            prompts = [f"a long caption of a green square {i}" for i in range(count)]
            prompts[position] = "red circle"
            generators = seeds(*range(100, 100 + count))
            generators[position] = seeds(5)[0]
            together = draw(pipeline, prompts, generators)
            torch.testing.assert_close(together[position : position + 1], alone, atol=1e-5, rtol=0)
    assert (together[0] - alone[0]).abs().max() > 1e-3


def test_prompts_that_look_the_same_and_numbers_of_numpy_draw_the_same(pipeline):
    expected = draw(pipeline, "red circle", seeds(5), guidance_scale=3.0)
    numbers = {
        "num_inference_steps": np.int64(4),
        "guidance_scale": np.float32(3),
        "num_images_per_prompt": np.int32(1),
    }
    for prompt in (" red\ncircle\ufeff", "re\u200bd\u00a0circle"):
        assert torch.equal(draw(pipeline, prompt, seeds(5), **numbers), expected)


def test_one_generator_draws_the_same_first_pictures_for_any_number(pipeline):
    one = draw(pipeline, "red circle", torch.Generator().manual_seed(5))
    three = draw(pipeline, "red circle", torch.Generator().manual_seed(5), num_images_per_prompt=3)
    torch.testing.assert_close(three[:1], one, atol=1e-5, rtol=0)
    assert (three[1] - three[0]).abs().max() > 1e-3


def test_pictures_of_one_prompt_stand_in_a_row(pipeline):
    both = draw(pipeline, ["red circle", "blue square"], seeds(1, 2, 3, 4), num_images_per_prompt=2)
    torch.testing.assert_close(both[1:2], draw(pipeline, "red circle", seeds(2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[2:3], draw(pipeline, "blue square", seeds(3)), atol=1e-5, rtol=0)


def test_noise_and_embeddings_can_be_given(pipeline):
    noise, embeddings = torch.randn(2, 4, 8, 8), torch.randn(2, 32)
    given = {"latents": noise, "image_embeds": embeddings}
    first, second = (pipeline(generator=seeds(*s), output_type="latent", **QUICK, **given) for s in ((1, 2), (3, 4)))
    torch.testing.assert_close(first.images, second.images)
    torch.testing.assert_close(first.image_embeds, torch.nn.functional.normalize(embeddings, dim=-1))
    prior_noise = torch.randn(1, 32)
    a, b = (pipeline("x", generator=seeds(s), prior_latents=prior_noise, **QUICK).image_embeds for s in (1, 2))
    torch.testing.assert_close(a, b)


def test_output_types(pipeline):
    def images(kind, **more):
        return pipeline("red circle", generator=seeds(1), output_type=kind, **QUICK, **more)

    picture, array, tensor = images("pil").images[0], images("np").images, images("pt").images
    assert picture.size == (32, 32) and array.shape == (1, 32, 32, 3) and tensor.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(np.asarray(picture) / 255, array[0], atol=1 / 255)
    latents = images("latent").images
    torch.testing.assert_close(pipeline.decode(latents, "pt"), tensor)
    assert isinstance(images("np", return_dict=False), tuple)


def test_guidance_and_negative_prompts_change_the_picture(pipeline):
    plain = draw(pipeline, "red circle", seeds(1), guidance_scale=1.0, prior_guidance_scale=1.0)
    for settings in (
        {"guidance_scale": 3.0, "prior_guidance_scale": 1.0},
        {"guidance_scale": 1.0, "prior_guidance_scale": 3.0},
    ):
        assert (draw(pipeline, "red circle", seeds(1), **settings) - plain).abs().max() > 1e-4
    away = {"prior_guidance_scale": 3.0, "negative_prompt": "blue square"}
    guided = draw(pipeline, "red circle", seeds(1), prior_guidance_scale=3.0)
    assert (draw(pipeline, "red circle", seeds(1), **away) - guided).abs().max() > 1e-4


def test_a_guidance_is_a_scale_that_knows_more(pipeline):
    plain = draw(pipeline, "red circle", seeds(1), guidance_scale=3.0)
    torch.testing.assert_close(draw(pipeline, "red circle", seeds(1), guidance_scale=Guidance(3.0)), plain)
    for tamed in (Guidance(3.0, interval=(0.2, 0.8)), Guidance(3.0, rescale=0.7), Guidance(3.0, parallel=0.0)):
        assert (draw(pipeline, "red circle", seeds(1), guidance_scale=tamed) - plain).abs().max() > 1e-5
        assert (draw(pipeline, "red circle", seeds(1), prior_guidance_scale=tamed) - plain).abs().max() > 1e-5


def test_the_decoder_has_a_negative_prompt_of_its_own(pipeline):
    plain = draw(pipeline, "red circle", seeds(1), guidance_scale=3.0)
    away = draw(pipeline, "red circle", seeds(1), guidance_scale=3.0, decoder_negative_prompt="blue square")
    assert (away - plain).abs().max() > 1e-4
    same = draw(
        pipeline,
        "red circle",
        seeds(1),
        guidance_scale=3.0,
        decoder_negative_prompt="red circle",
        prior_guidance_scale=1.0,
    )
    unguided = draw(pipeline, "red circle", seeds(1), guidance_scale=1.0, prior_guidance_scale=1.0)
    torch.testing.assert_close(same, unguided, atol=1e-4, rtol=0)  # away from what it goes to: nowhere


def test_pipelines_share_their_stages(pipeline):
    other = Text2ImagePipeline.from_pipe(pipeline)
    assert all(other.components[name] is part for name, part in pipeline.components.items())
    torch.testing.assert_close(draw(other, "red circle", seeds(1)), draw(pipeline, "red circle", seeds(1)))


def test_a_pipeline_without_a_prior_draws_embeddings_and_says_what_it_lacks(pipeline, tmp_path):
    bare = Text2ImagePipeline.from_pipe(pipeline, prior=None, prior_scheduler=None)
    bare.save_pretrained(tmp_path / "bare")
    bare = Text2ImagePipeline.from_pretrained(tmp_path / "bare")
    bare.set_progress_bar_config(disable=True)
    z_i = torch.randn(1, 32)
    torch.testing.assert_close(
        draw(bare, None, seeds(1), image_embeds=z_i), draw(pipeline, None, seeds(1), image_embeds=z_i)
    )


def test_previews_of_both_stages_end_with_what_they_end_with(pipeline):
    seen = []
    drawn = pipeline("red circle", generator=seeds(1), output_type="latent", on_preview=seen.append, **QUICK)
    assert [(one.stage, one.step, one.steps) for one in seen] == [
        *(("prior", i, 3) for i in (1, 2, 3)),
        *(("decoder", i, 4) for i in (1, 2, 3, 4)),
    ]
    torch.testing.assert_close(seen[2].estimate, drawn.image_embeds)
    torch.testing.assert_close(seen[-1].estimate, drawn.images)
    assert [one.images()[0].size for one in (seen[0], seen[3])] == [(32, 32)] * 2
    assert pipeline.interrupted is False
    few = []
    pipeline("red circle", generator=seeds(1), on_preview=few.append, preview_every=3, **QUICK)
    assert [(one.stage, one.step) for one in few] == [("prior", 3), ("decoder", 3), ("decoder", 4)]


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_drawing_is_interrupted_between_two_steps_and_the_next_one_is_whole(pipeline, stage):
    expected, steps = draw(pipeline, "red circle", seeds(1)), []

    def stop(preview):
        steps.append((preview.stage, preview.step))
        if (preview.stage, preview.step) == (stage, 2):
            pipeline.interrupt()

    with pytest.raises(Interrupted, match=f"after step 2 of . of the {stage}"):
        draw(pipeline, "red circle", seeds(1), on_preview=stop)
    assert steps[-1] == (stage, 2)
    torch.testing.assert_close(draw(pipeline, "red circle", seeds(1)), expected)


def test_what_is_interrupted_before_the_first_step_ends_at_it_and_before_the_call_not_at_all(pipeline, monkeypatch):
    pipeline.interrupt()
    expected, encode = draw(pipeline, "red circle", seeds(1)), pipeline.encode_prompt
    monkeypatch.setattr(pipeline, "encode_prompt", lambda prompts: pipeline.interrupt() or encode(prompts))
    with pytest.raises(Interrupted, match="after step 1 of 3 of the prior"):
        draw(pipeline, "red circle", seeds(1))
    monkeypatch.setattr(pipeline, "encode_prompt", encode)
    torch.testing.assert_close(draw(pipeline, "red circle", seeds(1)), expected)


def test_what_the_decoder_is_to_avoid_is_not_previewed(pipeline):
    seen = []
    settings = {"decoder_negative_prompt": "blue square", "on_preview": seen.append}
    z_i = pipeline("red circle", generator=seeds(1), output_type="latent", **settings, **QUICK).image_embeds
    priors = [one for one in seen if one.stage == "prior"]
    assert [one.step for one in priors] == [1, 2, 3]
    torch.testing.assert_close(priors[-1].estimate, z_i)


def test_without_prompts_what_to_avoid_goes_for_every_given_embedding(pipeline, caplog):
    embeddings = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    settings = {"image_embeds": embeddings, "generator": seeds(1, 2), "output_type": "latent", "guidance_scale": 3.0}
    plain = pipeline(**settings, **QUICK).images
    settings["generator"] = seeds(1, 2)
    away = pipeline(**settings, decoder_negative_prompt="cat", negative_prompt="dog", **QUICK).images
    assert min((one - other).abs().max() for one, other in zip(plain, away)) > 1e-3
    assert "negative_prompt has no effect" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 60, "sampler": "ddpm"}, "num_inference_steps is 60, which DDPMScheduler refuses"),
        ({"prior_num_inference_steps": 60}, "prior_num_inference_steps is 60, which .*Scheduler refuses"),
        ({"eta": 0.5}, "eta needs the sampler ddim; DPMSolverMultistepScheduler does not take it"),
    ],
)
def test_what_a_scheduler_cannot_do_is_refused_in_one_line_before_work_starts(
    pipeline, monkeypatch, arguments, message
):
    pipeline.prior_scheduler = build_scheduler_like(DDIMScheduler, pipeline.prior_scheduler, num_train_timesteps=50)
    kind = DPMSolverMultistepScheduler
    pipeline.decoder_scheduler = build_scheduler_like(kind, pipeline.decoder_scheduler, num_train_timesteps=50)
    monkeypatch.setattr(pipeline, "encode_prompt", lambda *_: pytest.fail("work has started"))
    with pytest.raises(InputError, match=message) as caught:
        pipeline("red circle", **arguments)
    assert "\n" not in str(caught.value)


def test_other_schedulers_draw(pipeline):
    pipeline.decoder_scheduler = DPMSolverMultistepScheduler.from_config(pipeline.decoder_scheduler.config)
    assert draw(pipeline, "red circle", seeds(1)).isfinite().all()


def test_a_callback_sees_every_step_and_may_change_the_latents(pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipeline(
        "red circle", generator=seeds(1), output_type="latent", callback_on_step_end=callback, **QUICK
    ).images
    assert steps == [0, 1, 2, 3] and images.abs().max() == 0


def test_a_folder_saves_loads_in_a_fresh_process_and_draws_the_same_picture(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    expected = draw(pipeline, "red circle", seeds(7))
    code = (
        "import sys, torch; from t2i import Text2ImagePipeline as P;"
        "p = P.from_pretrained(sys.argv[1]);"
        "x = p('red circle', generator=[torch.Generator().manual_seed(7)], output_type='pt',"
        " prior_num_inference_steps=3, num_inference_steps=4).images;"
        "torch.save(x, sys.argv[2])"
    )
    ended = run_program(["-c", code, tmp_path / "saved", tmp_path / "x.pt"])
    assert ended.returncode == 0, ended.stderr
    torch.testing.assert_close(torch.load(tmp_path / "x.pt"), expected, atol=1e-6, rtol=0)


def test_a_repository_of_unknown_files_is_fetched_whole_and_without_pickles(pipeline_folder, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(pipeline_folder)

    monkeypatch.setattr("t2i.interop.fetching.snapshot_download", snapshot_download)
    pipeline = Text2ImagePipeline.from_pretrained("someone/model", revision="v1")
    assert pipeline.clip.embed_dim == 32
    assert asked == {"name": "someone/model", "revision": "v1", "allow_patterns": ["*.json", "*.txt", "*.safetensors"]}


def test_the_folder_format_is_pinned(pipeline_folder):
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": ["pipeline", "Text2ImagePipeline"],  # plain diffusers reads pipeline.py by it
        "autoencoder": ["t2i.networks.autoencoder", "Autoencoder"],
        "clip": ["t2i.networks.clip", "CLIP"],
        "decoder": ["t2i.networks.unet_decoder", "UNetDecoder"],
        "decoder_scheduler": ["diffusers", "DDIMScheduler"],
        "prior": ["t2i.networks.prior", "Prior"],
        "prior_scheduler": ["diffusers", "DDIMScheduler"],
        "upsampler": [None, None],
        "upsampler_scheduler": [None, None],
        "text_encoder": [None, None],
    }
    files = {str(path.relative_to(pipeline_folder)) for path in pipeline_folder.rglob("*") if path.is_file()}
    models = {"autoencoder", "clip", "decoder", "prior"}
    assert files == {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "clip/tokenizer.json",
        "clip/words.json",
        "decoder_scheduler/scheduler_config.json",
        "prior_scheduler/scheduler_config.json",
        *(f"{name}/config.json" for name in models),
        *(f"{name}/diffusion_pytorch_model.safetensors" for name in models),
    }


def test_half_precision_folders_are_half_the_size_and_draw_nearly_the_same(runs, pipeline_folder, tmp_path):
    half = assemble_pipeline_folder(runs, tmp_path / "half", fp16=True)
    weights = "decoder/diffusion_pytorch_model.safetensors"
    assert (half / weights).stat().st_size < 0.6 * (pipeline_folder / weights).stat().st_size
    pictures = []
    for folder in (pipeline_folder, half):
        one = Text2ImagePipeline.from_pretrained(folder)
        one.set_progress_bar_config(disable=True)
        pictures.append(draw(one, "red circle", seeds(1)))
    torch.testing.assert_close(*pictures, atol=0.02, rtol=0)


def test_bfloat16_draws_nearly_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "full")
    expected = draw(pipeline, "red circle", seeds(1))
    half = Text2ImagePipeline.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.decoder.dtype == torch.bfloat16
    torch.testing.assert_close(draw(half, "red circle", seeds(1)), expected, atol=0.1, rtol=0)


def test_drawing_without_a_generator_follows_torchs_seed_and_leaves_it_usable(pipeline):
    pictures = []
    for _ in range(2):
        torch.manual_seed(3)
        pictures.append(draw(pipeline, "red circle", None))
    torch.testing.assert_close(*pictures)
    assert (draw(pipeline, "red circle", None) - pictures[0]).abs().max() > 1e-3


def test_the_transformer_is_a_decoder_like_the_unet(shapes, runs, tmp_path):
    text = (CONFIGS / "tiny/decoder.yaml").read_text()
    start, end = text.index("model:"), text.index("scheduler:")
    model = "model: {width: 64, depth: 2, heads: 2, condition_width: 32}\n"
    config = tmp_path / "decoder.yaml"
    config.write_text((text[:start] + model + text[end:]).replace("unet", "transformer"))
    settings = arguments("decoder", shapes, tmp_path, clip=runs / "clip", autoencoder=runs / "autoencoder")
    train_decoder.main(load_config(train_decoder.Config, "decoder", [str(config), *settings[1:]]))
    folder = assemble_pipeline_folder(runs, tmp_path / "transformer", decoder=str(tmp_path / "decoder"))
    pipeline = Text2ImagePipeline.from_pretrained(folder)
    assert isinstance(pipeline.decoder, Decoder)
    pipeline.set_progress_bar_config(disable=True)
    assert draw(pipeline, "red circle", seeds(1)).shape == (1, 3, 32, 32)


def test_stages_of_another_clip_are_refused(shapes, runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.rmtree(tmp_path / "runs" / "clip")
    train("clip", shapes, tmp_path / "runs", 1, **{"train.seed": 9})
    with pytest.raises(InputError, match="trained with the CLIP"):
        assemble_pipeline(tmp_path / "runs")


@pytest.mark.parametrize(
    "damage", ["empty", "no folder", "truncated", "no component", "bad index", "other clip", "a tensor less", "foreign"]
)
def test_a_damaged_folder_is_refused_in_one_line(pipeline_folder, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder, folder)
    match damage:
        case "empty":
            shutil.rmtree(folder)
            folder.mkdir()
        case "no folder":
            shutil.rmtree(folder)
        case "truncated":
            weights = folder / "decoder/diffusion_pytorch_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
        case "a tensor less":
            weights = folder / "decoder/diffusion_pytorch_model.safetensors"
            tensors = load_file(weights)
            del tensors["to_tokens.bias"]
            save_file(tensors, weights)
        case "no component":
            shutil.rmtree(folder / "prior")
        case "foreign":  # a class of any other module would be imported and built
            index = json.loads((folder / "model_index.json").read_text())
            (folder / "model_index.json").write_text(json.dumps(index | {"clip": ["subprocess", "Popen"]}))
        case "bad index":
            (folder / "model_index.json").write_text("{")
        case "other clip":
            config = json.loads((folder / "prior/config.json").read_text())
            (folder / "prior/config.json").write_text(json.dumps(config | {"clip_fingerprint": "0" * 16}))
    with pytest.raises(InputError, match=str(folder) if damage != "other clip" else "0000000000000000"):
        Text2ImagePipeline.from_pretrained(folder)


NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "prompt must not be empty"),
        ({"prompt": ["cat", "  "]}, "prompt must not be empty"),
        ({"prompt": 7}, "prompt must be a text or a list of texts, got 7"),
        ({"prompt": ["cat", None]}, "prompt must be a text or a list"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": []}, "prompt is missing"),
        ({"image_embeds": 3}, "image_embeds must be a tensor"),
        ({"image_embeds": torch.zeros(0, 32)}, "image_embeds must be a tensor"),
        ({"latents": torch.full((1, 4, 8, 8), NAN)}, "latents must be finite"),
        ({"prompt": "\udcff"}, "prompt is not valid text"),
        ({"prompt": "x" * 5000}, "at most 4096 characters, got 5000"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts for 1 prompts"),
        ({"negative_prompt": 3}, "negative_prompt must be a text"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer from 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1000, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be an integer"),
        ({"num_inference_steps": True}, "num_inference_steps must be an integer"),
        ({"prior_num_inference_steps": 1001}, "prior_num_inference_steps must be"),
        ({"guidance_scale": NAN}, "guidance_scale must be a number from 0 to 1000, got nan"),
        ({"guidance_scale": -1.0}, "guidance_scale must be from 0"),
        ({"guidance_scale": Guidance(2.0, interval=(0.8, 0.2))}, "guidance_scale.interval must rise"),
        ({"prior_guidance_scale": Guidance(2.0, rescale=2.0)}, "prior_guidance_scale.rescale must be from 0 to 1"),
        ({"decoder_negative_prompt": ["a", "b"]}, "decoder_negative_prompt has 2 texts for 1 prompts"),
        ({"preview_every": 0}, "preview_every must be an integer from 1"),
        ({"prior_guidance_scale": float("inf")}, "prior_guidance_scale must be"),
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent"),
        ({"generator": []}, "0 generators for 1 images"),
        ({"generator": 5}, "generator must be a torch.Generator"),
        ({"latents": torch.zeros(1, 4, 9, 9)}, r"latents must be a tensor of shape \(1, 4, 8, 8\)"),
        ({"prior_latents": torch.full((1, 32), NAN)}, "prior_latents must be finite"),
        ({"image_embeds": torch.zeros(2, 5)}, "image_embeds must be a tensor"),
        ({"callback_on_step_end_tensor_inputs": ["z"]}, "may contain 'latents', .*; got 'z'"),
        ({"super_res_latents": torch.zeros(1, 3, 64, 64)}, "super_res_latents needs a cascade"),
        ({"super_res_num_inference_steps": 3}, "super_res_num_inference_steps needs a cascade"),
    ],
)
def test_bad_input_is_refused_before_any_work(pipeline, monkeypatch, settings, message):
    monkeypatch.setattr(pipeline.clip, "encode_tokens", lambda *_: pytest.fail("work has started"))
    with pytest.raises(InputError, match=message) as caught:
        pipeline(**{"prompt": "red circle", **settings})
    assert "\n" not in str(caught.value)


def test_a_prompt_beyond_the_context_says_what_was_cut(pipeline, caplog):
    draw(pipeline, "red circle " * 20 + "on the moon", seeds(1))
    assert "this was cut" in caplog.text and "on the moon" in caplog.text


def test_values_that_are_not_finite_name_the_stage(pipeline):
    pipeline.decoder.net.conv_out.bias.data[0] = NAN
    with pytest.raises(ValueError, match="the decoder returned values that are not finite"):
        draw(pipeline, "red circle", seeds(1))


def test_a_decoder_is_guided_away_from_given_embeddings(pipeline) -> None:
    z_i = F.normalize(torch.randn(3, pipeline.clip.embed_dim, generator=seeds(5)[0]), dim=-1)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    plain = pipeline(image_embeds=z_i[:2], generator=seeds(1, 2), **options).images
    null = pipeline.decoder.null(2).expand().embedding
    away = pipeline(image_embeds=z_i[:2], negative_image_embeds=z_i[2:].expand(2, -1), generator=seeds(1, 2), **options)
    assert not torch.allclose(plain, away.images, atol=1e-4)
    itself = pipeline(image_embeds=z_i[:2], negative_image_embeds=z_i[:2], generator=seeds(1, 2), **options).images
    off = pipeline(image_embeds=z_i[:2], generator=seeds(1, 2), **options | {"guidance_scale": 1.0}).images
    torch.testing.assert_close(itself, off, atol=1e-4, rtol=1e-4)  # the way from a point to itself is no way
    assert not null.any(), "a guided drawing goes away from nothing by default"


def test_stages_of_other_dimensions_are_refused(pipeline) -> None:
    from t2i import Text2ImagePipeline

    config = {**pipeline.decoder.config, "embed_dim": 5}
    other = type(pipeline.decoder)(**{key: value for key, value in config.items() if not key.startswith("_")})
    with pytest.raises(InputError, match="the decoder's embeddings have 5 dimensions"):
        Text2ImagePipeline.from_pipe(pipeline, decoder=other)


def test_pictures_may_have_other_sides_than_those_of_training(pipeline) -> None:
    side, step = pipeline.image_size, pipeline.autoencoder.factor
    given = {"num_inference_steps": 2, "generator": seeds(3)}
    assert pipeline("red circle", width=2 * side, **given).images[0].size == (2 * side, side)
    plain = pipeline("red circle", **given | {"generator": seeds(3)}).images[0]
    same = pipeline("red circle", height=side, width=side, **given | {"generator": seeds(3)}).images[0]
    assert np.array_equal(np.asarray(plain), np.asarray(same))
    with pytest.raises(InputError, match=f"height must be a multiple of .*, got {side + step // 2}"):
        pipeline("red circle", height=side + step // 2)
    with pytest.raises(InputError, match="width must be an integer from 1 to 4096, got 0"):
        pipeline("red circle", width=0)


def test_where_pictures_are_painted_in_they_decide_the_size(pipeline) -> None:
    from t2i import InpaintPipeline

    painter, mask = InpaintPipeline.from_pipe(pipeline), np.eye(32, dtype=np.uint8) * 255
    with pytest.raises(InputError, match="height is 64, but images that are painted in keep their size"):
        painter(np.zeros((32, 32, 3), dtype=np.uint8), mask, "red circle", height=64)


def test_where_the_mask_s_canvas_decides_the_size_nothing_is_asked_of_a_cascade_that_is_none(pipeline) -> None:
    from t2i import InpaintPipeline

    mask = torch.ones(1, 64, 64)
    mask[:, :32] = 0
    painter, canvas = InpaintPipeline.from_pipe(pipeline), (torch.zeros(3, 64, 64), mask)
    for given in ({"super_res_latents": torch.zeros(1, 3, 64, 64)}, {"super_res_num_inference_steps": 3}):
        with pytest.raises(InputError, match=f"{[*given][0]} needs a cascade"):
            painter(*canvas, "red circle", **given)
