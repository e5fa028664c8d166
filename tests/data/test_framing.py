"""Framing: the part of an image that is trained on, and what CLIP sees, each resized once from the file."""

import random
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from t2i.config import DataConfig, TrainConfig
from t2i.data import CaptionedPictures, iterate_batches, to_tensor
from t2i.data.dataset import open_datasets
from t2i.data.framing import Framing, cut_image, is_flipped
from t2i.data.loading import format_validation_lines
from t2i.data.pictures import Resizing
from t2i.errors import InputError
from t2i.networks.clip import CLIP
from tests.helpers.samples import write_mixed_pictures

SIZES = [(32, 32)] * 5 + [(60, 40)] * 6 + [(40, 61)] * 4 + [(90, 50)] * 3 + [(200, 20)] * 2
CONFIG = {"image_size": 32, "num_workers": 0, "buckets": True, "bucket_step": 8}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def build_clip(size: int, **preprocess: object) -> CLIP:
    vision = {"image_size": size, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    return CLIP(model, {"size": size, "mean": [0.5] * 3, "std": [0.5] * 3, **preprocess})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Images of five sizes."""
    folder = tmp_path_factory.mktemp("mixed")
    write_mixed_pictures(folder, SIZES)
    return folder


def as_pixels(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image).float() / 127.5 - 1


@pytest.mark.parametrize(
    ("size", "shape", "covering"),
    [
        ((60, 40), (24, 40), (40, 26)),  # width and height: as wide as the shape, and two rows too many
        ((60, 40), (40, 24), (60, 40)),
        ((90, 30), (16, 48), (48, 16)),
        ((41, 61), (40, 24), (26, 40)),
        ((7, 9), (16, 8), (12, 16)),  # enlarged
    ],
)
def test_a_picture_is_resized_to_cover_the_shape_and_cut_in_the_middle(size, shape, covering):
    image = noise(*size)
    expected = ImageOps.fit(image.resize(covering, Image.Resampling.BICUBIC), covering)
    left, top = ((whole - part) / 2 for whole, part in zip(covering, shape[::-1]))
    expected = expected.crop((round(left), round(top), round(left) + shape[1], round(top) + shape[0]))
    assert cut_image(image, shape).equal(as_pixels(expected))
    assert cut_image(image, (16, 16)).equal(to_tensor(image, 16))  # the square is that of before


def test_random_crops_are_functions_of_the_draw_and_reach_both_ends():
    image = Image.new("RGB", (64, 32))
    for x in range(64):
        image.paste((x, 0, 0), (x, 0, x + 1, 32))
    lefts = [round((cut_image(image, (32, 48), draw)[0, 0, 0].item() + 1) * 127.5) for draw in range(1, 300)]
    assert set(lefts) == set(range(17)) and lefts == [
        round((cut_image(image, (32, 48), draw)[0, 0, 0].item() + 1) * 127.5) for draw in range(1, 300)
    ]
    view = Framing(crop="random").frame(image, (32, 32), 0)
    assert view.image.equal(to_tensor(image, 32)) and view.seen is None


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_clip_sees_the_part_that_a_draw_chooses(shape):
    """Of a ramp along x: the middle of what CLIP sees is that of what is trained on."""
    image = Image.new("RGB", (256, 64))
    for x in range(256):
        image.paste((x, 0, 0), (x, 0, x + 1, 64))
    middles = []
    for alone in (False, True):
        framing, plain = Framing("random", False, Resizing((16,), 16), alone), Framing(seen=Resizing((16,), 16))
        for draw in range(1, 100):
            view = framing.frame(image, shape, draw)
            trained, seen = Framing("random").frame(image, shape, draw).image, view.image if alone else view.seen
            assert abs(seen[0].mean() - trained[0].mean()) < 0.02 and seen.shape == (3, 16, 16)
            middles.append(float(seen[0].mean()))
        assert framing.frame(image, shape, 0)[not alone].equal(plain.frame(image, shape, 5).seen)
    end = 1 - shape[1] / (256 * shape[0] / 64)  # the middle of the last part
    assert [min(middles), max(middles)] == pytest.approx([-end, end], abs=0.03) and middles[:99] == middles[99:]
    # A CLIP that sees the squares that are trained on sees those that are drawn
    framing = Framing("random").set_clip(build_clip(32), DataConfig("x", 32), alone=False)
    assert framing.seen is None


def test_half_of_the_draws_mirror_a_picture_for_both_models():
    framing, image = Framing(flip=True, seen=Resizing((16,), 16)), noise(60, 40)
    plain = framing.frame(image, (24, 40))
    for draw in range(1, 20):
        view = framing.frame(image, (24, 40), draw)
        expected = [part.flip(-1) if is_flipped(draw) else part for part in plain]
        assert all(map(torch.equal, view, expected))
    assert 0.4 < sum(is_flipped(draw) for draw in range(2000)) / 2000 < 0.6 and not is_flipped(0)


@pytest.mark.parametrize(
    "preprocess", [{}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}], ids=["CLIP", "bilinear", "SigLIP"]
)
def test_clip_sees_what_its_own_preprocessing_makes_of_the_file(mixed, preprocess):
    clip, dataset = build_clip(16, **preprocess), CaptionedPictures(DataConfig(str(mixed), **CONFIG))
    assert dataset.add_clip_view(clip) == {"clip_input": "images resized once"}
    modes = {"bilinear": Image.Resampling.BILINEAR}
    for index in range(len(dataset)):
        image = Image.open(mixed / dataset.get_sample_key(index))
        resample = modes.get(preprocess.get("interpolation"), Image.Resampling.BICUBIC)
        if "resize_mode" in preprocess:
            expected = image.resize((16, 16), resample)
        else:
            short = min(image.size)
            image = image.resize([int(16 * side / short) for side in image.size], resample)
            left, top = (round((side - 16) / 2) for side in image.size)
            expected = image.crop((left, top, left + 16, top + 16))
        view = dataset.load_view(index)
        assert view.seen.equal(as_pixels(expected))
        assert view.image.equal(cut_image(Image.open(mixed / dataset.get_sample_key(index)), dataset.get_shape(index)))


def test_where_clip_has_the_size_of_the_squares_nothing_changes(mixed):
    config = DataConfig(str(mixed), 32, 0)
    dataset = CaptionedPictures(config)
    assert dataset.add_clip_view(build_clip(32)) == {} and dataset.framing == Framing()
    assert dataset.__getitems__([(7, 5)]).seen is None
    alone = CaptionedPictures(config)
    assert alone.add_clip_view(build_clip(32), alone=True) == {}
    assert alone.__getitems__([(7, 5)]).image.equal(dataset.__getitems__([(7, 5)]).image)


def test_both_forms_come_from_one_decoding(mixed, monkeypatch):
    dataset = CaptionedPictures(DataConfig(str(mixed), **CONFIG))
    dataset.add_clip_view(build_clip(16))
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **more: opened.append(1) or original(*given, **more))
    batch = dataset.__getitems__([(5, 0), (6, 1)])
    assert batch.image.shape == (2, 3, 24, 40) and batch.seen.shape == (2, 3, 16, 16) and len(opened) == 2


def test_batches_have_the_shape_of_their_pictures(mixed):
    dataset = CaptionedPictures(DataConfig(str(mixed), **CONFIG))
    loader, seen = iterate_batches(dataset, 0, batch_size=2, seed=0), []
    for batch in (next(loader) for _ in range(40)):
        assert {dataset.get_shape(int(index)) for index in batch.index} == {tuple(batch.image.shape[-2:])}
        seen += batch.index.tolist()
    assert set(seen) == set(range(20)) and len(set(dataset.buckets.tolist())) == 3
    parts = list(dataset.iterate_images(20, 4))
    assert sum(map(len, parts)) == 20 and len({part.shape[-2:] for part in parts}) == 3
    dataset.add_clip_view(build_clip(16), alone=True)  # for a prior
    assert dataset.buckets is None and dataset.__getitems__([(0, 1), (19, 2)]).image.shape == (2, 3, 16, 16)


def test_a_picture_that_is_gone_is_replaced_in_the_shape_of_its_batch(mixed, monkeypatch):
    dataset = CaptionedPictures(DataConfig(str(mixed), **CONFIG))
    read = dataset.manifest.read_image
    missing = {"10.png"}

    def read_image(index):
        from t2i.data.reasons import Reason, RejectedSample

        if dataset.get_sample_key(index) in missing:
            raise RejectedSample(Reason.missing_file)
        return read(index)

    monkeypatch.setattr(dataset.manifest, "read_image", read_image)
    batch = dataset.__getitems__([(9, 0), (10, 0)])
    assert batch.image.shape == (2, 3, 24, 40) and batch.index.tolist() == [9, 11]
    assert batch.rejected == [("10.png", "missing_file")]


def test_pictures_that_would_lose_too_much_can_be_left_out(mixed):
    config = DataConfig(str(mixed), **CONFIG)
    whole, some = CaptionedPictures(config), CaptionedPictures(replace(config, max_crop=0.5))
    assert (len(whole), len(some)) == (20, 18) and some.get_sample_key(17) == "17.png"
    assert whole.compute_digest() != some.compute_digest()
    assert "more than 20% of 2 of 20" in whole.format_shape_lines()[1]
    squares = CaptionedPictures(DataConfig(str(mixed), 32, 0, max_crop=0.3))
    assert len(squares) == 5 and "data.max_crop=0.3 leaves out 15 of 20 images" in squares.format_shape_lines()
    held_out = CaptionedPictures(DataConfig(str(mixed), 32, 0, max_crop=0.3), "held_out", manifest=whole.manifest)
    line = "data.max_crop=0.3 leaves out 15 of 20 held-out images"
    assert held_out.format_left_out_lines() == [line]
    assert format_validation_lines(held_out, TrainConfig(), 1) == [line]
    assert format_validation_lines(None, TrainConfig(), 1) == []
    wide = whole.manifest.select_rows(whole.lost > 0.5)
    with pytest.raises(InputError, match="data.max_crop=0.5 leaves out all images"):
        CaptionedPictures(replace(config, max_crop=0.5), manifest=wide)


def test_what_crops_take_of_the_image_that_clip_sees_is_said(mixed):
    """Of a square 0, of 60 x 40 a third, of 40 x 61 21/61, of 90 x 50 4/9, of 200 x 20 nine tenths: a third of all."""
    line = "crops take 33% of the images, and more than 20% of 15 of 20"
    mean = (6 / 3 + 4 * 21 / 61 + 3 * 4 / 9 + 2 * 0.9) / 20
    assert f"{mean:.0%}" == "33%"
    squares, buckets = DataConfig(str(mixed), 32, 0), DataConfig(str(mixed), **CONFIG)
    unused = "data.buckets=true makes no shapes here, for CLIP alone sees the images"
    for config, alone, expected in (
        (squares, True, [f"CLIP sees squares: {line}"]),
        (squares, False, [f"{line}; data.buckets=true keeps shapes"]),
        (buckets, True, [f"CLIP sees squares: {line}", unused]),
    ):
        dataset = CaptionedPictures(config)
        dataset.add_clip_view(build_clip(16), alone)
        assert dataset.format_shape_lines() == expected
    dataset = CaptionedPictures(buckets)
    dataset.add_clip_view(build_clip(16))
    shapes, crops, seen = dataset.format_shape_lines(step_size=6)
    assert shapes.startswith("shapes: ") and shapes.endswith("; a step of 6 images repeats some of 24 x 40, 32 x 32")
    assert crops.startswith("crops take ") and seen == f"CLIP sees squares: {line}"
    dataset.add_clip_view(build_clip(16, resize_mode="squash"), alone=True)  # the whole image
    assert dataset.format_shape_lines() == [unused]


def test_only_the_training_split_is_cropped_at_random_and_mirrored(shapes):
    config = DataConfig(str(shapes), 16, 0, crop="random", flip=True)
    datasets = open_datasets(config)
    assert datasets["train"].framing == Framing("random", True) and datasets["held_out"].framing == Framing()
