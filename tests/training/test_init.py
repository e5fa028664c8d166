"""`t2i init`: configurations of every stage, chosen from the data and the device, that load, build and train."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from t2i.training.recipe.recipe import check_run_folder, compose_recipe, find_device, read_data_facts
from t2i.training.recipe.sizes import (
    IMAGE_SIZES,
    LARGE,
    MEDIUM,
    SMALL,
    DataFacts,
    Device,
    choose_batch_size,
    choose_recipe_size,
    choose_steps,
)

from t2i.config import load_config
from t2i.data.buckets import list_image_shapes
from t2i.data.freshness import find_changes
from t2i.data.manifest import write_manifest
from t2i.errors import InputError
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.prior import Prior
from t2i.networks.unet_decoder import UNetDecoder
from tests.commands.test_cli import run
from tests.helpers.samples import write_mixed_pictures

STAGES = ("clip", "autoencoder", "cache", "prior", "decoder")
CPU = Device("cpu", cores=2, memory=24)
GPU = Device("cuda", cores=16, memory=80)
EMOJI = DataFacts("data/emoji", 3_529, held_out=126, side=128, caption_tokens=24, captions=3_655, variations=16)
MANY = replace(EMOJI, pictures=100_000, captions=100_000, side=512)
FEW = replace(EMOJI, pictures=32, captions=36, side=32)


def load(folder: Path) -> dict:
    """Every configuration that was written, as its script reads it."""
    scripts = {stage: "cache_data" if stage == "cache" else f"train_{stage}" for stage in STAGES}
    return {
        stage: load_config(
            import_module(f"t2i.training.{scripts[stage]}").Config, stage, [str(folder / f"{stage}.yaml")]
        )
        for stage in STAGES
        if (folder / f"{stage}.yaml").exists()
    }


@pytest.mark.parametrize(
    ("facts", "device", "image_size"),
    [
        *((facts, device, None) for facts in (FEW, EMOJI, MANY) for device in (CPU, GPU)),
        *((EMOJI, CPU, side) for side in IMAGE_SIZES),
    ],
    ids=lambda value: f"{value.pictures} images" if isinstance(value, DataFacts) else str(value),
)
def test_every_written_configuration_loads_and_builds_its_model(facts, device, image_size, tmp_path):
    compose_recipe(tmp_path / "run", facts, device, image_size=image_size).write_folder(tmp_path / "run")
    configs = load(tmp_path / "run")
    assert tuple(configs) == STAGES
    clip, autoencoder = configs["clip"], configs["autoencoder"]
    text, embed_dim = clip.model["text_cfg"], clip.model["embed_dim"]
    size = configs["decoder"].data.image_size
    with torch.device("meta"):
        pair, coder = CLIP(clip.model, clip.preprocess), Autoencoder(**autoencoder.model)
        prior = Prior(embed_dim, text["width"], text["context_length"], **configs["prior"].model)
        decoder = UNetDecoder(embed_dim, coder.channels, size // coder.factor, **configs["decoder"].model)
        picture, t = torch.zeros(2, 3, size, size), torch.zeros(2, dtype=torch.long)
        latents = coder.encode(picture)
        assert decoder(latents, t, decoder.null(2)).shape == latents.shape
        assert pair.encode_image(picture).shape == (2, embed_dim)
    assert sum(one.numel() for one in prior.parameters()) > 100_000
    assert {config.data.image_size for config in configs.values()} == {image_size or size}
    for stage, config in configs.items():
        if stage != "cache":
            assert config.train.batch_size <= facts.pictures and config.train.output == str(tmp_path / "run" / stage)


def test_the_emoji_on_two_cores_give_the_configurations_of_the_quick_recipe():
    """Of the models and of how long they are trained: the anchor of the table."""
    files = compose_recipe(Path("run"), EMOJI, CPU).files
    for stage in ("clip", "autoencoder", "prior", "decoder"):
        ours = yaml.safe_load(files[stage])
        theirs = yaml.safe_load((Path(__file__).parents[2] / f"configs/emoji-quick/{stage}.yaml").read_text())
        assert ours["model"] == theirs["model"] and ours["train"]["batch_size"] == theirs["train"]["batch_size"]
        assert ours["train"]["steps"] == pytest.approx(theirs["train"]["steps"], rel=0.02)


@pytest.mark.parametrize(
    ("facts", "device", "size", "why"),
    [
        (FEW, CPU, SMALL, "128 x 128 takes 2,000 images on a CPU, these are 32"),
        (EMOJI, CPU, MEDIUM, "256 x 256 takes a GPU"),
        (EMOJI, Device("cpu", 1, 24), SMALL, "takes two cores and 6 GB, this is a CPU with 1 core and"),
        (EMOJI, Device("cpu", 8, 4), SMALL, "takes two cores and 6 GB"),
        (EMOJI, GPU, MEDIUM, "256 x 256 takes 20,000 images on a GPU, these are 3,529"),
        (MANY, GPU, LARGE, "the largest of these recipes"),
        (MANY, Device("cuda", 16, 8), MEDIUM, "takes a GPU with 16 GB, this is a GPU with 8 GB"),
        (replace(MANY, side=200), GPU, MEDIUM, "half of the images are smaller than 256 x 256"),
        (MANY, CPU, MEDIUM, "256 x 256 takes a GPU"),
    ],
)
def test_the_size_follows_the_pictures_and_the_device_and_says_why(facts, device, size, why):
    chosen, side, reason = choose_recipe_size(facts, device, None)
    assert chosen is size and side == size.image_size and why in reason


@pytest.mark.parametrize("pictures", [10, 11, 37, 199, 1_000, 3_529, 10**6])
@pytest.mark.parametrize("size", [SMALL, MEDIUM, LARGE], ids=lambda size: str(size.image_size))
def test_batches_and_steps_stay_within_the_pictures_and_the_table(size, pictures):
    facts = replace(EMOJI, pictures=pictures)
    for stage, schedule in size.schedules.items():
        batch, _ = choose_batch_size(schedule, facts, contrastive=stage == "clip")
        steps, why = choose_steps(schedule, facts, batch)
        assert 1 < batch <= min(schedule.batch, pictures / (2 if stage == "clip" else 1))
        assert schedule.least <= steps <= schedule.most and f"{pictures:,} images" in why
        if schedule.least < steps < schedule.most:
            assert steps * batch / pictures == pytest.approx(schedule.passes, rel=0.06)


def test_facts_are_those_of_the_manifest(shapes):
    facts = read_data_facts(str(shapes))
    assert (facts.pictures, facts.held_out, facts.side, facts.captions) == (32, 4, 32, 36)
    assert facts.variations == 16  # they have keywords
    assert 4 <= facts.caption_tokens <= 12  # "red circle drawing red": a start, some words, an end


def test_few_pictures_are_warned_of_and_many_are_not():
    few, many = ("\n".join(compose_recipe(Path("run"), facts, CPU).lines) for facts in (FEW, EMOJI))
    assert "warning: 32 images are few" in few and "--clip ViT-B-32:laion2b_s34b_b79k" in few
    assert "warning" not in many and "advice" not in many


def test_public_models_need_no_stage_of_their_own(tmp_path):
    public = {"clip": "ViT-B-32:laion2b_s34b_b79k", "autoencoder": "stabilityai/sd-vae-ft-mse"}
    compose_recipe(tmp_path / "run", FEW, CPU, **public).write_folder(tmp_path / "run")
    configs = load(tmp_path / "run")
    assert tuple(configs) == ("cache", "prior", "decoder")
    for config in (configs["cache"], configs["decoder"]):
        assert (config.clip, config.autoencoder) == tuple(public.values())
    assert configs["prior"].clip == public["clip"] and configs["prior"].model["width"] == 512  # as its embeddings


def test_models_of_a_folder_are_taken_as_they_are(runs, tmp_path):
    recipe = compose_recipe(tmp_path / "run", FEW, CPU, clip=str(runs / "clip"), autoencoder=str(runs / "autoencoder"))
    assert set(recipe.files) == {"cache", "prior", "decoder"}
    with pytest.raises(InputError, match="it must be a CLIP"):
        compose_recipe(tmp_path / "run", FEW, CPU, clip=str(runs / "prior"))
    with pytest.raises(InputError, match="no trained Autoencoder"):
        compose_recipe(tmp_path / "run", FEW, CPU, autoencoder=str(tmp_path))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 images with captions, one without."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(13):
        Image.new("RGB", (40, 30), (20 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red number {i}\n")
    (folder / "12.txt").unlink()
    return folder


def test_init_checks_the_data_first_and_says_what_to_do_next(monkeypatch, capsys, photos, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = ["init", "runs/my photos", "--data", "photos", "--device", "cpu", "--held-out", 0.0]
    status, out, err = run(monkeypatch, capsys, *command)
    assert status == 0, err
    assert "no_caption: 1 x" in out and "for 12 images to train on" in out and "nothing is held out" in out
    assert "next: t2i train all 'runs/my photos' --dry-run" in out
    assert (photos / "t2i/manifest.parquet").is_file()
    assert sorted(path.name for path in Path("runs/my photos").iterdir()) == sorted(f"{s}.yaml" for s in STAGES)
    configs = load(Path("runs/my photos"))
    assert configs["decoder"].sample.prior == "runs/my photos/prior" and configs["prior"].data.path == "photos"
    for stage in STAGES:  # every line that was chosen says why
        text = Path(f"runs/my photos/{stage}.yaml").read_text()
        assert "image_size: 64 # 128 x 128 takes 2,000 images on a CPU, these are 12" in text
    before = {path: path.read_bytes() for path in Path("runs/my photos").iterdir()}
    status, out, err = run(monkeypatch, capsys, *command[:-2])
    assert status == 2 and err == "error: 'runs/my photos' exists and is not overwritten; give a new folder\n"
    assert before == {path: path.read_bytes() for path in Path("runs/my photos").iterdir()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "no file or folder 'nowhere'"),
        (["--data", "photos", "--image-size", 100], "image-size must be one of 32, 64"),
        (["--data", "photos", "--device", "tpu"], "device must be one of auto, cpu, cuda"),
        (["--data", "photos", "--device", "cuda"], "this torch sees no GPU"),
        (
            ["--data", "photos", "--clip", "ViT-B-32:nothing"],
            "clip must be the folder of a trained CLIP or a public one",
        ),
        (["--data", "photos", "--clip", "nonsense"], "clip must be the folder of a trained CLIP or a public one"),
        (["--data", "photos", "--held-out", 0.9], "held-out must be from 0 to 0.5"),
        ([], "Missing option '--data'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(monkeypatch, capsys, photos, tmp_path, more, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(monkeypatch, capsys, "init", "run", *more)
    assert status == 2 and message in err and err.startswith("error: ") and len(err.splitlines()) == 1
    assert not Path("run").exists() and [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_run_inside_the_data_or_of_an_odd_name_is_refused(photos):
    for name, message in {
        photos / "run": "lies in the data",
        Path("${x}"): "contains characters that a configuration cannot store",
        Path("a\nb"): "cannot",
    }.items():
        with pytest.raises(InputError, match=message):
            check_run_folder(name, str(photos))


def test_too_few_pictures_are_refused(photos):
    for i in range(4, 12):
        (photos / f"{i}.txt").unlink()
    write_manifest(photos, held_out=0, quiet=True)
    with pytest.raises(InputError, match="has 4 images to train on; at least 10 are needed"):
        read_data_facts(str(photos))


def test_a_share_to_hold_out_is_refused_where_a_manifest_has_decided_it(monkeypatch, capsys, photos, tmp_path):
    write_manifest(photos, held_out=0, quiet=True)
    status, _, err = run(monkeypatch, capsys, "init", tmp_path / "run", "--data", photos, "--held-out", 0.1)
    assert status == 2 and "has splits already" in err and not (tmp_path / "run").exists()


def test_what_has_changed_since_the_check_is_named(monkeypatch, capsys, photos, tmp_path):
    write_manifest(photos, held_out=0, quiet=True)
    assert find_changes(photos) is None
    (photos / "0.txt").write_text("another\n")
    Image.new("RGB", (400, 300), "blue").save(photos / "1.png")
    (photos / "2.png").unlink()
    (photos / "12.txt").write_text("a caption at last\n")
    Image.new("RGB", (40, 30), "blue").save(photos / "new.png")
    assert find_changes(photos) == "1 new (such as 'new.png'), 1 gone (such as '2.png'), 3 changed (such as '0.png')"
    status, _, err = run(monkeypatch, capsys, "init", tmp_path / "run", "--data", photos)
    assert status == 2 and "has changed since it was checked: 1 new" in err and not (tmp_path / "run").exists()
    write_manifest(photos, held_out=0, quiet=True)
    assert find_changes(photos) is None


def test_metadata_that_has_changed_is_noticed_by_its_pictures(shapes, tmp_path):
    import shutil

    shutil.copytree(shapes, tmp_path / "shapes")
    assert find_changes(tmp_path / "shapes") is None
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "shapes/more.png")
    assert find_changes(tmp_path / "shapes") == "1 new (such as 'more.png')"


def test_this_machine_is_a_device():
    device = find_device("auto")
    assert device.kind == "cpu" and device.cores >= 1 and device.memory > 0.5  # tests hide the GPU


@pytest.mark.parametrize("side", [64, 128, 256, 512])
def test_images_of_various_shapes_get_buckets_that_the_models_draw(side, tmp_path):
    facts = replace(MANY, cropped=0.23)
    recipe = compose_recipe(tmp_path / "run", facts, GPU, image_size=side)
    assert any("shapes     several: squares would take 23% of the images" in line for line in recipe.lines)
    recipe.write_folder(tmp_path / "run")
    configs = load(tmp_path / "run")
    coder = Autoencoder(**configs["autoencoder"].model)
    decoder = UNetDecoder(8, coder.channels, side // coder.factor, **configs["decoder"].model)
    assert configs["autoencoder"].data == configs["cache"].data == configs["decoder"].data
    shapes = list_image_shapes(configs["decoder"].data)
    assert len(shapes) > 2
    for sides in shapes:
        assert all(length % (coder.factor * decoder.latent_multiple) == 0 for length in sides)


def test_squares_stay_squares():
    recipe = compose_recipe(Path("run"), replace(EMOJI, cropped=0.01), CPU)
    assert yaml.safe_load(recipe.files["decoder"])["data"]["buckets"] is False
    assert any("shapes     squares take 1% of the images" in line for line in recipe.lines)


def test_what_squares_take_is_read_from_the_manifest(tmp_path):
    write_mixed_pictures(tmp_path, [(32, 32)] * 6 + [(60, 40)] * 6)
    assert read_data_facts(str(tmp_path)).cropped == pytest.approx(1 / 6)
    report = json.loads((tmp_path / "t2i/report.json").read_text())
    assert report["square_crops"] == {"mean_lost": 0.1667, "much_lost": 6}
    lines = write_manifest(tmp_path, quiet=True).format_lines()
    assert "  crops to squares take 17% of the images, and more than 20% of 6 of 12" in lines
