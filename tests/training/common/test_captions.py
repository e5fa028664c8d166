"""Captions that the context cuts are counted, with by how much; a batch of one trains no CLIP."""

from pathlib import Path

import pytest
from open_clip import SimpleTokenizer
from t2i.training import cache_data, train_clip
from t2i.training.common.captions import format_cut_captions, measure_caption_lengths
from t2i.training.recipe.recipe import compose_recipe, find_clip_tokenizer, read_data_facts

from t2i.config import load_config
from t2i.data import open_datasets
from t2i.data.manifest import write_manifest
from t2i.errors import InputError
from t2i.interop.by_name import load_clip
from t2i.networks.tokenizer import CaptionTokenizer, PublicTokenizer, TextTokenizer
from tests.helpers.samples import COLORS, picture
from tests.helpers.stages import CONFIGS, train
from tests.helpers.text_encoders import make_tokenizer
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
    config = load_config(train_clip.Config, "clip", [str(CONFIGS / "tiny/clip.yaml"), f"data.path={shapes}"])
    dataset = open_datasets(config.data)["train"]
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


def write_long_captions(folder: Path) -> Path:
    """Write twelve drawings, a third of which have captions of many words."""
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.png").write_bytes(picture(COLORS[i % len(COLORS)], size=(32, 32)))
        (folder / f"{i}.txt").write_text("a red square " * (60 if i % 3 == 0 else 1))
    write_manifest(folder, held_out=0, quiet=True)
    return folder


def test_cut_captions_are_said_by_all_that_read_them(runs, tmp_path, capsys):
    data = write_long_captions(tmp_path / "data")
    clip = load_clip(str(runs / "clip"))
    lengths = clip.tokenizer.count_tokens(["a red square " * (60 if i % 3 == 0 else 1) for i in range(12)])
    line = f"warning: {format_cut_captions(lengths, clip.context_length)}"
    assert line.startswith("warning: 4 of 12 measured captions are longer")
    cache = tmp_path / "cache"
    settings = [f"data.path={data}", f"output={cache}", f"clip={runs / 'clip'}", "autoencoder=null"]
    cache_data.main(load_config(cache_data.Config, "cache", [str(CONFIGS / "tiny/cache.yaml"), *settings]))
    assert capsys.readouterr().out.count(line) == 1
    for number, more in enumerate(({}, {"cache": cache})):
        train("prior", data, tmp_path / str(number), 1, clip=runs / "clip", **more)
        assert capsys.readouterr().out.count(line) == 1
    train("decoder", data, tmp_path, 1, clip=runs / "clip", autoencoder=runs / "autoencoder", reads_captions=False)
    assert "captions are longer" not in capsys.readouterr().out


def test_tokens_of_a_text_encoder_are_counted_before_they_are_cut():
    for length in (5, 8, 64):
        tokenizer = TextTokenizer(make_tokenizer(), length, 0)
        assert tokenizer.count_tokens(["a cat", "a red cat " * 9, ""]) == [
            len(one.ids) for one in make_tokenizer().encode_batch(["a cat", ("a red cat " * 9).strip(), ""])
        ]
