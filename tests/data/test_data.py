"""Data: what is read, in which order, and what is refused."""

import io
import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from t2i.config import DataConfig
from t2i.data import CaptionedPictures, iterate_batches, open_image, to_tensor
from t2i.data.emoji import noto as emoji_module
from t2i.data.emoji.keywords import CLDR_FOLDER
from t2i.data.emoji.names import Emoji, mark_held_out, read_emoji_names
from t2i.data.emoji.rendering import render_emoji
from t2i.data.loading import EndlessBatchSampler
from t2i.data.manifest import write_manifest
from t2i.data.pictures import decode_image
from t2i.data.reasons import Reason, RejectedSample
from t2i.errors import InputError


def test_pictures_are_floats_in_minus_one_to_one_and_held_out_ones_stay_out(shapes):
    dataset = CaptionedPictures(DataConfig(str(shapes), 32, 0))
    assert len(dataset) == 32 and len(CaptionedPictures(DataConfig(str(shapes), 32, 0), split=None)) == 36
    batch = dataset.__getitems__([(3, 7)])
    image = batch.image[0]
    assert batch.index.tolist() == [3] and image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert image.min() >= -1 and image.max() == 1
    assert all(dataset.get_record(index).split == "train" for index in range(32))


def test_a_pass_shows_every_picture_once_and_passes_differ():
    first, second = (
        [index for batch in islice(iter(EndlessBatchSampler(12, 4, seed=3, position=start)), 3) for index, _ in batch]
        for start in (0, 12)
    )
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


def test_the_order_goes_on_from_any_position_across_passes():
    whole = list(islice(iter(EndlessBatchSampler(10, 4, seed=1)), 8))
    assert list(islice(iter(EndlessBatchSampler(10, 4, seed=1, position=12)), 5)) == whole[3:]


def test_processes_share_each_global_batch():
    whole = next(iter(EndlessBatchSampler(10, 6, seed=1)))
    shares = [next(iter(EndlessBatchSampler(10, 3, seed=1, rank=rank, world=2))) for rank in range(2)]
    assert [row for pair in zip(*shares) for row in pair] == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
def test_workers_change_nothing(shapes):
    dataset = CaptionedPictures(DataConfig(str(shapes), 16, 0))
    alone, helped = (list(islice(iterate_batches(dataset, workers, batch_size=5, seed=2), 4)) for workers in (0, 2))
    for a, b in zip(alone, helped):
        assert a.captions == b.captions and a.index.equal(b.index) and a.image.equal(b.image)


LEFT_OPEN = """
import sys
from t2i.config import DataConfig
from t2i.data import CaptionedPictures, iterate_batches
loader = iterate_batches(CaptionedPictures(DataConfig(sys.argv[1], 16, 0)), 2, batch_size=5, seed=2)
next(loader)
sys.kept = [loader]
sys.kept.append(sys.kept)
"""


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_program_ends_though_it_left_its_batches_open(shapes):
    """Its workers outlive signals, but not those of multiprocessing, which waits for them without end."""
    subprocess.run([sys.executable, "-c", LEFT_OPEN, str(shapes)], check=True, timeout=60)


def test_a_picture_that_changed_is_replaced_by_the_next_and_named(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    dataset = CaptionedPictures(DataConfig(str(tmp_path / "data"), 32, 0))
    whole = dataset.__getitems__([(3, 0), (5, 1), (31, 2)])
    (tmp_path / "data/03.png").write_bytes((tmp_path / "data/02.png").read_bytes())
    (tmp_path / "data" / dataset.get_sample_key(31)).unlink()
    batch = dataset.__getitems__([(3, 0), (5, 1), (31, 2)])
    assert (
        batch.rejected == [("03.png", "changed"), (dataset.get_sample_key(31), "missing_file")] and not whole.rejected
    )
    assert batch.index.tolist() == [4, 5, 0]
    assert batch.captions == [dataset.get_caption(4, 0), whole.captions[1], dataset.get_caption(0, 2)]
    assert batch.image[1].equal(whole.image[1]) and batch.image[0].equal(dataset.load_image(4))
    with pytest.raises(InputError, match=r"03\.png.*bytes have changed"):
        dataset.load_image(3)


def test_pictures_that_are_all_gone_are_counted_and_refused(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    dataset = CaptionedPictures(DataConfig(str(tmp_path / "data"), 32, 0))
    for picture in (tmp_path / "data").glob("*.png"):
        picture.unlink()
    with pytest.raises(InputError, match=r"32 images in a row cannot be read \(32 missing_file\)"):
        dataset.__getitems__([(0, 0)])


def test_the_digest_is_of_pictures_and_captions_not_of_places(shapes, tmp_path):
    def digest(folder):
        return CaptionedPictures(DataConfig(str(folder), 32, 0)).compute_digest()

    shutil.copytree(shapes, tmp_path / "moved")
    assert digest(tmp_path / "moved") == digest(shapes)
    metadata = tmp_path / "moved/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("blue circle", "blue ring"))
    write_manifest(tmp_path / "moved", quiet=True)
    assert digest(tmp_path / "moved") != digest(shapes)


def test_transparency_becomes_white_and_other_modes_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)


def test_pictures_are_cropped_to_a_square():
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 7, 20))  # left of the centre square
    assert to_tensor(image, 10).min() > 0.99


