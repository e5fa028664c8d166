"""The words of the captions that a CLIP was trained on."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from t2i.pipelines.calls.unknown_words import collect_texts
from t2i.training import train_clip

from t2i import cli
from t2i.config import load_config
from t2i.data import CaptionedPictures
from t2i.errors import InputError
from t2i.files import known_words as known_words_module
from t2i.files.known_words import MAX_NEAREST, KnownWords, UnknownWord, split_words
from t2i.interop.by_name import load_clip
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


def test_words_of_a_prompt_that_are_in_no_caption_are_found_with_the_nearest_known_one():
    words = KnownWords.collect(ROWS)
    assert words.find_unknown_words("my red apples' pies, jack's lanterns") == []
    found = words.find_unknown_words("A pumkin on 2 red aples and a Pumpkins face")
    assert found == [
        UnknownWord("pumkin", "pumpkin", False),
        UnknownWord("aples", "apple", False),
        UnknownWord("pumpkins", "jack-o-lantern", True),
        UnknownWord("face", None, False),
    ]
    assert list(map(str, found)) == [
        '"pumkin" is in no caption; nearest known: pumpkin',
        '"aples" is in no caption; nearest known: apple',
        '"pumpkins" is in no caption, but a keyword of: jack-o-lantern',
        '"face" is in no caption',
    ]


def test_the_nearest_word_is_sought_for_the_first_of_many():
    words = KnownWords(frozenset({"apple"}), {})
    texts = [f"{letter}pple {letter}pple" for letter in "bcdefghijklmnopqrstuvwxyz"]
    found = words.find_unknown_words(*texts[:10], " ".join(texts[10:]))
    assert len(found) == 25 and [word.nearest for word in found] == ["apple"] * MAX_NEAREST + [None] * 9


@pytest.mark.parametrize(
    ("one", "many"),
    [("cat", "cats"), ("box", "boxes"), ("puppy", "puppies"), ("leaf", "leaves"), ("knife", "knives"), 
     ("woman", "women"), ("foot", "feet"), ("dog", "dog's")],
)  # fmt: skip
def test_plurals_and_singulars_are_known(one, many):
    for known, asked in ((one, many), (many, one)):
        assert KnownWords(frozenset([known]), {}).find_unknown_words(asked) == []


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


def test_a_pipeline_says_once_what_is_in_no_caption_and_returns_it(pipeline, caplog):
    pipeline.clip.tokenizer.known_words = KnownWords(frozenset(["red", "circle"]), {"round": "circle"})
    caplog.set_level("INFO")
    settings = {"num_inference_steps": 1, "prior_num_inference_steps": 1, "output_type": "latent"}
    for _ in range(2):
        output = pipeline(["a red circel", "red circles", "a round circle"], negative_prompt="blau", **settings)
        assert [str(word) for word in output.unknown_words] == [
            '"circel" is in no caption; nearest known: circle',
            '"round" is in no caption, but a keyword of: circle',
            '"blau" is in no caption',
        ]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "prompt 'a red circel': \"circel\" is in no caption; nearest known: circle"),
        ("INFO", "prompt 'a round circle': \"round\" is in no caption, but a keyword of: circle"),
        ("WARNING", "prompt 'blau': \"blau\" is in no caption"),
    ]
    output = pipeline("red circles", **settings)
    assert output.unknown_words is None and len(output.to_tuple()) == 2
    assert len(pipeline("a red circel", **settings, return_dict=False)) == 2
    pipeline.refuses_unknown_words = True
    pipeline("a round circle", **settings)
    with pytest.raises(InputError, match="prompt 'a red circel': \"circel\" is in no caption; nearest known: circle$"):
        pipeline("a red circel", **settings)
    pipeline.clip.tokenizer.known_words = None  # a public CLIP
    caplog.clear()
    assert pipeline("abc", **settings).unknown_words is None and not caplog.records


def test_texts_between_images_are_read_and_image_files_are_not(pipeline):
    texts = collect_texts({"anchors": ["a cat", Path("dog.png")], "prompt": ["a", "b", "a"], "target": "c", "x": "y"})
    assert texts == ["a", "b", "c", "a cat"]


def test_strict_commands_refuse_before_they_draw(pipeline_folder, monkeypatch, capsys, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["t2i", *map(str, arguments), "--model", str(pipeline_folder), "--strict"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr().err.strip().splitlines()

    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    out = ["--steps", 1, "--out", tmp_path / "out"]
    (tmp_path / "prompts.txt").write_text("a red circle\na purpel circle\n")
    for command in (
        ["generate", "a red circle", "a purpel circle", *out],
        ["generate", "--prompts", tmp_path / "prompts.txt", "--batch-size", 1, *out],
        ["image-to-image", tmp_path / "image.png", "--prompt", "a purpel circle", *out],
        ["interpolate", tmp_path / "image.png", "a purpel circle", *out],
    ):
        status, lines = run(*command)
        assert status == 2 and "prompt 'a purpel circle': \"purpel\" is in no caption" in lines[-1]
    assert not list(tmp_path.glob("out/*"))
