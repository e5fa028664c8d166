"""What diffusers' test suite checks of every model class, for every model class of this project.

tests/diffusers_checks.txt has each check of its mixins, with the test here or the reason why it does not apply.
"""

import importlib
import json
import pkgutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import constants

import t2i.networks
from t2i.files.component import to_json_types
from t2i.files.model_folder import load_model
from tests.helpers.models import MODELS, TRAINED, compute_loss, list_float_tensors

NAMES = list(MODELS)
CHECKPOINTED = [name for name in TRAINED if MODELS[name].model_class._supports_gradient_checkpointing]


def close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_every_model_class_is_here() -> None:
    classes = set()
    for module in pkgutil.walk_packages(t2i.networks.__path__, "t2i.networks."):
        for value in vars(importlib.import_module(module.name)).values():
            is_ours = isinstance(value, type) and issubclass(value, ModelMixin) and value.__module__.startswith("t2i.")
            if is_ours and not getattr(value, "__abstractmethods__", None):
                classes.add(value)
    assert classes == {case.model_class for case in MODELS.values()}


@pytest.mark.parametrize("name", NAMES)
def test_saving_and_loading_keeps_outputs_weights_and_configuration(name: str, tmp_path: Path) -> None:
    case = MODELS[name]
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path)
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    ours, theirs = ({key: value for key, value in one.config.items() if key[0] != "_"} for one in (model, loaded))
    assert to_json_types(ours) == to_json_types(theirs)
    expected = case.run(model)
    close(case.run(loaded), expected)
    close(case.run(load_model(case.model_class, tmp_path)), expected)  # what this project's own folders go through


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_a_configuration_alone_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    case = MODELS[name]
    torch.manual_seed(0)
    model = case.model_class.from_config(case.model_class(**case.arguments).config)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path)
    for key, tensor in model.state_dict().items():
        assert tensor.equal(loaded.state_dict()[key])
    loaded.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_loaded_by_its_name_alone(name: str, tmp_path: Path) -> None:
    case = MODELS[name]
    model = case.build()
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
    close(case.run(case.model_class.from_pretrained(tmp_path, variant="fp16")), case.run(model))
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        case.model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("low_memory", [True, False], ids=["low memory", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_loaded_in_the_dtype_that_is_asked_for(name: str, low_memory: bool, tmp_path: Path) -> None:
    case = MODELS[name]
    case.build().save_pretrained(tmp_path)
    for dtype, argument in ((torch.float16, "dtype"), (torch.bfloat16, "torch_dtype")):
        loaded = case.model_class.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory, **{argument: dtype})
        other = {key for key, tensor in list_float_tensors(loaded).items() if tensor.dtype != dtype}
        assert not other and loaded.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_half_precision_is_saved_and_loaded_as_it_is(name: str, dtype: Any, tmp_path: Path) -> None:
    case = MODELS[name]
    model = torch.nn.Module.to(case.build(), dtype)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, dtype=dtype)
    for key, tensor in model.state_dict().items():
        assert tensor.equal(loaded.state_dict()[key])
    close(case.run(loaded), case.run(model), tolerance=0)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_finite_and_the_same_each_time(name: str) -> None:
    case = MODELS[name]
    model = case.build()
    first = case.run(model)
    assert first and all(tensor.isfinite().all() for tensor in first)
    close(case.run(model), first, tolerance=0)


@pytest.mark.parametrize("name", NAMES)
def test_attributes_are_found_and_those_of_the_configuration_warn(name: str) -> None:
    case = MODELS[name]
    model = case.build()
    model.dummy_attribute = 5
    model.register_to_config(test_attribute=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.dummy_attribute == 5 and model.save_pretrained == model.save_pretrained
    with pytest.warns(FutureWarning, match="test_attribute"):
        assert model.test_attribute == 5
    with pytest.raises(AttributeError, match=f"'{type(model).__name__}' object has no attribute 'does_not_exist'"):
        model.does_not_exist  # noqa: B018


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "dalle2 pixels"])  # has one number
def test_weights_in_several_files_are_those_in_one(name: str, variant: str | None, tmp_path: Path) -> None:
    case = MODELS[name]
    model = case.build()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path, max_shard_size=f"{max(1, int(size * 0.75 / 1000))}KB", variant=variant)
    middle = ".fp16" if variant else ""
    index = json.loads((tmp_path / f"diffusion_pytorch_model.safetensors.index{middle}.json").read_text())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 1
    close(case.run(case.model_class.from_pretrained(tmp_path, variant=variant)), case.run(model))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dalle2 pixels"])
def test_several_files_are_read_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MODELS[name]
    model = case.build()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path, max_shard_size=f"{max(1, int(size * 0.75 / 1000))}KB")
    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", True)
    close(case.run(case.model_class.from_pretrained(tmp_path)), case.run(model))


@pytest.mark.parametrize("name", NAMES)
def test_no_module_is_kept_in_fp32(name: str) -> None:
    assert MODELS[name].model_class._keep_in_fp32_modules is None


# Training


@pytest.mark.parametrize("name", TRAINED)
def test_weights_are_trained_and_averaged(name: str) -> None:
    case = MODELS[name]
    model = case.build().train()
    average = EMAModel(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    compute_loss(case, model).backward()
    optimizer.step()
    average.step(model.parameters())
    moved = [not parameter.equal(old) for parameter, old in zip(model.parameters(), before)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("name", TRAINED)
def test_mixed_precision_has_finite_gradients(name: str) -> None:
    case = MODELS[name]
    model = case.build().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute_loss(case, model)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_of_activations_changes_no_gradient(name: str) -> None:
    case, gradients = MODELS[name], []
    for checkpoints in (False, True):
        model = case.build().train()
        assert not model.is_gradient_checkpointing
        if checkpoints:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)
        compute_loss(case, model).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    close(gradients[1], gradients[0], tolerance=5e-5)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CHECKPOINTED])
def test_what_cannot_checkpoint_activations_says_so(name: str) -> None:
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        MODELS[name].build().enable_gradient_checkpointing()


# Offloading in part


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
@pytest.mark.parametrize("name", [name for name in NAMES if MODELS[name].model_class._no_split_modules])
def test_a_model_larger_than_memory_is_loaded_with_a_part_on_the_disk(name: str, tmp_path: Path) -> None:
    case = MODELS[name]
    model = case.build()
    model.save_pretrained(tmp_path / "model")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    settings = {"device_map": "auto", "max_memory": {"cpu": int(0.6 * size)}, "offload_folder": str(tmp_path / "disk")}
    loaded = case.model_class.from_pretrained(tmp_path / "model", **settings)
    assert "disk" in loaded.hf_device_map.values()
    close(case.run(loaded), case.run(model))
