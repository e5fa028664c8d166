"""Training on images of several shapes: buckets, mirrored images, and what CLIP sees, live and from a cache."""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from t2i.pipelines.stages import run_decoder_stage
from t2i.training import cache_data
from t2i.training.common.cache_freshness import find_clip_input
from t2i.training.common.checkpoint import find_newest_checkpoint, load_checkpoint
from t2i.training.common.encodings import FrozenModels, open_encodings
from t2i.training.common.preview import PreviewPipeline
from t2i.training.common.state import is_off

from t2i.config import DataConfig, TrainConfig, load_config
from t2i.data import CaptionedPictures, open_image
from t2i.data.cache import CachedPairs
from t2i.data.framing import is_flipped
from t2i.data.loading import EndlessBatchSampler, iterate_fixed_batches
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.process import build_noise_scheduler
from t2i.errors import InputError
from t2i.files.model_folder import load_model
from t2i.interop.by_name import load_autoencoder
from t2i.networks.decoder import Decoder
from t2i.networks.unet_decoder import UNetDecoder
from tests.helpers.processes.forked import run_program
from tests.helpers.samples import write_mixed_pictures
from tests.helpers.stages import CONFIGS, arguments, seeds, train

SIZES = [(32, 32)] * 6 + [(60, 40), (40, 60)] * 5 + [(60, 40), (40, 60), (32, 32)]
BUCKETS = {"data.buckets": True, "data.bucket_step": 8}
DATA = {"image_size": 32, "num_workers": 0, "buckets": True, "bucket_step": 8}
TRANSFORMER = {"architecture": "transformer", "model": "{width: 32, depth: 1, heads: 2, patch_size: 2}"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Squares, wide and tall images, one of each held out."""
    folder = tmp_path_factory.mktemp("mixed")
    write_mixed_pictures(folder, SIZES, held_out=3)
    return folder


def build_cache(data: Path, runs: Path, output: Path, **overrides: object) -> Path:
    settings = {"data.path": data, "output": output, "clip": runs / "clip", "autoencoder": runs / "autoencoder"}
    settings |= {"shard_size": 5, "batch_size": 4, "dtype": "float32"} | BUCKETS | overrides
    given = [str(CONFIGS / "tiny/cache.yaml"), *(f"{key}={value}" for key, value in settings.items())]
    cache_data.main(load_config(cache_data.Config, "cache", given))
    return output


@pytest.fixture(scope="module")
def cache(mixed, runs, tmp_path_factory) -> Path:
    return build_cache(mixed, runs, tmp_path_factory.mktemp("caches") / "cache", **{"data.flip": True})


def train_decoder(data: Path, runs: Path, out: Path, steps: int = 3, **overrides: object) -> None:
    parts = {part: runs / part for part in ("clip", "autoencoder")}
    settings = {"train.batch_size": 2, "train.seed": 3, **parts, **BUCKETS} | overrides
    if settings.get("architecture") == "transformer":
        model = settings.pop("model")
        script = import_module("t2i.training.train_decoder")
        out.mkdir(parents=True, exist_ok=True)
        scheduler = "{prediction_type: v_prediction, clip_sample: false}"
        text = f"model: {model}\nscheduler: {scheduler}\nreads_captions: true\n"
        text += 'data: {image_size: 32, num_workers: 0}\ntrain: {mixed_precision: "no"}\n'
        (out / "decoder.yaml").write_text(text)
        given = arguments("decoder", data, out, steps, **settings)
        script.main(load_config(script.Config, "decoder", [str(out / "decoder.yaml"), *given[1:]]))
    else:
        train("decoder", data, out, steps, **settings)


def read_weights(folder: Path) -> bytes:
    return (folder / "decoder/model/diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("more", [{}, TRANSFORMER], ids=["unet", "transformer"])
def test_a_decoder_trains_on_several_shapes_and_draws_another(more, mixed, runs, tmp_path, capsys):
    train_decoder(mixed, runs, tmp_path, **more, **{"train.sample_every": 3, "sample.num_inference_steps": 2})
    said = capsys.readouterr().out
    assert "shapes: 5 of 24 x 40, 6 of 32 x 32, 5 of 40 x 24" in said and "crops take " in said
    (sheet,) = (tmp_path / "decoder/samples").rglob("*.png")
    assert open_image(sheet).width == 120 + 3 * (96 + 8) + 8
    decoder = load_model((Decoder, UNetDecoder), tmp_path / "decoder").eval()
    scheduler = build_noise_scheduler({"clip_sample": False, "prediction_type": "v_prediction"})
    pipeline = PreviewPipeline(None, None, decoder, scheduler, load_autoencoder(runs / "autoencoder").eval())
    sizes = {}
    for height, width in ((24, 40), (56, 16), (32, 32)):
        settings = {"num_inference_steps": 2, "guidance_scale": 1.5, "height": height, "width": width}
        _, options = pipeline.resolve_options(**settings)
        text = TextEncoding(torch.zeros(1, 32), torch.zeros(1, 2, 64), torch.ones(1, 2, dtype=torch.bool))
        with torch.no_grad():
            z_i = torch.nn.functional.normalize(torch.ones(1, 32), dim=-1)
            latents = run_decoder_stage(pipeline, z_i, text, options, seeds(0))
            sizes[height, width] = pipeline.decode_images(latents)
    assert all(image.shape == (1, 3, *size) and image.isfinite().all() for size, image in sizes.items())


def test_a_run_stopped_within_a_pass_goes_on_bit_for_bit(mixed, runs, tmp_path):
    settings = {"train.save_every": 1, "train.keep": 9, "train.gradient_accumulation": 2, "data.flip": True}
    settings |= {"data.crop": "random", "train.validate_every": 3}
    train_decoder(mixed, runs, tmp_path / "unbroken", 3, **settings)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    for later in ("step-00000002", "step-00000003"):
        shutil.rmtree(tmp_path / "broken/decoder/checkpoints" / later)
    shutil.rmtree(tmp_path / "broken/decoder/model")
    train_decoder(mixed, runs, tmp_path / "broken", 3, **settings)
    assert read_weights(tmp_path / "broken") == read_weights(tmp_path / "unbroken")
    with pytest.raises(InputError, match="was trained with data.flip=True, now False"):
        train_decoder(mixed, runs, tmp_path / "broken", 4, **settings | {"data.flip": False})


@pytest.mark.parametrize("name", ["crop", "bucket_step", "max_ratio", "max_crop", "flip", "buckets"])
def test_a_checkpoint_from_before_the_options_is_one_without_them(name):
    assert is_off(f"data.{name}", getattr(DataConfig(), name)) and not is_off(f"data.{name}", "another")
    assert is_off("lora", None) and not is_off("model.width", 32) and not is_off("loss_weighting", "min_snr")


def iterate_keys(buckets: object, count: int) -> list[list[tuple[int, int]]]:
    sampler = iter(EndlessBatchSampler(16, 3, seed=1, buckets=buckets))
    return [next(sampler) for _ in range(count)]


def test_a_batch_from_the_cache_equals_encoding_on_the_fly(mixed, runs, cache):
    data = DataConfig(str(mixed), **DATA, flip=True)
    live = FrozenModels(data, str(runs / "clip"), str(runs / "autoencoder"), reads_captions=True)
    cached = open_encodings(str(cache), data, str(runs / "clip"), str(runs / "autoencoder"))
    # The same numbers but for shapes without images, so that the order of samples is the same
    (numbers, of_live), (_, of_cache) = (np.unique(s.dataset.buckets, return_inverse=True) for s in (live, cached))
    assert (of_live == of_cache).all() and len(numbers) == 3
    lines = cached.dataset.format_shape_lines(8)
    assert lines == live.dataset.format_shape_lines(8) and "CLIP sees squares: crops take " in lines[-1]
    shapes, mirrored = set(), set()
    for keys in iterate_keys(live.dataset.buckets, 20):
        expected, batch = live.encode(live.dataset.__getitems__(keys)), cached.dataset.__getitems__(keys)
        assert batch.index.equal(expected.index)
        torch.testing.assert_close(batch.latents, expected.latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.image_embeds, expected.image_embeds, atol=1e-5, rtol=0)
        shapes.add(tuple(batch.latents.shape[1:]))
        mirrored |= {is_flipped(draw) for _, draw in keys}
    assert shapes == {(4, 10, 6), (4, 8, 8), (4, 6, 10)} and mirrored == {True, False}
    # Held-out images are never mirrored
    keys = [(0, 5)]
    expected, batch = live.encode(live.validation.__getitems__(keys)), cached.validation.__getitems__(keys)
    torch.testing.assert_close(batch.latents, expected.latents, atol=1e-5, rtol=0)


def test_a_decoder_learns_the_same_from_the_cache(mixed, runs, cache, tmp_path):
    settings = {"data.flip": True, "train.gradient_accumulation": 2}
    train_decoder(mixed, runs, tmp_path / "live", 4, **settings)
    train_decoder(mixed, runs, tmp_path / "cached", 4, cache=cache, **settings)
    one, other = (
        load_checkpoint(find_newest_checkpoint(tmp_path / way / "decoder/checkpoints")[0]).tensors["model"]
        for way in ("live", "cached")
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=1e-3)


def test_previews_from_the_cache_have_the_shapes_of_the_pictures(mixed, runs, cache):
    data = DataConfig(str(mixed), **DATA, flip=True)
    ways = [open_encodings(way, data, str(runs / "clip"), str(runs / "autoencoder")) for way in (None, str(cache))]
    keys = [(0, 0), (1, 0), (2, 0)]
    (one, pictures), (other, again) = (source.encode_records(keys) for source in ways)
    assert [tuple(picture.shape) for picture in pictures] == [(3, 24, 40), (3, 40, 24), (3, 32, 32)]
    assert all(map(torch.equal, pictures, again)) and one.captions == other.captions
    torch.testing.assert_close(one.image_embeds, other.image_embeds, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": False}, "another data.flip, True, now False"),
        ({"buckets": False}, "another data.buckets, multiples of 8, ratios up to 2, now None"),
        ({"bucket_step": 4}, "another data.buckets, multiples of 8, ratios up to 2, now multiples of 4"),
        ({"crop": "random"}, "data.crop=random needs images in every step"),
        ({"max_crop": 0.05}, "another data, [0-9a-f]{16}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_cache_of_other_shapes_is_refused(settings, message, mixed, runs, cache):
    data = DataConfig(str(mixed), **{**DATA, "flip": True, **settings})
    with pytest.raises(InputError, match=message):
        open_encodings(str(cache), data, str(runs / "clip"), str(runs / "autoencoder"))


def test_other_shapes_do_not_go_into_the_same_cache(mixed, runs, cache):
    for settings, message in (
        ({}, "another flip: True, now None"),
        ({"data.flip": True, "data.buckets": False}, "another buckets: multiples of 8, ratios up to 2, now None"),
    ):
        with pytest.raises(InputError, match=message):
            build_cache(mixed, runs, cache, **settings)
    with pytest.raises(InputError, match="data.crop=random"):
        build_cache(mixed, runs, cache.parent / "other", **{"data.crop": "random"})


def test_a_prior_needs_no_buckets_of_its_cache(mixed, runs, cache, tmp_path):
    train("prior", mixed, tmp_path, 2, cache=cache, clip=runs / "clip", **{"data.flip": True})
    train("prior", mixed, tmp_path / "live", 2, clip=runs / "clip", **BUCKETS, **{"data.flip": True})
    pairs = CachedPairs(cache, latents=False)
    assert pairs.buckets is None and pairs.__getitems__([(0, 0), (7, 0), (8, 0)]).latents is None


def test_validation_sees_every_bucket(mixed, runs):
    source = FrozenModels(DataConfig(str(mixed), **DATA), str(runs / "clip"), str(runs / "autoencoder"), False)
    batches = list(iterate_fixed_batches(source.validation, TrainConfig("x", batch_size=8), 0, 1))
    assert sorted(int(batch.index) for batch, _ in batches) == [0, 1, 2]
    batches = list(iterate_fixed_batches(source.dataset, TrainConfig("x", batch_size=4), 0, 1))
    assert [len(batch.index) for batch, _ in batches] == [4, 1, 4, 2, 4, 1]
    assert [weight for _, weight in batches] == [len(batch.index) / 16 for batch, _ in batches]
    assert sorted(i for batch, _ in batches for i in batch.index.tolist()) == list(range(16))


def test_an_autoencoder_trains_on_several_shapes(mixed, tmp_path):
    more = {"adversarial_weight": 0.5, "discriminator.width": 8, "discriminator.depth": 1}
    train("autoencoder", mixed, tmp_path, 3, **BUCKETS, **more, **{"train.sample_every": 3, "train.validate_every": 3})
    autoencoder = load_autoencoder(tmp_path / "autoencoder").eval()
    dataset = CaptionedPictures(DataConfig(str(mixed), **DATA))
    with torch.no_grad():
        latents = [autoencoder.encode(dataset.load_image(index)[None])[0].flatten(1) for index in range(len(dataset))]
    values = torch.cat(latents, dim=1).double()
    torch.testing.assert_close(values.mean(dim=1), torch.zeros(4).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(dim=1, correction=0), torch.ones(4).double(), atol=1e-5, rtol=0)


def test_an_upsampler_gets_the_embeddings_of_mirrored_pictures_where_they_are_mirrored(mixed, runs, cache):
    module = import_module("t2i.training.train_upsampler")
    data = DataConfig(str(mixed), **DATA, flip=True)
    config = module.Config(factor=2, crop_size=24, cache=str(cache), data=data)
    crops, live = module.RandomCrops(config), FrozenModels(data, str(runs / "clip"), None, False)
    keys = [(index, draw) for index in (0, 7, 8) for draw in range(1, 7)]
    assert len({is_flipped(draw) for _, draw in keys}) == 2
    expected = live.encode(live.dataset.__getitems__(keys)).image_embeds
    torch.testing.assert_close(crops.__getitems__(keys).image_embeds, expected, atol=1e-5, rtol=0)
    for name, value, message in (("flip", False, "made with data.flip=True, now False"), ("crop", "random", "crop=")):
        with pytest.raises(InputError, match=message):
            module.RandomCrops(replace(config, data=replace(data, **{name: value})))


def test_an_upsampler_trains_on_squares_of_pictures_of_every_shape(mixed, tmp_path):
    train("upsampler", mixed, tmp_path, 2, **BUCKETS, **{"crop_size": 24, "train.sample_every": 2})
    with pytest.raises(InputError, match="crop_size must be at most 24, the shortest side of data.buckets, got 32"):
        train("upsampler", mixed, tmp_path / "other", 2, **BUCKETS, crop_size=32)


def test_a_step_that_does_not_fit_the_decoder_is_refused(mixed, runs, tmp_path):
    with pytest.raises(InputError, match="data.bucket_step must be a multiple of 8, got 4"):
        train_decoder(mixed, runs, tmp_path, **{"data.bucket_step": 4})
    with pytest.raises(InputError, match="data.bucket_step must be a multiple of 4, got 2"):
        train("autoencoder", mixed, tmp_path, 1, **{"data.buckets": True, "data.bucket_step": 2})


def read_made_from(folder: Path) -> dict[str, str]:
    path, _ = find_newest_checkpoint(folder / "checkpoints")
    return json.loads((path / "state.json").read_text())["made_from"]


def test_runs_know_that_clip_sees_pictures_resized_once(mixed, shapes, runs, tmp_path):
    """Where its size is that of the training, as of the shipped model, nothing is added to what a run is made from."""
    train("clip", mixed, tmp_path, 1, **{"data.image_size": 64})
    assert read_made_from(tmp_path / "clip")["clip_input"] == "images resized once"
    assert "clip_input" not in read_made_from(runs / "clip") | read_made_from(runs / "decoder")
    cache = build_cache(shapes, runs, tmp_path / "cache", **{"data.buckets": False})
    assert "clip_input" not in CachedPairs(cache).made_from


def test_a_cache_from_when_clip_saw_the_squares_is_stale_where_its_size_is_another(shapes, runs, tmp_path):
    sizes = {"data.buckets": False, "data.image_size": 16}
    cache = build_cache(shapes, runs, tmp_path / "cache", **sizes)
    data, models = DataConfig(str(shapes), 16, 0), (str(runs / "clip"), str(runs / "autoencoder"))
    open_encodings(str(cache), data, *models)
    content = json.loads((cache / "cache.json").read_text())
    assert content["key"].pop("clip_input") == "images resized once"
    (cache / "cache.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="another input of CLIP, the squares that are trained on, now images resized"):
        open_encodings(str(cache), data, *models)
    assert find_clip_input("ViT-B-32:laion2b_s34b_b79k", 224) == "the squares that are trained on"
    assert find_clip_input("ViT-B-32:laion2b_s34b_b79k", 256) == "images resized once"
    assert find_clip_input("ViT-B-16-SigLIP:webli", 224) == "images resized once"
    assert find_clip_input("hf-hub:org/name", 224) is None


def test_two_processes_train_on_one_shape_a_step_and_end_with_equal_weights(mixed, runs, tmp_path):
    """Each keeps the weights and the samples of its steps; together they are those of one process."""
    script = tmp_path / "both.py"
    script.write_text(
        "import json, sys, torch\n"
        "from accelerate import PartialState\n"
        "import t2i.training.train_decoder as stage\n"
        "from t2i.training.common.entry import run\n"
        "seen = []\n"
        "def fit(accelerator, task, *rest, original=stage.fit):\n"
        "    loss = task.loss\n"
        "    def record(model, batch):\n"
        "        seen.append([*batch.image.shape, *batch.index.tolist()])\n"
        "        return loss(model, batch)\n"
        "    task.loss = record\n"
        "    original(accelerator, task, *rest)\n"
        "    weights = sum(float(one.double().sum()) for one in task.model.parameters())\n"
        "    with open(f'{sys.argv[1]}/{PartialState().process_index}.json', 'w') as file:\n"
        "        json.dump([weights, seen], file)\n"
        "stage.fit = fit\n"
        "run(stage.main, stage.Config, 'decoder', sys.argv[2:])\n"
    )
    parts = {part: runs / part for part in ("clip", "autoencoder")}
    settings = {**parts, **BUCKETS, "train.batch_size": 2, "train.gradient_accumulation": 2}
    result = run_program([script, tmp_path, *arguments("decoder", mixed, tmp_path, 6, **settings)], ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    (weights, first), (others, second) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert weights == others and len(first) == len(second) == 12
    data = CaptionedPictures(DataConfig(str(mixed), **DATA))
    sampler = iter(EndlessBatchSampler(16, 8, seed=0, buckets=data.buckets))
    shapes = set()
    for step in range(6):
        rows = [rows[2 * step + micro] for micro in (0, 1) for rows in (first, second)]
        assert len({tuple(row[:4]) for row in rows}) == 1, "one shape on both processes and in both micro-batches"
        shapes.add(tuple(rows[0][:4]))
        ours = [index for start in (0, 2) for pair in zip(rows[start][4:], rows[start + 1][4:]) for index in pair]
        assert ours == [index for index, _ in next(sampler)]
    assert len(shapes) == 3
