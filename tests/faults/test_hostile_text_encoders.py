"""Text encoders made by an enemy: refused in one line, before anything is run, followed or allocated."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i import Text2ImagePipeline
from t2i.interop.by_name import load_text_encoder
from tests.faults.record import record
from tests.faults.test_hostile_files import WEIGHTS, bombs, edit, memory, refusal
from tests.helpers.text_encoders import SIZE, make


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    """The folders of a T5 and a BERT as transformers writes them, and of the T5 as we do, sound as they are."""
    folders = [make("t5", tmp_path / "t5"), make("bert", tmp_path / "bert")]
    load_text_encoder(folders[0]).save_pretrained(tmp_path / "ours")
    assert [refusal(load_text_encoder, folder) for folder in (*folders, tmp_path / "ours")] == ["", "", ""]
    return [*folders, tmp_path / "ours"]


def weights_of(folder: Path) -> Path:
    return next(path for path in (folder / WEIGHTS, folder / "model.safetensors") if path.exists())


def change_model(folder: Path, **changes: Any) -> None:
    """Of the encoder's own configuration, which is within ours."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(path, **({"model": config["model"] | changes} if "model" in config else changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 9_000_000, "hidden_size": 9_000_000, "d_model": 9_000_000},
        {"num_layers": 9_000_000, "num_hidden_layers": 9_000_000},
        {"d_ff": 9_000_000, "intermediate_size": 9_000_000},
        {"max_position_embeddings": 9_000_000, "relative_attention_num_buckets": 9_000_000},
        {"num_heads": 0, "num_attention_heads": 0},
        {"d_model": -1, "hidden_size": -1},
        {"d_model": "16", "hidden_size": [16]},
        {"feed_forward_proj": "gated-os.system", "hidden_act": "os.system"},
        {"vocab_size": SIZE + 1},
    ],
    ids=str,
)
def test_configurations_of_other_models_than_the_weights_are_refused_at_once(places, changes):
    refused = []
    for folder in places:
        change_model(folder, **changes)
        with memory(60):
            refused.append(bool(refusal(load_text_encoder, folder)))
    record("B3 text encoder's configuration that its weights do not bear out", len(refused), sum(refused))


@pytest.mark.parametrize(
    "key", ["auto_map", "quantization_config", "attn_implementation", "_attn_implementation", "dtype", "torch_dtype"]
)
def test_settings_that_make_transformers_import_are_refused_or_not_read(places, key):
    value = {"auto_map": {"AutoModel": "evil.Evil"}, "quantization_config": {"quant_method": "bitsandbytes"}}
    for folder in places:
        change_model(folder, **{key: value.get(key, "kernels-community/evil")})
    public, _, ours = places
    said = refusal(load_text_encoder, ours)
    assert "a text encoder's may have" in said or "must be a mapping of plain values" in said
    if key in value:
        assert "own code" in refusal(load_text_encoder, public)
    else:
        assert load_text_encoder(public).net.config._attn_implementation == "sdpa"
    record(f"B3 text encoder with {key}", 2, 2)


def test_code_beside_the_weights_links_and_other_classes_are_refused(places, tmp_path):
    said = []
    for folder in places:
        (folder / "modeling_evil.py").write_text("raise SystemExit")
        said.append("is code" in refusal(load_text_encoder, folder))
        (folder / "modeling_evil.py").unlink()
        (folder / "link").symlink_to("/etc/passwd")
        said.append("is a link out of" in refusal(load_text_encoder, folder))
        (folder / "link").unlink()
    t5, _, ours = places
    change_model(t5, model_type="evil")
    said.append("architecture of a text encoder must be one of t5" in refusal(load_text_encoder, t5))
    edit(ours / "config.json", architecture="evil")
    said.append("architecture of a text encoder must be one of t5" in refusal(load_text_encoder, ours))
    record("B3 text encoder with code", len(said), sum(said))


