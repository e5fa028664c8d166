"""What CLIP can do by itself: labels, indices, searches, matrices; and their commands."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from t2i.data.picture_files import find_images
from t2i.data.pictures import Resizing, open_image, to_tensor
from t2i.errors import InputError
from t2i.evaluation import retrieval
from t2i.evaluation.contact_sheet import GREEN, build_similarity_matrix
from t2i.evaluation.retrieval import (
    INDEX_FILE,
    classify_image_embeds,
    embed_image_files,
    embed_labels,
    iterate_image_embeds,
    open_image_index,
    search_image_index,
)
from tests.commands.test_cli import run
from tests.networks.test_clip import make

COLORS = ("red", "lime", "blue", "yellow")


@pytest.fixture
def folder(tmp_path):
    """Four images of different colours and sizes, one of them in a folder below."""
    root = tmp_path / "pictures"
    (root / "below").mkdir(parents=True)
    for i, color in enumerate(COLORS):
        image = Image.new("RGB", (40 + 8 * i, 40), "white")
        image.paste(color, (4 * i, 4, 30 + 4 * i, 30))
        image.save(root / ("below" if i == 3 else ".") / f"{color}.png")
    return root


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "clip"
    make().save_pretrained(path)
    return path


def other():
    clip = make()
    with torch.no_grad():
        clip.net.logit_scale += 1
    return clip


def test_a_label_is_the_mean_of_its_sentences():
    clip, templates = make(), ["a {}", "the {}, on white"]
    sentences = clip.encode_text(["a cat", "the cat, on white"]).embedding
    expected = F.normalize(F.normalize(sentences, dim=-1).mean(dim=0), dim=-1)
    torch.testing.assert_close(embed_labels(clip, ["dog", "cat"], templates)[1], expected, atol=1e-6, rtol=1e-5)
    alone = embed_labels(clip, ["cat"] * 70)  # more than a batch
    assert alone.shape == (70, 16) and torch.allclose(alone[0], alone[69], atol=1e-6)


def test_probabilities_are_the_softmax_of_scaled_cosines():
    clip, z_i = make(), F.normalize(torch.randn(3, 16), dim=-1)
    labels = ["cat", "red circle", "dark"]
    cosines = z_i @ clip.encode_text(labels).embedding.T
    expected = (clip.net.logit_scale.exp() * cosines).softmax(dim=-1)
    torch.testing.assert_close(classify_image_embeds(clip, z_i, labels), expected, atol=1e-5, rtol=1e-4)
    # An image whose embedding is a label's own is of that label.
    own = classify_image_embeds(clip, clip.encode_text(labels).embedding, labels)
    assert own.argmax(dim=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no labels"),
        (["cat", "dog", "cat"], "the label 'cat' is given twice"),
        (["cat", " "], "label must not be empty"),
        (["cat"], "leaves no choice"),
    ],
)
def test_labels_given_twice_or_none_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        retrieval.normalize_labels(labels)


def test_a_picture_of_the_right_size_is_seen_as_it_is(folder):
    clip = make()
    image = open_image(folder / "red.png").crop((0, 0, 32, 32))
    expected = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(32, 32, 3).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(to_tensor(image, Resizing.for_clip(clip)), expected)
    assert to_tensor(open_image(folder / "below/yellow.png"), Resizing.for_clip(clip)).shape == (3, 32, 32)


def test_a_picture_is_nearest_to_itself_and_texts_to_what_the_cosine_says(folder):
    clip = make()
    index = open_image_index(clip, folder)
    assert sorted(index.names) == ["below/yellow.png", "blue.png", "lime.png", "red.png"]
    for name in index.names:
        found, cosine = search_image_index(clip, index, None, folder / name, 1)[0]
        assert found == name and cosine == pytest.approx(1, abs=1e-5)
    ranked = search_image_index(clip, index, "cat", None, 99)
    cosines = embed_image_files(clip, [folder / name for name in index.names]) @ clip.encode_text(["cat"]).embedding[0]
    assert [name for name, _ in ranked] == [index.names[i] for i in cosines.argsort(descending=True)]
    assert [value for _, value in ranked] == pytest.approx(sorted(cosines.tolist(), reverse=True), abs=1e-5)


def test_only_what_is_new_is_embedded_again(folder, monkeypatch):
    clip, embedded = make(), []

    def counting(clip, paths, job):
        embedded.append([path.name for path in paths])
        return iterate_image_embeds(clip, paths, job)

    monkeypatch.setattr(retrieval, "iterate_image_embeds", counting)
    first = open_image_index(clip, folder)
    assert (folder / INDEX_FILE).is_file()
    (folder / "red.png").rename(folder / "rouge.png")  # known by its content
    Image.new("RGB", (40, 40), "black").save(folder / "blue.png")
    second = open_image_index(clip, folder)
    assert embedded == [["yellow.png", "blue.png", "lime.png", "red.png"], ["blue.png"]]
    by_name = [dict(zip(index.names, index.image_embeds)) for index in (first, second)]
    assert torch.equal(by_name[0]["red.png"], by_name[1]["rouge.png"])
    assert not torch.equal(by_name[0]["blue.png"], by_name[1]["blue.png"])
    open_image_index(clip, folder)
    open_image_index(other(), folder)  # its own index is of no use to another CLIP, which makes it anew
    assert embedded[2:] == [[], ["yellow.png", "blue.png", "lime.png", "rouge.png"]]


def test_an_index_that_was_given_must_be_of_this_clip(folder, tmp_path):
    open_image_index(make(), folder, tmp_path / "index.safetensors")
    assert not (folder / INDEX_FILE).exists()
    with pytest.raises(InputError, match="is an index of the CLIP [0-9a-f]{16}, this is [0-9a-f]{16}"):
        open_image_index(other(), folder, tmp_path / "index.safetensors")
    (tmp_path / "index.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        open_image_index(make(), folder, tmp_path / "index.safetensors")


def test_what_a_check_wrote_and_hidden_files_are_no_pictures(shapes, tmp_path):
    assert len(find_images(shapes)) == 36
    (tmp_path / ".hidden.png").touch()
    with pytest.raises(InputError, match="no images in"):
        find_images(tmp_path)


def test_the_largest_of_a_row_is_framed_where_captions_belong_to_no_picture():
    sheet = build_similarity_matrix(torch.tensor([[0.1, 0.2, 0.9]]), [], ["a"], "cosine", paired=False)
    assert sheet.getpixel((170 + 64 * 2 + 1, 16 + 1)) == GREEN
    assert sheet.getpixel((170 + 1, 16 + 1)) != GREEN


def test_the_commands_name_find_and_compare_pictures(monkeypatch, capsys, folder, clip_folder, tmp_path):
    red, blue, clip = folder / "red.png", folder / "blue.png", ["--clip", clip_folder]
    (tmp_path / "labels.txt").write_text("cat\n\nred circle\n")
    command = ["classify", red, blue, "--labels", "dark, square", "--labels-file", tmp_path / "labels.txt", *clip]
    status, out, err = run(monkeypatch, capsys, *command, "--template", "a {}", "--json")
    assert status == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["picture"] for row in rows] == [str(red), str(blue)]
    assert set(rows[0]["labels"]) == {"dark", "square", "cat", "red circle"}
    assert sum(rows[0]["labels"].values()) == pytest.approx(1, abs=1e-5)
    status, out, _ = run(monkeypatch, capsys, *command, "--top", 2)
    assert status == 0 and out.startswith(f"{red}: ") and out.splitlines()[0].count("%") == 2

    status, out, _ = run(monkeypatch, capsys, "search", "--picture", blue, "--in", folder, "--top", 2, *clip)
    assert status == 0 and out.splitlines()[0] == "1.0000  blue.png" and len(out.splitlines()) == 2

    command = ["similarity", red, blue, "--text", "cat", "--text", "dark", "--out", tmp_path / "new/m.png", *clip]
    assert run(monkeypatch, capsys, *command)[0] == 0
    with Image.open(tmp_path / "new/m.png") as image:
        assert image.size == (170 + 2 * 64 + 8, 64 + 16 + 2 * 64 + 42)
    status, _, err = run(monkeypatch, capsys, *command)
    assert status == 2 and "exists and is not overwritten" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "a.png"], "no labels"),
        (["classify", "a.png", "--labels", "cat,dog,cat"], "the label 'cat' is given twice"),
        (["classify", "a.png", "--labels", "cat,dog", "--template", "no place"], "a template must contain {} once"),
        (["classify", "a.png", "--labels-file", "nowhere.txt"], "nowhere.txt"),
        (["search"], "give a text or an --image to search for, got none"),
        (["search", "cat", "--picture", "a.png"], "got both"),
        (["search", "--picture", "nowhere.png"], "nowhere.png"),
        (["search", "cat", "--in", "nowhere"], "no folder 'nowhere'"),
        (["search", "cat", "--top", "0"], "top must be an integer from 1"),
        (["similarity", "nowhere.png"], "nowhere.png"),
        (["similarity", "a.png", "--out", "a.jpg"], "does not end in .png"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, clip_folder, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(monkeypatch, capsys, *arguments, "--clip", clip_folder)
    assert status == 2 and message in err and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_cache_is_searched_by_the_clip_that_made_it_alone(shapes, runs, tmp_path):
    from t2i.training import cache_data

    from t2i.config import load_config
    from t2i.interop.by_name import load_clip
    from tests.helpers.stages import CONFIGS

    settings = {"data.path": shapes, "output": tmp_path / "cache", "clip": runs / "clip", "autoencoder": "null"}
    arguments = [str(CONFIGS / "tiny/cache.yaml"), *(f"{key}={value}" for key, value in settings.items())]
    cache_data.main(load_config(cache_data.Config, "cache", arguments))
    clip = load_clip(runs / "clip").eval()
    index = open_image_index(clip, tmp_path / "cache")
    assert len(index.names) == 36 and search_image_index(clip, index, None, shapes / "07.png", 1)[0][1] > 0.999
    with pytest.raises(InputError, match="was made with the CLIP"):
        open_image_index(make(), tmp_path / "cache")
