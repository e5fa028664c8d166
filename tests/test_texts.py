"""Texts that look the same are the same, for every tokenizer, and lines end where an editor ends them."""

import ast
import re
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from t2i.checks import check_integer, check_texts
from t2i.data.sources.samples import parse_caption_bytes, parse_labels
from t2i.errors import InputError
from t2i.evaluation.retrieval import check_label_templates, embed_labels, normalize_labels
from t2i.networks.public.clip_tokenizer import CLIPTokenizer
from t2i.networks.tokenizer import CaptionTokenizer, PublicTokenizer, TextTokenizer
from t2i.texts import normalize_text, read_lines, split_lines, wrap_text
from tests.helpers.text_encoders import make_tokenizer
from tests.networks.test_clip import make

SPELLINGS = [
    "a\ncat", "a\r\n cat", " a  cat\t", "\ufeffa cat", "a\u00a0cat", "a c\u200bat", "a ca\u00adt", "a\u2028cat",
    "a c\u200dat", "\u200ea cat\u200f", "a \u2060cat", "a\u3000cat", "a cat\x0c",
]  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
def test_white_space_is_one_space_and_what_nobody_sees_is_left_out(text):
    assert normalize_text(text) == "a cat"


def test_joiners_stay_where_they_change_what_is_seen():
    for text in ("👩\u200d🚀 in space", "می\u200cخواهم", "क्\u200dष", "❤\ufe0f\u200d🔥"):
        assert normalize_text(text) == text
    assert normalize_text("👩\u200d 🚀") == "👩 🚀"


def build_clip_tokenizer() -> CLIPTokenizer:
    public = SimpleTokenizer()
    merges = list(public.bpe_ranks)
    return CLIPTokenizer(public.encoder, merges, 77, "!", "<start_of_text>", "<end_of_text>")


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "own": CaptionTokenizer.train(["a cat", "a \n dog"], 280, 16),
        "text": TextTokenizer(make_tokenizer(), 16, 0),
        "open_clip": PublicTokenizer(SimpleTokenizer()),
        "clip": build_clip_tokenizer(),
    }


@pytest.mark.parametrize("kind", ["own", "text", "open_clip", "clip"])
def test_every_tokenizer_gives_all_spellings_the_same_tokens(kind, tokenizers):
    def tokens(texts):
        found = tokenizers[kind](texts)
        return (found[0] if kind == "text" else found).tolist()

    assert tokens(SPELLINGS) == tokens(["a cat"]) * len(SPELLINGS)
    assert tokens(["a red square"]) != tokens(["a cat"])
    assert tokenizers[kind].find_truncated_text("a \n cat " * 60).endswith("a cat")


def test_a_vocabulary_is_learned_from_normal_texts():
    plain, messy = (
        CaptionTokenizer.train(texts, 280, 16).digest() for texts in (["a cat sat"], ["a\u00a0cat \n sat\ufeff"])
    )
    assert plain == messy


@pytest.mark.parametrize(
    "text",
    [
        "a cat",
        "caf&eacute; &amp;amp; cr\u00e8me",
        "\u201cquoted\u201d",
        "sch\u00c3\u00b6n",
        "\uff46\uff55\uff4c\uff4c",
        "1 &lt; 2",
        "",
        "a  CAT's hat!",
    ],
)
def test_captions_are_cleaned_as_clip_was_trained(text, tokenizers):
    theirs = SimpleTokenizer()(text)
    assert tokenizers["clip"]([text]).tolist() == theirs.tolist()


# Texts as arguments


def test_a_text_of_nothing_that_is_seen_is_empty():
    with pytest.raises(InputError, match="prompt must not be empty"):
        check_texts("prompt", ["\u200b \ufeff"], empty=False)


def test_labels_that_look_the_same_are_the_same():
    assert parse_labels(["big  cat", "dog\ufeff"]) == ["big cat", "dog"]
    assert normalize_labels(["cat ", "a\u00a0dog"]) == ["cat", "a dog"]
    with pytest.raises(InputError, match="the label 'cat' is given twice"):
        normalize_labels(["cat", "c\u200bat"])


