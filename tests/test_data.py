"""Data: what is read, in which order, and what is refused."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image, features

from t2i.config import DataConfig
from t2i.data import CaptionedPictures, batches, open_picture, read_records, to_tensor
from t2i.data import emoji as emoji_module
from t2i.data.dataset import Order, Record, vary
from t2i.data.emoji import Emoji, hold_out, read_names, render_emoji
from t2i.errors import InputError


def test_pictures_are_floats_in_minus_one_to_one_and_held_out_ones_stay_out(shapes):
    dataset = CaptionedPictures(DataConfig(str(shapes), 32, 0))
    assert len(dataset) == 32 and len(read_records(shapes, None)) == 36
    batch = dataset.__getitems__([(3, 7)])
    image = batch.image[0]
    assert batch.index.tolist() == [3] and image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert image.min() >= -1 and image.max() == 1
    assert all(record.split == "train" for record in dataset.records)


def test_a_pass_shows_every_picture_once_and_passes_differ():
    first, second = (
        [index for batch in islice(iter(Order(12, 4, seed=3, position=start)), 3) for index, _ in batch]
        for start in (0, 12)
    )
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


def test_the_order_goes_on_from_any_position_across_passes():
    whole = list(islice(iter(Order(10, 4, seed=1)), 8))
    assert list(islice(iter(Order(10, 4, seed=1, position=12)), 5)) == whole[3:]


def test_processes_share_each_global_batch():
    whole = next(iter(Order(10, 6, seed=1)))
    shares = [next(iter(Order(10, 3, seed=1, rank=rank, world=2))) for rank in range(2)]
    assert [row for pair in zip(*shares) for row in pair] == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
def test_workers_change_nothing(shapes):
    dataset = CaptionedPictures(DataConfig(str(shapes), 16, 0))
    alone, helped = (list(islice(batches(dataset, workers, batch_size=5, seed=2), 4)) for workers in (0, 2))
    for a, b in zip(alone, helped):
        assert a.captions == b.captions and a.index.equal(b.index) and a.image.equal(b.image)


def test_captions_vary_and_repeat_for_the_same_draw():
    record = Record(Path("x.png"), "cat face", ["cat", "pet", "kitty"])
    captions = [vary(record, random.Random(i)) for i in range(300)]
    assert captions == [vary(record, random.Random(i)) for i in range(300)]
    assert {"cat face", "a cat face", "cat", "kitty"} <= set(captions)
    assert any(caption.startswith("cat face ") for caption in captions)
    assert vary(Record(Path("x.png"), "cat face"), random.Random(0)) == "cat face"


def test_transparency_becomes_white_and_other_modes_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)


def test_pictures_are_cropped_to_a_square():
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 7, 20))  # left of the centre square
    assert to_tensor(image, 10).min() > 0.99


def test_a_picture_that_does_not_decode_or_is_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"bad\.png.*does not decode"):
        open_picture(tmp_path / "bad.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr("t2i.data.pictures.MAX_PIXELS", 100)
    with pytest.raises(InputError, match="30 x 30"):
        open_picture(tmp_path / "large.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no metadata.jsonl"),
        ("", "no pictures of split 'train'"),
        ('{"file_name": "a.png"}', "metadata.jsonl:1"),
        ("not json", "metadata.jsonl:1"),
        ('{"file_name": "gone.png", "text": "x"}', "1 of 1 pictures are missing"),
        ('{"file_name": "../a.png", "text": "x"}', "inside the folder"),
        ('{"file_name": "a.png", "text": " "}', "text must be a string that is not empty"),
        ('{"file_name": "a.png", "text": "x", "keywords": "a, b"}', "keywords must be a list"),
    ],
)
def test_a_data_folder_that_cannot_be_used_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        read_records(tmp_path)


def test_a_missing_data_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no data folder"):
        read_records(tmp_path / "nowhere")


NAMES = """# group: People & Body
# subgroup: hand-fingers-open
1F44B                                      ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB                                ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
263A                                       ; unqualified         # ☺ E0.6 smiling face
"""


def test_names_are_read_with_their_groups(tmp_path):
    (tmp_path / "names.txt").write_text(NAMES)
    one, two = read_names(tmp_path / "names.txt")
    assert (one.text, one.group, one.subgroup) == ("waving hand", "People & Body", "hand-fingers-open")
    assert two.parts == ["waving hand", "light skin tone"] and two.file_name == "1f44b-1f3fb.png"


def test_what_is_held_out_is_composed_of_parts_that_are_trained_on():
    tones = ["light", "medium", "dark"]
    emoji = [Emoji("x", f"hand {i}{f': {tone} skin tone' if tone else ''}", "People & Body", "")
             for i in range(40) for tone in ("", *tones)]  # fmt: skip
    emoji.append(Emoji("y", "lonely: unique", "People & Body", ""))
    hold_out(emoji, one_in=2)
    held_out = [one for one in emoji if one.split == "held_out"]
    known = {part for one in emoji if one.split == "train" for part in one.parts}
    assert 20 < len(held_out) < 90 and emoji[-1].split == "train"
    assert all(known.issuperset(one.parts) and len(one.parts) > 1 for one in held_out)


@pytest.mark.parametrize(("what", "package"), [("font", "fonts-noto-color-emoji"), ("names", "unicode-data")])
def test_a_missing_font_or_file_names_its_package(tmp_path, what, package):
    with pytest.raises(InputError, match=package) as caught:
        render_emoji(tmp_path / "new", **{"font": Path(__file__), "names": Path(__file__), what: tmp_path / "none"})
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_an_existing_folder_is_not_drawn_over(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        render_emoji(tmp_path)


@pytest.mark.skipif(not emoji_module.FONT.exists(), reason="needs the package fonts-noto-color-emoji")
@pytest.mark.skipif(not features.check("raqm"), reason="needs the package libfribidi0")
@pytest.mark.skipif(not emoji_module.ANNOTATIONS.exists(), reason="needs the package unicode-cldr-core")
def test_emoji_are_drawn_in_colour_with_keywords(tmp_path):
    (tmp_path / "names.txt").write_text(NAMES)
    drawn = render_emoji(tmp_path / "emoji", 64, names=tmp_path / "names.txt")
    rows = [json.loads(line) for line in (tmp_path / "emoji/metadata.jsonl").read_text().splitlines()]
    assert len(drawn) == len(rows) == 2
    assert "wave" in rows[0]["keywords"] and rows[1]["text"] == "waving hand: light skin tone"
    picture = open_picture(tmp_path / "emoji" / rows[0]["file_name"])
    assert picture.size == (64, 64) and picture.getpixel((0, 0)) == (255, 255, 255)
    assert len(picture.getcolors(10_000)) > 50
