"""Upsampling as a part of pipelines, and on its own."""

import json
import shutil

import pytest
import torch
from PIL import Image
from t2i.pipelines import Interrupted, Text2ImagePipeline, UpsamplePipeline
from t2i.pipelines.jobs.assemble import assemble_pipeline_folder

from t2i import cli
from t2i.commands import drawing
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.networks.upsampler import Upsampler
from tests.helpers.stages import seeds, train
from tests.networks.test_upsampler import UNET


@pytest.fixture(scope="module")
def upsampler_folder(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train("upsampler", shapes, folder)
    return folder / "upsampler"


@pytest.fixture(scope="module")
def whole_folder(runs, upsampler_folder, tmp_path_factory):
    return assemble_pipeline_folder(runs, tmp_path_factory.mktemp("models") / "whole", upsampler=str(upsampler_folder))


def lively(pipeline):
    generator = torch.Generator().manual_seed(0)
    for parameter in pipeline.upsampler.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def opened(path: str) -> tuple[tuple[int, int], dict]:
    """The size of an image and the settings in it."""
    with Image.open(path) as file:
        return file.size, json.loads(file.text["t2i"])


def command(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["t2i", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, *capsys.readouterr()


def test_a_folder_with_an_upsampler_loads_and_says_so_and_one_without_loads_too(whole_folder, pipeline_folder):
    index = json.loads((whole_folder / "model_index.json").read_text())
    assert index["upsampler"] == ["t2i.networks.upsampler", "Upsampler"]
    assert index["upsampler_scheduler"] == ["diffusers", "DDIMScheduler"]
    assert isinstance(Text2ImagePipeline.from_pretrained(whole_folder).upsampler, Upsampler)
    assert Text2ImagePipeline.from_pretrained(pipeline_folder).upsampler is None


def test_a_drawing_is_upsampled_any_number_of_times_and_is_else_the_same(whole_folder):
    pipeline = lively(Text2ImagePipeline.from_pretrained(whole_folder))
    options = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "pt", "upsample_steps": 2}
    small, twice, four = (
        pipeline("red circle", generator=seeds(3), upsample=times, **options).images for times in range(3)
    )
    assert [one.shape[-1] for one in (small, twice, four)] == [32, 64, 128]
    alone = UpsamplePipeline.from_pipe(pipeline)
    alone.set_progress_bar_config(disable=True)
    again = alone(small, 1, 2, generator=seeds(3), output_type="pt").images  # the same seed, the same noise
    torch.testing.assert_close(again[0], twice[0], atol=1e-5, rtol=0)
    both = pipeline(["blue square", "red circle"], generator=seeds(8, 3), upsample=1, **options).images
    torch.testing.assert_close(both[1], twice[0], atol=1e-4, rtol=0)


def test_previews_of_the_upsampler_have_the_size_of_the_picture(whole_folder):
    pipeline, seen = lively(Text2ImagePipeline.from_pretrained(whole_folder)), []
    pipeline(
        "red circle",
        num_inference_steps=1,
        prior_num_inference_steps=1,
        upsample=1,
        upsample_steps=3,
        on_preview=lambda preview: seen.append((preview.stage, preview.step, preview.images()[0].size[0])),
    )
    assert seen[-3:] == [("upsampler", step, 64) for step in (1, 2, 3)] and seen[0][0] == "prior"


def test_pictures_that_are_enlarged_alone_are_previewed_and_can_be_interrupted(upsampler_folder):
    pipeline, seen = lively(UpsamplePipeline.from_pretrained(upsampler_folder)), []
    picture = Image.new("RGB", (13, 21), "red")
    pipeline.interrupt()
    drawn = pipeline(picture, 2, 3, generator=seeds(1), output_type="pt", on_preview=seen.append).images[0]
    assert [(one.step, one.steps) for one in seen] == [(1, 3), (2, 3), (3, 3)] * 2
    torch.testing.assert_close(seen[-1].estimate[0] / 2 + 0.5, drawn)
    assert [seen[i].images()[0].size for i in (0, -1)] == [(26, 42), (52, 84)]
    with pytest.raises(Interrupted, match="after step 1 of 3 of the upsampler"):
        pipeline(picture, 2, 3, on_preview=lambda _: pipeline.interrupt())


def test_pictures_of_several_sizes_are_upsampled_each_by_itself(upsampler_folder):
    pipeline = lively(UpsamplePipeline.from_pretrained(upsampler_folder))
    pictures = [Image.new("RGB", (13, 21), "red"), Image.new("RGB", (32, 10), "blue")]
    first = pipeline(pictures, generator=seeds(1, 2)).images
    assert [one.size for one in first] == [(26, 42), (64, 20)]
    assert first[1].tobytes() == pipeline(pictures[1], generator=seeds(2)).images[0].tobytes()


def test_upsamplers_that_take_z_i_get_that_of_the_picture(pipeline):
    torch.manual_seed(0)
    dim, fingerprint = pipeline.clip.embed_dim, pipeline.clip.identity
    taking = Upsampler(2, 16, UNET, patch_size=2, embed_dim=dim, clip_fingerprint=fingerprint).eval()
    parts = {"upsampler": taking, "upsampler_scheduler": pipeline.decoder_scheduler}
    whole = lively(Text2ImagePipeline.from_pipe(pipeline, **parts))
    picture = Image.new("RGB", (32, 32), "red")
    with_clip, without = UpsamplePipeline.from_pipe(whole), UpsamplePipeline.from_pipe(whole, clip=None)
    drawn = [one(picture, generator=seeds(1), output_type="pt").images[0] for one in (with_clip, without)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4
    other = Upsampler(2, 16, UNET, patch_size=2, embed_dim=dim, clip_fingerprint="0" * 16)
    with pytest.raises(InputError, match="the upsampler was trained with the CLIP 0000000000000000"):
        Text2ImagePipeline.from_pipe(pipeline, **(parts | {"upsampler": other}))


def test_a_standalone_pipeline_saves_and_loads(upsampler_folder, whole_folder, tmp_path):
    pipeline = UpsamplePipeline.from_pretrained(upsampler_folder)
    pipeline.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "saved", whole_folder):
        again = UpsamplePipeline.from_pretrained(folder)
        for one, other in zip(pipeline.upsampler.parameters(), again.upsampler.parameters()):
            assert torch.equal(one, other)
        assert again.upsampler_scheduler.config.prediction_type == "sample"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"upsample": 9}, "upsample must be an integer from 0 to 8, got 9"),
        ({"upsample": 1}, "upsample is 1, but this pipeline has no upsampler"),
        ({"upsample": 1, "output_type": "latent"}, "upsample needs images, but output_type is 'latent'"),
        ({"upsample_steps": 0}, "upsample_steps must be an integer from 1 to 1000, got 0"),
        ({"upsample_level": 2}, "upsample_level must be from 0 to 1, got 2"),
    ],
)
def test_a_drawing_that_cannot_be_upsampled_is_refused_before_it_is_drawn(settings, message, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "encode_prompt", lambda *_: pytest.fail("work has started"))
    with pytest.raises(InputError, match=message) as caught:
        pipeline("red circle", prior_num_inference_steps=1, **settings)
    assert "\n" not in str(caught.value)