# Lines


LINES = "one\rtwo\r\nthree\n\nfour\u2028still\x0bfour\x0c\x85\x1c."


def test_lines_end_where_an_editor_ends_them(tmp_path):
    assert split_lines(LINES) == ["one", "two", "three", "", "four\u2028still\x0bfour\x0c\x85\x1c."]
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + LINES.encode())
    read = read_lines(tmp_path / "prompts.txt", "prompts")
    assert [normalize_text(line) for line in read] == ["one", "two", "three", "four still four ."]
    assert parse_caption_bytes(LINES.encode()) == ["one", "two", "three", "four still four ."]


# Numbers


def test_numpys_integers_are_integers():
    import numpy as np

    for value in (np.int64(3), np.uint8(3)):
        check_integer("steps", value, 1, 10)
    for value in (True, np.bool_(True), 3.0, np.float32(3), "3"):
        with pytest.raises(InputError, match="steps must be an integer from 1 to 10"):
            check_integer("steps", value, 1, 10)


TEXT_NAMES = ("texts", "captions", "prompts", "prompt", "labels", "templates")
# A text for each image, row or file: the caller has a list of them. And texts of the command line.
ONE_A_ROW = {"build_contact_sheet", "build_labelled_rows", "build_similarity_matrix", "draw_clip_preview"}
ONE_A_ROW |= {"draw", "encode_negative_texts", "find_unique_prompts", "pair_names"}
ONE_A_ROW |= {"__init__", "parse_dtypes", "parse_guidance_settings", "read_prompts"}


def list_text_parameters() -> dict[str, str]:
    """Return the annotation of each argument of several texts, by function and file."""
    root, found = Path(__file__).resolve().parents[1], {}
    for path in [path for folder in ("t2i", "pipelines", "training") for path in (root / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in ONE_A_ROW:
                for argument in node.args.args:
                    kind = "" if argument.annotation is None else ast.unparse(argument.annotation)
                    if argument.arg in TEXT_NAMES and re.search(r"^(?!Annotated).*(list|Sequence|Iterable)\[str", kind):
                        found[f"{path.name} {node.lineno} {node.name}"] = kind
    return found


def test_every_function_that_takes_texts_takes_one_too():
    found = list_text_parameters()
    assert len(found) > 20
    letters = [place for place, kind in found.items() if not kind.startswith("str | ")]
    assert letters == [], "annotate it as str | ... and call wrap_text, or name it in ONE_A_ROW"


@pytest.mark.parametrize("kind", ["own", "text", "open_clip", "clip"])
def test_a_text_alone_is_one_text_and_not_its_letters(kind, tokenizers):
    tokenizer = tokenizers[kind]
    one, listed = tokenizer("a red cat"), tokenizer(["a red cat"])
    for first, second in zip(one, listed) if kind == "text" else [(one, listed)]:
        assert len(first) == 1 and torch.equal(first, second)
    if kind != "text":
        assert tokenizer.count_tokens("a red cat") == tokenizer.count_tokens(["a red cat"])
    assert wrap_text(("a", "b")) == ("a", "b")


def test_labels_and_templates_alone_are_one_each():
    clip = make()
    several = embed_labels(clip, ["a cat"], ["a {} here"])
    assert torch.equal(embed_labels(clip, "a cat", "a {} here"), several) and len(several) == 1
    assert torch.equal(clip.encode_text("a cat").embedding, clip.encode_text(["a cat"]).embedding)
    assert check_label_templates("a {}") == ["a {}"]
    with pytest.raises(InputError, match="one label, 'cat', leaves no choice"):
        normalize_labels("cat")
    assert CaptionTokenizer.train("abcabc", 270, 8).digest() == CaptionTokenizer.train(["abcabc"], 270, 8).digest()
