"""Captions that the context cuts are counted, with by how much; a batch of one trains no CLIP."""

import pytest
from open_clip import SimpleTokenizer
from t2i.training import train_clip
from t2i.training.common.captions import format_cut_captions, measure_caption_lengths
from t2i.training.recipe.recipe import compose_recipe, find_clip_tokenizer, read_data_facts

from t2i.config import load_config
from t2i.data import open_datasets
from t2i.errors import InputError
from t2i.networks.tokenizer import CaptionTokenizer, PublicTokenizer
from tests.helpers.stages import CONFIGS
from tests.networks.test_clip import make
from tests.training.test_init import CPU, EMOJI


def test_cut_captions_are_counted_with_what_they_lose():
    assert format_cut_captions([3, 8, 8], 8) is None and format_cut_captions([], 8) is None
    line = format_cut_captions([3, 9, 12, 20, 8], 8)
    assert line is not None
    assert line.startswith("3 of 5 measured captions are longer than the context of 8 tokens and are cut, by 4 tokens")
    assert line.endswith("and 12 at most")


@pytest.mark.parametrize("kind", ["own", "public"])
def test_tokens_are_counted_as_the_tokenizer_makes_them(kind):
    texts = ["a red cat", "", "a photograph of a  lighthouse\non a cliff"]
    own = CaptionTokenizer.train(texts, 300, 77)
    tokenizer = own if kind == "own" else PublicTokenizer(SimpleTokenizer())
    rows = tokenizer(texts)
    pad = 0
    assert tokenizer.count_tokens(texts) == [int((row != pad).sum()) for row in rows]


def test_the_recipe_says_how_many_captions_its_clip_cuts(tmp_path):
    facts = EMOJI.__class__(**{**vars(EMOJI), "caption_lengths": (5, 40, 300)})
    lines = "\n".join(compose_recipe(tmp_path / "run", facts, CPU).lines)
    assert "warning: 2 of 3 measured captions are longer than the context of 32 tokens" in lines
    lines = "\n".join(compose_recipe(tmp_path / "run", facts, CPU, clip="ViT-B-32:laion2b_s34b_b79k").lines)
    assert "warning: 1 of 3 measured captions are longer than the context of 77 tokens and are cut, by 223" in lines


def test_lengths_are_measured_by_the_tokenizer_of_the_clip_that_is_named(shapes):
    own, public = (read_data_facts(str(shapes), clip) for clip in (None, "ViT-B-32:laion2b_s34b_b79k"))
    assert len(own.caption_lengths) == len(public.caption_lengths) == 32
    tokenizer = find_clip_tokenizer("ViT-B-32:laion2b_s34b_b79k")
    assert tokenizer is not None
    [dataset] = [open_datasets(load_config(train_clip.Config, "clip", [f"data.path={shapes}"]).data)["train"]]
    assert list(public.caption_lengths) == measure_caption_lengths(dataset, tokenizer)
    assert find_clip_tokenizer("ViT-B-16-SigLIP:webli") is None  # its tokenizer takes the network


def test_the_tokenizer_of_a_trained_clip_is_read_from_its_folder(tmp_path):
    clip = make()
    clip.save_pretrained(tmp_path / "model")
    texts = ["a red cat", "square"]
    for folder in (tmp_path, tmp_path / "model"):
        tokenizer = find_clip_tokenizer(str(folder))
        assert tokenizer is not None and tokenizer.count_tokens(texts) == clip.tokenizer.count_tokens(texts)


def test_a_clip_refuses_a_batch_of_one(shapes, tmp_path):
    settings = [f"data.path={shapes}", f"train.output={tmp_path / 'clip'}", "train.batch_size=1"]
    with pytest.raises(InputError, match="train.batch_size must be at least 2 on one process, got 1"):
        train_clip.main(load_config(train_clip.Config, "clip", [str(CONFIGS / "tiny/clip.yaml"), *settings]))
    assert not (tmp_path / "clip").exists()
