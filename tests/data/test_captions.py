"""Captions for one use in training: repeatable, as often of each form as the configuration says."""

import random

import pytest

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.data.captions import CaptionMix
from t2i.errors import InputError

KEYWORDS = ["cat", "pet", "kitty"]
EARLIER_TEXTS = ["cat face", "kitty", "cat face", "cat face kitty", "cat face", "pet kitty cat"]
EARLIER_TEXTS_ALONE = ["cat pet", "cat", "cat face", "a kitty", "cat", "cat face pet cat kitty"]


def draw_texts(mix: CaptionMix, captions: list[str], keywords: list[str], count: int) -> list[str]:
    return [mix.draw(captions, keywords, random.Random(i)).text for i in range(count)]


def test_captions_vary_and_repeat_for_the_same_draw():
    captions = draw_texts(CaptionMix(), ["cat face"], KEYWORDS, 300)
    assert captions == draw_texts(CaptionMix(), ["cat face"], KEYWORDS, 300)
    assert {"cat face", "a cat face", "cat", "kitty"} <= set(captions)
    assert any(caption.startswith("cat face ") for caption in captions)
    assert draw_texts(CaptionMix(), ["cat face"], [], 1) == ["cat face"]
    assert set(draw_texts(CaptionMix(), ["a cat", "a pet"], [], 20)) == {"a cat", "a pet"}


def test_captions_of_a_draw_never_change():
    """Caches and runs that resume depend on the order of the draws; these are the captions of earlier versions."""
    texts = draw_texts(CaptionMix(), ["cat face"], KEYWORDS, 6)
    assert texts == EARLIER_TEXTS
    assert draw_texts(CaptionMix(keyword_alone=0.5), ["cat face"], KEYWORDS, 6) == EARLIER_TEXTS_ALONE


def test_keywords_alone_are_drawn_as_often_as_the_configuration_says():
    captions = draw_texts(CaptionMix(keyword_alone=0.5), ["cat face"], KEYWORDS, 2000)
    alone = [caption for caption in captions if caption.removeprefix("a ").removeprefix("an ") in KEYWORDS]
    # One of two draws, and of the others 1/15: keywords alone (1/5), and one of them (1/3)
    assert len(alone) / 2000 == pytest.approx(0.5 + 0.5 / 15, abs=0.03)
    assert draw_texts(CaptionMix(keyword_alone=1.0), ["cat face"], [], 1) == ["cat face"]


def test_sentences_are_drawn_as_often_as_the_configuration_says():
    mix = CaptionMix(in_sentence=0.4, sentences=("my {} sleeps", "a {} in the garden"))
    drawn = [mix.draw(["orange cat"], KEYWORDS, random.Random(i)) for i in range(2000)]
    inside = [caption for caption in drawn if caption.text.endswith(("sleeps", "garden"))]
    assert len(inside) / 2000 == pytest.approx(0.4, abs=0.03)
    # Half of the phrases are captions, and each is the phrase that the image is right for
    assert sum(caption.phrases == ["orange cat"] for caption in inside) / len(inside) == pytest.approx(0.5, abs=0.05)
    assert {caption.text for caption in inside if caption.phrases == ["orange cat"]} == {
        "my orange cat sleeps",
        "an orange cat in the garden",
    }
    assert mix.draw(["cat"], [], random.Random(3)).phrases == ["cat"]


def test_sentences_are_read_from_a_file_and_wrong_lines_are_named(tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_text("my {}\n\n  the  {}\n", encoding="utf-8")
    assert CaptionMix.read(0.0, 0.5, str(file)).sentences == ("my {}", "the {}")
    for text, message in (("my {}\nyour cat", "line 2: 'your cat' has 0 of {}"), ("{} {}", "2 of {}"), ("", "0 sent")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            CaptionMix.read(0.0, 0.5, str(file))
    with pytest.raises(InputError, match="cannot read the sentences"):
        CaptionMix.read(0.0, 0.5, str(tmp_path / "none.txt"))
    for settings in ({"in_sentence": 0.5}, {"sentences": str(file)}):
        with pytest.raises(InputError, match="need each other"):
            DataConfig("data", **settings)


def test_a_tokenizer_is_trained_on_the_sentences_too(shapes, tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_text("my {} sleeps\n", encoding="utf-8")
    dataset = CaptionedPictures(DataConfig(str(shapes), 32, 0, in_sentence=0.5, sentences=str(file)))
    assert list(dataset.iterate_texts())[-1] == "my {} sleeps"


def test_shipped_sentences_are_found_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = "configs/emoji/sentences.txt"
    assert len(CaptionMix.read(0, 0.3, file).sentences) > 1000
    (tmp_path / "configs/emoji").mkdir(parents=True)
    (tmp_path / file).write_text("one {}\n")  # the one of this folder comes first
    assert CaptionMix.read(0, 0.3, file).sentences == ("one {}",)