def test_a_picture_that_does_not_decode_or_is_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"bad\.png.*a file that is not an image"):
        open_image(tmp_path / "bad.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr("t2i.limits.MAX_PIXELS", 100)
    with pytest.raises(InputError, match="30 x 30"):
        open_image(tmp_path / "large.png")


def test_sixteen_bits_of_grey_are_scaled_and_ink_becomes_light(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert [pixel[0] for pixel in open_image(tmp_path / "grey.png").get_flattened_data()] == [0, 100, 200, 255]
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    red, green, blue = open_image(tmp_path / "ink.jpg").getpixel((8, 8))
    assert red > 250 and green < 5 and blue < 5


def test_pictures_are_turned_upright(tmp_path):
    image = Image.new("RGB", (20, 10), "white")
    image.paste("black", (0, 0, 10, 10))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (0, 0, 0) and upright.getpixel((5, 17)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_pictures_of_several_frames_are_refused_and_of_one_are_read(kind):
    frames = [Image.new("RGB", (9, 8), color) for color in ("red", "green")]
    for count in (1, 2):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:count])
        if count == 1:
            assert decode_image(file.getvalue()).size == (9, 8)
        else:
            with pytest.raises(RejectedSample) as caught:
                decode_image(file.getvalue())
            assert caught.value.reason is Reason.animated


def test_a_phone_picture_with_a_second_view_is_a_still():
    file = io.BytesIO()
    Image.new("RGB", (9, 8), "red").save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 8))])
    assert decode_image(file.getvalue()).getpixel((4, 4))[0] > 250


NAMES = """# group: People & Body
# subgroup: hand-fingers-open
1F44B                                      ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB                                ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
263A                                       ; unqualified         # ☺ E0.6 smiling face
"""


def test_names_are_read_with_their_groups(tmp_path):
    (tmp_path / "names.txt").write_text(NAMES)
    one, two = read_emoji_names(tmp_path / "names.txt")
    assert (one.text, one.group, one.subgroup) == ("waving hand", "People & Body", "hand-fingers-open")
    assert two.composition_parts == ["waving hand", "light skin tone"] and two.file_name == "1f44b-1f3fb.png"


def test_what_is_held_out_is_composed_of_parts_that_are_trained_on():
    tones = ["light", "medium", "dark"]
    emoji = [Emoji("x", f"hand {i}{f': {tone} skin tone' if tone else ''}", "People & Body", "")
             for i in range(40) for tone in ("", *tones)]  # fmt: skip
    emoji.append(Emoji("y", "lonely: unique", "People & Body", ""))
    mark_held_out(emoji, one_in=2)
    held_out = [one for one in emoji if one.split == "held_out"]
    known = {part for one in emoji if one.split == "train" for part in one.composition_parts}
    assert 20 < len(held_out) < 90 and emoji[-1].split == "train"
    assert all(known.issuperset(one.composition_parts) and len(one.composition_parts) > 1 for one in held_out)


@pytest.mark.parametrize(("what", "package"), [("font", "fonts-noto-color-emoji"), ("names", "unicode-data")])
def test_a_missing_font_or_file_names_its_package(tmp_path, what, package):
    with pytest.raises(InputError, match=package) as caught:
        render_emoji(tmp_path / "new", **{"font": Path(__file__), "names": Path(__file__), what: tmp_path / "none"})
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_an_existing_folder_is_not_drawn_over(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        render_emoji(tmp_path)


@pytest.mark.skipif(not emoji_module.FONT_FILE.exists(), reason="needs the package fonts-noto-color-emoji")
@pytest.mark.skipif(not features.check("raqm"), reason="needs the package libfribidi0")
@pytest.mark.skipif(not CLDR_FOLDER.exists(), reason="needs the package unicode-cldr-core")
def test_emoji_are_drawn_in_colour_with_keywords(tmp_path):
    (tmp_path / "names.txt").write_text(NAMES)
    drawn = render_emoji(tmp_path / "emoji", 64, names=tmp_path / "names.txt")
    rows = [json.loads(line) for line in (tmp_path / "emoji/metadata.jsonl").read_text().splitlines()]
    assert len(drawn) == len(rows) == 2
    assert len(CaptionedPictures(DataConfig(str(tmp_path / "emoji"), 32, 0))) == 2  # the manifest is there too
    assert "wave" in rows[0]["keywords"] and rows[1]["text"] == "waving hand: light skin tone"
    picture = open_image(tmp_path / "emoji" / rows[0]["file_name"])
    assert picture.size == (64, 64) and picture.getpixel((0, 0)) == (255, 255, 255)
    assert len(picture.getcolors(10_000)) > 50
