"""Weights on their way from a file to a model: each is there once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.side_by_side import measure_peak_memory
from t2i.files.component import CHUNK_BYTES, Component, iterate_stored_tensors
from t2i.files.model_folder import load_component_model
from t2i.networks.autoencoder import Autoencoder


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """More than is converted at once."""
    many = {f"layer.{i}": torch.randn(1, CHUNK_BYTES // 4, generator=torch.manual_seed(i)).half() for i in range(5)}
    return many | {"count": torch.tensor(3), "single": torch.randn(7), "none": torch.zeros(0, 2).half()}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_files_tensors_come_each_once_and_only_floating_ones_in_the_dtype(
    tensors: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype | None
) -> None:
    save_file(tensors, tmp_path / "file.safetensors")
    pairs = list(iterate_stored_tensors(tmp_path / "file.safetensors", dtype))
    assert sorted(name for name, _ in pairs) == sorted(tensors)
    for name, tensor in pairs:
        stays = dtype is None or not tensors[name].is_floating_point()
        expected = tensors[name] if stays else tensors[name].to(dtype)
        assert tensor.dtype == expected.dtype and tensor.equal(expected), name


def test_half_precision_becomes_single_without_the_file_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({f"layer.{i}": torch.ones(2**20).half() for i in range(40)}, path)
    list(iterate_stored_tensors(path, torch.float32))  # what is allocated but once
    kept: list[Tensor] = []
    peak = measure_peak_memory(lambda: kept.extend(tensor for _, tensor in iterate_stored_tensors(path, torch.float32)))
    if peak is None:
        pytest.skip("this system does not tell the peak of memory")
    assert peak < 1.2 * sum(one.nbytes for one in kept)


def test_a_model_is_read_as_its_class_would(tmp_path: Path) -> None:
    made = Autoencoder({"latent_channels": 4, "block_out_channels": [32], "layers_per_block": 1})
    made.half().save_pretrained(tmp_path)
    for dtype in (None, torch.bfloat16):
        folder = str(tmp_path)
        ours = load_component_model(Autoencoder, Component(tmp_path), dtype)
        theirs = Autoencoder.from_pretrained(folder, dtype=dtype or torch.float32)
        assert not ours.training and ours.config == theirs.config and ours.dtype == theirs.dtype
        for name, tensor in theirs.state_dict().items():
            assert ours.state_dict()[name].equal(tensor) and ours.state_dict()[name].dtype == tensor.dtype, name
        assert [one.requires_grad for one in ours.parameters()] == [one.requires_grad for one in theirs.parameters()]
