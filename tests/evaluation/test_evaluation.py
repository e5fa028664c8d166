"""The emoji score, on pictures whose answer is known."""

import json
from types import SimpleNamespace

import torch
from PIL import Image

from t2i.data.manifest import write_manifest
from t2i.evaluation.contact_sheet import build_contact_sheet
from t2i.evaluation.emoji import (
    choose_emoji_captions,
    compute_pixel_features,
    evaluate_emoji_drawings,
    open_emoji_dataset,
    strip_name_modifier,
)


class Copier:
    """Stands where a pipeline stands and draws the pictures of given records, whatever it is asked for."""

    device = torch.device("cpu")

    def __init__(self, dataset, drawn):
        self.drawn = {record.text: dataset.load_image(record.index) for record in drawn}
        self.asked = []

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompt, generator, output_type):
        self.asked += zip(prompt, [one.initial_seed() for one in generator])
        return SimpleNamespace(images=torch.stack([self.drawn[text] for text in prompt]) / 2 + 0.5)


def folder(tmp_path):
    """Emoji of three names in two colours; one is held out."""
    rows = []
    for i, name in enumerate(["dot", "bar", "box"]):
        for color in ("red", "blue"):
            image = Image.new("RGB", (128, 128), "white")
            image.paste(color, (10 + 20 * i, 10, 50 + 20 * i, 100 - 20 * i))
            image.save(tmp_path / f"{name}-{color}.png")
            split = "held_out" if (name, color) == ("box", "blue") else "train"
            rows.append({"file_name": f"{name}-{color}.png", "text": f"{name}: {color}", "split": split})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_manifest(tmp_path, quiet=True)
    return tmp_path


def test_the_real_pictures_score_one_and_swapped_colours_only_the_name(tmp_path):
    dataset, records = open_emoji_dataset(folder(tmp_path))
    copier = Copier(dataset, records)
    scores = evaluate_emoji_drawings(copier, tmp_path, tmp_path / "out")
    assert scores["train"] == {"captions": 5, "exact": 1.0, "same_name": 1.0}
    assert scores["held_out"] == {"captions": 1, "exact": 1.0, "same_name": 1.0}
    assert sorted(seed for _, seed in copier.asked) == [0, 0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "out/emoji.json").read_text())["train"]["exact"] == 1.0
    assert (tmp_path / "out/train.png").exists() and (tmp_path / "out/held_out.png").exists()

    for first, second in zip(records[::2], records[1::2]):
        copier.drawn[first.text], copier.drawn[second.text] = copier.drawn[second.text], copier.drawn[first.text]
    scores = evaluate_emoji_drawings(copier, tmp_path, tmp_path / "out")
    assert scores["train"]["exact"] == 0.0 and scores["train"]["same_name"] == 1.0


def test_features_are_colours_and_edges():
    flat = compute_pixel_features(torch.full((1, 3, 128, 128), 0.5))
    assert flat.shape == (1, 16 * 16 * 3 + 2 * 8 * 8 * 3)
    assert (flat[:, :768] == 0.5).all() and flat[:, 768:].abs().max() == 0
    image = torch.zeros(1, 3, 128, 128)
    image[..., 60:] = 1  # one vertical edge
    edges = compute_pixel_features(image)[:, 768:].view(2, 3, 8, 8)
    assert edges[0].sum() > 0 and edges[1].abs().max() == 0


def test_the_same_training_captions_are_chosen_every_time(shapes):
    _, records = open_emoji_dataset(shapes)
    first, second = choose_emoji_captions(records, 10), choose_emoji_captions(records, 10)
    assert first == second and len(first["train"]) == 10 and len(first["held_out"]) == 4
    assert strip_name_modifier("waving hand: dark skin tone") == "waving hand"
    assert strip_name_modifier("flag: France") == "flag: France"


def test_a_contact_sheet_holds_every_picture():
    sheet = build_contact_sheet([Image.new("RGB", (32, 32), "red")] * 5, ["a very long caption of red"] * 5, columns=2)
    assert sheet.size == (80, 3 * 66)
    assert sum(pixel == (255, 0, 0) for pixel in sheet.get_flattened_data()) == 5 * 32 * 32