def test_one_of_upsampler_and_scheduler_and_a_folder_without_are_refused(pipeline, upsampler_folder, pipeline_folder):
    with pytest.raises(InputError, match="upsampler and upsampler_scheduler go together"):
        Text2ImagePipeline.from_pipe(pipeline, upsampler_scheduler=load_scheduler(upsampler_folder / "scheduler"))
    with pytest.raises(InputError, match="has no upsampler; name one"):
        UpsamplePipeline.from_pretrained(pipeline_folder)
    with pytest.raises(InputError, match="this pipeline has no upsampler"):
        UpsamplePipeline.from_pipe(pipeline)
    alone = UpsamplePipeline.from_pretrained(upsampler_folder)
    for image, message in (
        ([], "image has no images"),
        (7, "image must be an image or a list of images, got int"),
        (torch.zeros(1, 8, 8), r"image has the shape \(1, 8, 8\)"),
        (torch.full((3, 8, 8), float("nan")), "has values in .0, 1."),
        (Image.new("RGB", (1, 9)), "sides of at least 2 pixels, got 1 x 9"),
    ):
        with pytest.raises(InputError, match=message):
            alone(image)
    too_large = Image.new("RGB", (1000, 900))
    with pytest.raises(InputError, match="1000 x 900 would become 8000 x 7200"):
        alone(too_large, times=3)


