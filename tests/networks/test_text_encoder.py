"""Text encoders of transformers: their states are transformers' own; decoders train and draw with them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from t2i.pipelines.jobs.assemble import assemble_pipeline_folder
from t2i.training.common.encodings import encode_tokens

from t2i import InputError, Text2ImagePipeline
from t2i.config import CONFIG_FOLDER, load_config
from t2i.files.model_folder import load_model
from t2i.interop.by_name import load_text_encoder
from t2i.networks.text_encoder import ARCHITECTURES
from t2i.networks.unet_decoder import UNetDecoder
from tests.helpers.processes.forked import run_program
from tests.helpers.stages import seeds, train
from tests.helpers.text_encoders import MADE, make, make_tokenizer, reference

CAPTIONS = ["a red circle", "the large blue square with two small green circle", "square", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("encoders")
    return {kind: make(kind, home / kind) for kind in MADE}


def test_there_is_a_test_for_every_architecture():
    assert set(MADE) == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", MADE)
def test_states_are_transformers_own_and_do_not_depend_on_the_batch(kind, folders):
    encoder = load_text_encoder(folders[kind], context_length=16)
    theirs = reference(kind, folders[kind])
    together = encoder.encode(CAPTIONS)
    assert together.states.shape == (4, 11, encoder.width) and together.states.dtype == torch.float32
    for row, caption in enumerate(CAPTIONS):
        ids = make_tokenizer().encode(caption).ids
        expected = theirs(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert together.mask[row].sum() == len(ids)
        torch.testing.assert_close(together.states[row, : len(ids)], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.encode([caption]).states[0], expected, atol=1e-5, rtol=0)
        assert (together.states[row, len(ids) :] == 0).all()
    assert (together.states[0, 0] - together.states[2, 0]).abs().max() > 1e-3 or kind == "clip_text_model"  # causal


@pytest.mark.parametrize("kind", MADE)
def test_an_encoder_saved_and_loaded_says_the_same_and_has_the_same_fingerprint(kind, folders, tmp_path):
    encoder = load_text_encoder(folders[kind], context_length=16)
    assert encoder.identity == encoder.compute_fingerprint()
    encoder.save_pretrained(tmp_path)
    again = load_text_encoder(tmp_path)
    assert again.identity == again.compute_fingerprint() == encoder.identity
    assert torch.equal(again.encode(CAPTIONS).states, encoder.encode(CAPTIONS).states)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    half = load_text_encoder(folders[kind], 16, torch.float16)
    assert half.identity == half.compute_fingerprint() == encoder.identity


# --- Training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(shapes, runs, folders, tmp_path_factory) -> Path:
    """A decoder that reads its captions through T5 beside the other stages of `runs`."""
    home = tmp_path_factory.mktemp("stages")
    for stage in ("clip", "autoencoder", "prior"):
        (home / stage).symlink_to(runs / stage)
    train("decoder", shapes, home, text_encoder=folders["t5"])
    return home


def metrics(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_a_decoder_trains_on_the_states_and_its_run_holds_the_encoder_for_ever(stages, folders):
    decoder = load_model(UNetDecoder, stages / "decoder")
    encoder = load_text_encoder(stages / "decoder")
    assert encoder.identity == load_text_encoder(folders["t5"]).identity == decoder.config.text_encoder_fingerprint
    assert decoder.config.text_width == encoder.width == 16 and decoder.from_text.weight.shape[1] == 16


def test_a_run_goes_on_with_the_encoder_that_it_holds_and_with_no_other(stages, shapes, runs, folders, tmp_path):
    shutil.copytree(stages / "decoder", tmp_path / "decoder")
    frozen = {stage: runs / stage for stage in ("clip", "autoencoder")}
    for other in (folders["bert"], "null"):
        with pytest.raises(InputError, match="was trained with another text_encoder"):
            train("decoder", shapes, tmp_path, steps=4, **frozen, text_encoder=other)
    train("decoder", shapes, tmp_path, steps=4, **frozen, text_encoder=tmp_path / "decoder")
    assert load_model(UNetDecoder, tmp_path / "decoder").config.text_width == 16


def cached(shapes: Path, runs: Path, output: Path, **settings: object) -> Path:
    from t2i.training.cache_data import Config, main

    given = {"data.path": shapes, "output": output, "clip": runs / "clip", "autoencoder": runs / "autoencoder"}
    given |= {"dtype": "float32"} | settings
    main(
        load_config(Config, "cache", [str(CONFIG_FOLDER / "tiny/cache.yaml"), *(f"{k}={v}" for k, v in given.items())])
    )
    return output


def losses(shapes: Path, runs: Path, home: Path, **settings: object) -> list[float]:
    frozen = {stage: runs / stage for stage in ("clip", "autoencoder")}
    train("decoder", shapes, home, **frozen, **{"train.log_every": 1, "train.batch_size": 4}, **settings)
    return metrics(home / "decoder")


@pytest.mark.parametrize("kind", ["bert", "clip_text_model"])
def test_training_from_a_cache_with_its_states_or_without_is_training_without_a_cache(
    kind, shapes, runs, folders, tmp_path
):
    """The captions are encoded once, or in the step from the captions of the manifest: the same losses."""
    expected = losses(shapes, runs, tmp_path / "none", text_encoder=folders[kind])
    held = cached(shapes, runs, tmp_path / "held", text_encoder=folders[kind], text=False, variations=16)
    plain = cached(shapes, runs, tmp_path / "plain", text=False)
    for cache in (plain, held):
        found = losses(shapes, runs, tmp_path / f"from {cache.name}", text_encoder=folders[kind], cache=cache)
        assert found == pytest.approx(expected, rel=1e-5) and len(found) == 3


def test_a_cache_of_another_encoder_and_one_without_captions_are_refused_in_one_line(shapes, runs, folders, tmp_path):
    held = cached(shapes, runs, tmp_path / "held", text_encoder=folders["bert"], text=False)
    with pytest.raises(InputError, match="made with another text encoder; make a new one"):
        losses(shapes, runs, tmp_path / "a", text_encoder=folders["t5"], cache=held)
    plain = cached(shapes, runs, tmp_path / "plain", text=False)
    with pytest.raises(InputError, match="no captions to encode in the step; make the cache with text_encoder"):
        losses(tmp_path, runs, tmp_path / "b", text_encoder=folders["t5"], cache=plain)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_an_encoder_for_a_decoder_that_reads_no_captions_is_refused(shapes, runs, folders, tmp_path):
    with pytest.raises(InputError, match="reads_captions=true"):
        losses(shapes, runs, tmp_path, text_encoder=folders["t5"], reads_captions=False)


def test_the_first_caption_that_is_cut_is_told_once(shapes, folders, caplog):
    encoder = load_text_encoder(folders["t5"], context_length=4)
    assert encoder.find_truncated_text("a red circle") == "circle" and encoder.find_truncated_text("a circle") == ""
    assert encoder.encode(["a red circle"]).states.shape[1] == 4
    for _ in range(2):
        encode_tokens(encoder, ["a circle", "a red circle", "a red square"])
    assert [record.args for record in caplog.records] == [(4, "circle")]


# --- Pipelines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline_folder(stages, tmp_path_factory) -> Path:
    return assemble_pipeline_folder(stages, tmp_path_factory.mktemp("models") / "t5")


def draw(pipeline: Text2ImagePipeline, prompts: list[str]) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    steps = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline(prompts, generator=seeds(*range(len(prompts))), **steps).images


def test_a_pipeline_folder_holds_the_encoder_and_draws_the_same_in_a_fresh_process(pipeline_folder, tmp_path):
    pipeline = Text2ImagePipeline.from_pretrained(pipeline_folder)
    for parameter in pipeline.decoder.parameters():  # three steps leave layers that started at zero almost there
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    pipeline.save_pretrained(tmp_path / "model")
    prompts = ["a red circle", "the large blue square with two small green circle"]
    pictures = draw(pipeline, prompts)
    torch.save(pictures, tmp_path / "expected.pt")
    script = f"""
