"""Components of public models: strict, tensor by tensor, in the dtype that is stored."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import PriorTransformer

from t2i.errors import InputError
from t2i.files.component import Component, load_from_components

TINY = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "embedding_dim": 8, "num_embeddings": 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = PriorTransformer(**TINY).half()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


class Holder(torch.nn.Module):
    def __init__(self, settings: dict):
        super().__init__()
        self.net = PriorTransformer(**settings)
        self.register_buffer("null", torch.zeros(8))


def test_a_model_is_filled_with_the_stored_tensors_in_the_stored_dtype(folder: Path) -> None:
    part = Component(folder)
    model = load_from_components(lambda: Holder(part.get_config_arguments()), {"net.": part}, extra=("null",))
    stored = PriorTransformer.from_pretrained(folder, torch_dtype=torch.float16).state_dict()
    for name, tensor in stored.items():
        assert torch.equal(model.state_dict()["net." + name], tensor)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_another_dtype_is_that_of_every_tensor(folder: Path) -> None:
    part = Component(folder)
    model = load_from_components(
        lambda: Holder(part.get_config_arguments()), {"net.": part}, torch.float32, extra=("null",)
    )
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_a_tensor_too_many_or_too_few_or_of_another_shape_is_refused_by_name(folder: Path) -> None:
    part = Component(folder)
    for change, message in (
        ({"num_layers": 2}, "lacks tensors"),
        ({"num_embeddings": 6}, "misshapen tensors.*positional_embedding"),
        ({"added_emb_type": None}, "unknown tensors.*prd_embedding"),
    ):
        with pytest.raises(InputError, match=f"prior' .*{message}|{message}"):
            load_from_components(
                partial(Holder, {**part.get_config_arguments(), **change}), {"net.": part}, extra=("null",)
            )


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    model = PriorTransformer.from_pretrained(folder)
    model.proj_in.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    part = Component(folder)
    with pytest.raises(InputError, match="NaN or infinity"):
        load_from_components(lambda: Holder(part.get_config_arguments()), {"net.": part}, extra=("null",))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder 'unet'"):
        Component(tmp_path / "unet", tmp_path)
