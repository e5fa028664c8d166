"""Files that stand in for weights: each is named for what it is, with what helps. Variants that are there alone."""

import shutil
from pathlib import Path

import pytest
import torch

from t2i.errors import InputError
from t2i.files.component import Component
from t2i.files.model_folder import load_model
from t2i.files.untrusted import choose_stored_variant, read_json, read_safetensors_header
from t2i.interop.pickles import read_pickle
from t2i.networks.autoencoder import Autoencoder

STAND_INS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n": "is a Git LFS pointer.*git lfs pull",
    b"\n <!DOCTYPE html><html><body>Access is restricted</body></html>": "is a web page.*log in first",
    b"<html>": "is a web page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "is an XML page",
    b"": "is empty; download the file again",
}


@pytest.mark.parametrize("content", STAND_INS)
@pytest.mark.parametrize(
    ("name", "read"),
    [("model.safetensors", read_safetensors_header), ("config.json", read_json), ("model.bin", read_pickle)],
)
def test_what_stands_in_for_a_file_is_named(tmp_path, content, name, read):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=STAND_INS[content]):
        read(tmp_path / name)


@pytest.fixture
def half(tmp_path: Path) -> Path:
    vae = {"latent_channels": 4, "block_out_channels": [32], "layers_per_block": 1}
    Autoencoder(vae).half().save_pretrained(tmp_path / "half", variant="fp16")
    return tmp_path / "half"


def test_a_folder_with_one_variant_alone_loads_it_and_says_so(half, caplog):
    model = load_model(Autoencoder, half)
    assert model.dtype == torch.float32 and "in the variant fp16 alone, which is used" in caplog.text
    named = Component(half, variant="fp16")
    assert all(torch.equal(model.state_dict()[name], tensor.float()) for name, tensor in named.iterate_tensors())
    assert len(caplog.records) == 1  # of what was asked for, nothing is said


def test_of_several_variants_one_must_be_chosen(half):
    shutil.copy(half / "diffusion_pytorch_model.fp16.safetensors", half / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(InputError, match="in the variants ema and fp16 alone; choose one by variant, or --variant"):
        Component(half)
    assert Component(half, variant="ema").variant == "ema"
    with pytest.raises(InputError, match="choose one"):
        Component(half, variant="bf16")


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None, None),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "fp16"),
        (["model.safetensors", "model.fp16.safetensors"], "bf16", None),
        (["model.fp16.safetensors", "config.json", "other.safetensors"], None, "fp16"),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"], None, "fp16"),
        (["model.safetensors.index.json", "model-00001-of-00001.safetensors", "model.ema.safetensors"], None, None),
        (["pytorch_model.bin"], None, None),
    ],
)
def test_the_variant_is_the_requested_one_or_the_plain_files_or_the_only_one(names, variant, chosen):
    assert choose_stored_variant(Path("folder"), variant, "model", names) == chosen