import torch
from t2i import Text2ImagePipeline
from tests.networks.test_text_encoder import draw
pipeline = Text2ImagePipeline.from_pretrained({str(tmp_path / "model")!r})
assert type(pipeline.text_encoder).__name__ == "TextEncoder"
torch.testing.assert_close(draw(pipeline, {prompts!r}), torch.load({str(tmp_path / "expected.pt")!r}))
"""
    ended = run_program(["-c", script])
    assert ended.returncode == 0, ended.stderr
    alone = torch.cat([draw(pipeline, [prompts[0]]), pictures[1:]])
    torch.testing.assert_close(alone, pictures, atol=1e-5, rtol=0)  # the image of a caption, whatever the batch

    pipeline.text_encoder.encode_tokens = lambda tokens, mask: torch.zeros(*tokens.shape, 16)
    assert (draw(pipeline, prompts) - pictures).abs().max() > 1e-4  # it is what the decoder reads


def test_a_pipeline_in_half_precision_draws_with_its_encoder(pipeline_folder):
    pipeline = Text2ImagePipeline.from_pretrained(pipeline_folder, dtype=torch.bfloat16)
    assert pipeline.text_encoder.dtype == torch.bfloat16
    assert draw(pipeline, ["a red circle"]).isfinite().all()


def test_another_encoder_or_none_is_refused_in_one_line(pipeline_folder, runs, folders):
    pipeline = Text2ImagePipeline.from_pretrained(pipeline_folder)
    own = pipeline.text_encoder.identity
    other = load_text_encoder(folders["bert"])
    with pytest.raises(InputError, match=f"from the text encoder {own}, this pipeline has {other.identity}"):
        Text2ImagePipeline.from_pipe(pipeline, text_encoder=other)
    with pytest.raises(InputError, match=f"from the text encoder {own}, this pipeline has no text encoder"):
        Text2ImagePipeline.from_pipe(pipeline, text_encoder=None)
    with pytest.raises(InputError, match="no text encoder's captions"):
        Text2ImagePipeline.from_pipe(pipeline, decoder=load_model(UNetDecoder, runs / "decoder"))


def test_the_pictures_of_a_decoder_in_training_show_what_it_reads(stages, shapes, folders, tmp_path):
    decoder = {"sample.decoder": stages / "decoder", "sample.autoencoder": stages / "autoencoder"}
    train("prior", shapes, tmp_path, **preview(stages), **decoder)
    frozen = {"autoencoder": stages / "autoencoder", "text_encoder": folders["t5"]}
    train("decoder", shapes, tmp_path, **preview(stages), **frozen)
    held = cached(shapes, stages, tmp_path / "held", text_encoder=folders["t5"])
    train("decoder", shapes, tmp_path / "cached", **preview(stages), **frozen, cache=held)
    drawn = [tmp_path / part / "samples" for part in ("prior", "decoder", "cached/decoder")]
    assert all(list(folder.glob("*pictures*.png")) for folder in drawn), [list(f.rglob("*")) for f in drawn]


def preview(stages: Path) -> dict[str, object]:
    few = {f"sample.{name}": 2 for name in ("count", "num_inference_steps", "prior_num_inference_steps")}
    return {"clip": stages / "clip", "train.sample_every": 3, "sample.prompts": "[a red circle]", **few}


# --- What is no text encoder --------------------------------------------------------------------------------------


def test_weights_that_are_no_safetensors_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="it has pytorch_model.bin, but only .safetensors is loaded"):
        load_text_encoder(folder)


def test_an_unknown_architecture_is_refused_with_the_list(folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "gpt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(InputError, match="must be one of t5, mt5, umt5, bert.*; got 'gpt2'"):
        load_text_encoder(folder)


def test_the_encoder_of_a_larger_model_is_found_in_its_files(folders, tmp_path):
    """As in published files: a T5 with its decoder, a BERT with heads, a CLIP with both towers, LayerNorms of 2018."""
    named = {
        "t5": lambda name: name,
        "bert": lambda name: f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma"),
        "clip_text_model": lambda name: f"text_model.{name}",
    }
    for kind, rename in named.items():
        folder = shutil.copytree(folders[kind], tmp_path / kind)
        tensors = load_file(folder / "model.safetensors")
        more = {"decoder.block.0.weight": torch.ones(3), "visual_projection.weight": torch.ones(2, 2)}
        save_file({rename(name): tensor for name, tensor in tensors.items()} | more, folder / "model.safetensors")
        if kind == "clip_text_model":
            text = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
        assert load_text_encoder(folder).identity == load_text_encoder(folders[kind]).identity
    del tensors["final_layer_norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="lacks tensors, 1 of .*: net.final_layer_norm.weight"):
        load_text_encoder(folder)