def test_the_commands_upsample_assemble_and_draw(
    monkeypatch, capsys, tmp_path, runs, upsampler_folder, whole_folder, pipeline_folder
):
    for name, size in (("a", (12, 16)), ("b", (20, 8))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    pictures, out = [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out"
    options = ["--times", 2, "--steps", 1, "--seed", 5, "--out", out]
    status, said, err = command(monkeypatch, capsys, "upsample", *pictures, "--upsampler", upsampler_folder, *options)
    assert status == 0, err
    (first, _), (second, written) = map(opened, said.splitlines())
    assert (first, second) == ((48, 64), (80, 32))
    assert (written["picture"], written["seed"], written["upsample"], written["level"]) == ("b.png", 6, 2, 0.0)
    draw = ["generate", "red circle", "--steps", 1, "--prior-steps", 1, "--upsample", 1, "--out", out]
    named = ["--model", pipeline_folder, "--upsampler", upsampler_folder]
    for model in (["--model", whole_folder], named, [*named, "--dtype", "bf16"]):
        status, said, err = command(monkeypatch, capsys, *draw, *model)
        assert status == 0 and opened(said.strip())[0] == (64, 64), err
    assert opened(said.strip())[1]["upsampler"] == upsampler_folder.name
    monkeypatch.setattr(drawing, "SHIPPED_MODEL", tmp_path / "models" / "emoji")
    shutil.copytree(upsampler_folder, tmp_path / "models" / "emoji-upsampler")
    status, said, err = command(monkeypatch, capsys, "upsample", pictures[0], "--steps", 1, "--out", out)
    assert status == 0 and opened(said.strip())[1]["model"] == "emoji-upsampler", err
    few = ["--steps", 2, "--upsample", 1, "--model", pipeline_folder, "--upsampler", upsampler_folder, "--out", out]
    steer = ["--steer-text", "red"]
    for words, asked in (
        (["variations", pictures[0], "--sampler", "unipc"], {"sampler": "unipc"}),
        (["edit", pictures[0], "--from", "red circle", "--to", "blue square"], {}),
        (["interpolate", pictures[0], "red circle", "--weights", "1,1", "--candidates", 3], {"prior_candidates": 3}),
    ):
        status, said, err = command(monkeypatch, capsys, *words, *steer, *few)
        size, written = opened(said.strip())
        assert status == 0 and size == (64, 64), err
        asked = asked | {"upsampler": upsampler_folder.name, "steering": {"scale": 1.0, "text": "red"}}
        assert asked.items() <= written.items()
    refusals = {
        "sampler must be ddim for inverted images": ["variations", pictures[0], "--eta", 0.5, "--sampler", "ode"],
        "no upsampler": ["upsample", pictures[0], "--model", pipeline_folder],
        "times must be": ["upsample", pictures[0], "--times", 0],
        "no such": ["upsample", tmp_path / "c.png"],
        "level must be from 0 to 0.2": ["upsample", pictures[0], "--upsampler", upsampler_folder, "--level", 0.4],
    }
    for message, words in refusals.items():
        status, _, err = command(monkeypatch, capsys, *words, "--out", out)
        assert status == 2 and message in err.lower() and len(err.splitlines()) == 1, err
