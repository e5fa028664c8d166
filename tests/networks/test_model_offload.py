"""Every model under every way to offload or cast its weights: the same outputs, from `forward` and all other methods.

The device is the CPU; see tests/helpers/offloading.py for what waiting weights leave in memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

from t2i.networks.clip import use_hooked_attention
from t2i.runtime.hooks import find_compute_device
from tests.helpers.models import MODELS, TRAINED, compute_loss, list_float_tensors
from tests.helpers.offloading import CPU, waiting_weights_are_nan

__all__ = ["waiting_weights_are_nan"]  # a fixture
pytestmark = pytest.mark.usefixtures("waiting_weights_are_nan")
NAMES = list(MODELS)
TIMM: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32},
    "eva02_tiny_patch14_224": {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 28},
    "swinv2_tiny_window8_256": {"depths": (1,), "embed_dim": 24, "num_heads": (2,), "img_size": 64},
}


def offload_in_sequence(model: Any, folder: Path) -> None:
    """As `enable_sequential_cpu_offload` of a pipeline."""
    cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


def offload_with_buffers(model: Any, folder: Path) -> None:
    cpu_offload(model, CPU, offload_buffers=True)


def offload_to_disk(model: Any, folder: Path) -> None:
    disk_offload(model, folder, CPU, offload_buffers=True)


def offload_half(model: Any, folder: Path) -> None:
    """As `from_pretrained(device_map=...)` for a model that memory does not hold."""
    children = [name for name, _ in model.named_children()]
    device_map: dict[str, Any] = {name: ("cpu", "disk")[number % 2] for number, name in enumerate(children)}
    # accelerate offloads modules: tensors of the model itself stay.
    device_map |= dict.fromkeys([*model._parameters, *model._buffers], "cpu")
    dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


def offload_blocks(model: Any, folder: Path) -> None:
    model.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)


def offload_pairs_of_blocks_to_disk(model: Any, folder: Path) -> None:
    model.enable_group_offload(
        CPU, offload_type="block_level", num_blocks_per_group=2, offload_to_disk_path=str(folder)
    )


def offload_leaves(model: Any, folder: Path) -> None:
    model.enable_group_offload(CPU, offload_type="leaf_level")


def offload_leaves_to_disk(model: Any, folder: Path) -> None:
    model.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


WAYS: list[Callable[[Any, Path], None]] = [
    *(offload_in_sequence, offload_with_buffers, offload_to_disk, offload_half),
    *(offload_blocks, offload_pairs_of_blocks_to_disk, offload_leaves, offload_leaves_to_disk),
]


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_weights_that_wait_elsewhere_give_the_same_outputs(name: str, way: Any, tmp_path: Path) -> None:
    case = MODELS[name]
    expected, model = case.run(case.build()), case.build()
    way(model, tmp_path)
    for _ in range(2):  # weights go back to where they waited
        found = case.run(model)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert find_compute_device(model) == CPU
    waiting = [tensor for tensor in list_float_tensors(model).values() if tensor.is_meta or tensor.isnan().all()]
    assert waiting or len(list_float_tensors(model)) == 1 or way is offload_half


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", ["unet decoder", "kandinsky 2.2", "karlo", "stable unclip"])
def test_a_u_net_alone_is_offloaded_and_then_runs_block_by_block(name: str, kind: str, tmp_path: Path) -> None:
    case = MODELS[name]
    expected, model = case.run(case.build()), case.build()
    model.unet.enable_group_offload(
        CPU, offload_type=kind, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path / "unet")
    )
    for one, other in zip(case.run(model), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["in sequence", "leaves", "cast"])
@pytest.mark.parametrize("name", TIMM)
def test_layers_of_timm_that_read_others_weights_find_them(name: str, way: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    tower = use_hooked_attention(timm.create_model(name, num_classes=0, **TIMM[name]).eval())
    image = torch.randn(1, 3, TIMM[name]["img_size"], TIMM[name]["img_size"])
    with torch.no_grad():
        if way == "cast":
            for parameter in tower.parameters():  # the stored weights are then exact
                parameter.copy_(parameter.bfloat16())
        expected = tower(image)
        if way == "in sequence":
            cpu_offload(tower, CPU)
        elif way == "leaves":
            apply_group_offloading(tower, CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
        else:
            apply_layerwise_casting(tower, torch.bfloat16, torch.float32)
        torch.testing.assert_close(tower(image), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16], ids=["fp8", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_that_store_fewer_bits_compute_as_rounded_weights_do(name: str, storage: torch.dtype) -> None:
    case = MODELS[name]
    model, rounded = case.build(), case.build()
    before = model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    cast = {name for name, parameter in model.named_parameters() if parameter.dtype == storage}
    assert cast or case.model_class.__name__ == "DALLE2Pixels"
    for name, parameter in rounded.named_parameters():
        if name in cast:
            parameter.data = parameter.data.to(storage).float()
    assert model.dtype == torch.float32 and (not cast or model.get_memory_footprint() < before)
    for one, other in zip(case.run(model), case.run(rounded), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert cast == {name for name, parameter in model.named_parameters() if parameter.dtype == storage}


@pytest.mark.parametrize("name", NAMES)
def test_casting_and_group_offloading_work_together(name: str, tmp_path: Path) -> None:
    case = MODELS[name]
    outputs = []
    for offloads in (False, True):
        model = case.build()
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        if offloads:
            offload_leaves_to_disk(model, tmp_path)
        outputs.append(case.run(model))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_that_stores_fewer_bits_is_trained(name: str) -> None:
    case = MODELS[name]
    model = case.build().train()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):  # as diffusers checks it: without, convolutions keep stored weights
        loss = compute_loss(case, model)
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
