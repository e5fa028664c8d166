"""The words of the captions that a CLIP was trained on."""

import json

import pytest
from t2i.training import train_clip

from t2i.config import load_config
from t2i.data import CaptionedPictures
from t2i.errors import InputError
from t2i.interop.by_name import load_clip
from t2i.networks import known_words as known_words_module
from t2i.networks.known_words import KnownWords, split_words
from tests.helpers.stages import arguments

ROWS = [
    {"captions": ["jack-o-lantern"], "keywords": ["Halloween", "a pumpkin"]},
    {"captions": ["pie"], "keywords": ["fruit", "sweet", "pumpkin"]},
    {"captions": ["a red apple", "apple"], "keywords": ["fruit", "Apple"]},
]


def test_words_are_what_stands_between_blanks_and_signs():
    assert split_words("A cat's  RED-hot 2 x_ray, naïve \uff21") == [
        "a",
        "cat's",
        "red",
        "hot",
        "x",
        "ray",
        "naïve",
        "a",
    ]


def test_a_word_of_keywords_alone_has_the_caption_that_names_it_first():
    words = KnownWords.collect(ROWS)
    assert words.captions == {"jack", "o", "lantern", "pie", "a", "red", "apple"}
    assert words.keywords == {
        "halloween": "jack-o-lantern",
        "pumpkin": "jack-o-lantern",
        "fruit": "pie",
        "sweet": "pie",
    }


def test_words_are_read_as_they_were_written_and_join_those_of_other_data(tmp_path, monkeypatch):
    words = KnownWords.collect(ROWS)
    assert KnownWords.load(tmp_path) is None
    words.save(tmp_path)
    assert KnownWords.load(tmp_path) == words
    both = words.merge(KnownWords.collect([{"captions": ["pumpkin"], "keywords": ["jack", "orange"]}]))
    assert "pumpkin" in both.captions
    assert both.keywords == {"halloween": "jack-o-lantern", "fruit": "pie", "sweet": "pie", "orange": "pumpkin"}
    (tmp_path / "words.json").unlink()
    monkeypatch.setattr(known_words_module, "MAX_WORDS_BYTES", 100)
    words.save(tmp_path)
    assert not (tmp_path / "words.json").exists()


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"captions": "a", "keywords": {"b": 1}}', '{"captions": 1, "keywords": {}}']
)
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / "words.json").write_text(content)
    with pytest.raises(InputError) as caught:
        KnownWords.load(tmp_path)
    assert "\n" not in str(caught.value) and "words.json" in str(caught.value)


def test_training_writes_the_words_of_its_captions_and_finetuning_adds_to_them(shapes, runs, pipeline_folder, tmp_path):
    words = load_clip(runs / "clip").tokenizer.known_words
    texts = [row["text"] for row in map(json.loads, (shapes / "metadata.jsonl").read_text().splitlines())]
    assert words.captions == {word for text in texts for word in split_words(text)}
    assert load_clip(pipeline_folder / "clip").tokenizer.known_words == words
    start = load_clip(runs / "clip")
    start.tokenizer.known_words = KnownWords(frozenset({"other"}), {})
    start.save_pretrained(tmp_path / "start")
    config = load_config(train_clip.Config, "clip", arguments("clip", shapes, tmp_path, init=tmp_path / "start"))
    clip = train_clip.build_clip(config, CaptionedPictures(config.data))[0]
    assert clip.tokenizer.known_words.captions == words.captions | {"other"}