def test_a_pipeline_takes_no_text_encoder_of_another_library(pipeline_folder, places, tmp_path):
    model = shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    shutil.copytree(places[0], model / "text_encoder")
    edit(model / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    assert "only this project's own parts are loaded" in refusal(Text2ImagePipeline.from_pretrained, model)


def test_safetensors_that_lie_cost_no_memory(places, tmp_path):
    injected = survived = 0
    for _, bomb in bombs(tmp_path / "bomb"):
        for folder in places[1:]:
            path = weights_of(folder)
            path.unlink()
            path.hardlink_to(bomb)
            injected += 1
            with memory(60):
                survived += bool(refusal(load_text_encoder, folder))
        bomb.unlink()
    record("B4 text encoder's safetensors that lie", injected, survived)


def test_an_index_of_shards_names_files_beside_it_alone(places):
    for folder, stem in zip(places[1:], ("model", "diffusion_pytorch_model")):
        for name in ("../t5/model.safetensors", "/etc/passwd", "pytorch_model.bin"):
            index = folder / f"{stem}.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": {"embeddings": name}}))
            assert refusal(load_text_encoder, folder)


def test_weights_that_are_not_finite_or_not_those_of_the_fingerprint_are_refused(places):
    for folder in places:
        path = weights_of(folder)
        tensors = load_file(path)
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name] * torch.nan}, path, metadata={"format": "pt"})
        said = refusal(load_text_encoder, folder)
        assert "NaN or infinity" in said or "are not those of fingerprint" in said
        save_file(tensors | {name: tensors[name] + 1}, path, metadata={"format": "pt"})
    assert "are not those of fingerprint" in refusal(load_text_encoder, places[-1])


def hostile_tokenizers() -> dict[str, Any]:
    """Changes of tokenizer.json, by what they do."""
    evil = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    template = [{"SpecialToken": {"id": "[END]", "type_id": 0}}] * 1000 + [{"Sequence": {"id": "A", "type_id": 0}}]
    end = {"id": "[END]", "ids": [2], "tokens": ["[END]"]}
    long = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": {"[END]": end}}
    words = {"[UNK]": 0, "far": 10**9}
    return {
        "a pattern that takes for ever": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [evil]}},
        "doubling": {"normalizer": {"type": "Sequence", "normalizers": [double] * 40}},
        "a long replacement": {"normalizer": double | {"content": "a" * 10**6}},
        "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
        "many special tokens": {"post_processor": long},
        "a token beyond the table": {"model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}},
        "a token one beyond the table": {
            "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "far": SIZE}, "unk_token": "[UNK]"}
        },
        "dice": {"model": {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}},
        "an unknown kind": {"model": {"type": "Evil"}},
        "no model": {"model": None},
        "a broken map of characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    }


def test_tokenizers_that_run_wild_are_refused(places):
    injected = survived = 0
    for changes in hostile_tokenizers().values():
        for folder in places:
            path = folder / "tokenizer.json"
            sound = path.read_text()
            edit(path, **changes)
            injected += 1
            survived += bool(refusal(load_text_encoder, folder))
            path.write_text(sound)
    for content in (b"", b"[]", b"\xff", b"{" * 10**6):
        for folder in places:
            (folder / "tokenizer.json").write_bytes(content)
            injected += 1
            survived += bool(refusal(load_text_encoder, folder))
    record("B3 text encoder's tokenizer that runs wild", injected, survived)


def test_padding_and_cutting_of_a_tokenizer_file_are_not_taken_over(places):
    for folder in places:
        before = load_text_encoder(folder).encode(["a red circle", "red"])
        padding = {"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3}
        cut = {"direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        edit(folder / "tokenizer.json", padding=padding | {"pad_type_id": 0, "pad_token": "[UNK]"}, truncation=cut)
        assert torch.equal(load_text_encoder(folder).encode(["a red circle", "red"]).states, before.states)
