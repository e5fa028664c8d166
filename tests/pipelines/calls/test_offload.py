"""Every family of models under every way to offload or cast its weights: the same images as without.

The device is the CPU. tests/networks/test_model_offload.py checks each model, method by method.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from t2i.pipelines.calls.offload import DiskOffloading

from t2i import ImageVariationPipeline, PriorPipeline, Steering, Text2ImagePipeline, UpsamplePipeline
from t2i.diffusion.process import build_noise_scheduler
from t2i.networks.upsampler import Upsampler
from tests.helpers.dalle2_folders import dalle2
from tests.helpers.kandinsky_folders import (
    kandinsky_21_combined,
    kandinsky_22_combined,
    kandinsky_22_controlnet,
    kandinsky_22_prior,
)
from tests.helpers.karlo_folders import karlo
from tests.helpers.models import PLAIN
from tests.helpers.offloading import (
    CPU,
    WAYS,
    measure_waiting_parts,
    offload_in_sequence,
    offload_leaves,
    offload_leaves_to_disk,
    offload_models,
    waiting_weights_are_nan,
)
from tests.helpers.pipelines import for_all, list_models, pipe, tiny_upsampler
from tests.helpers.stable_unclip_folders import stable_unclip

__all__ = ["pipe", "tiny_upsampler", "waiting_weights_are_nan"]  # fixtures
pytestmark = pytest.mark.usefixtures("waiting_weights_are_nan")
FOLDERS: dict[str, Callable[[], Path]] = {
    "karlo": karlo,
    "kandinsky 2.1": kandinsky_21_combined,
    "kandinsky 2.2": kandinsky_22_combined,
    "kandinsky 2.2 controlnet": kandinsky_22_controlnet,
    "stable unclip": stable_unclip,
    "dalle2": dalle2,
}
FAMILIES = ["own", *FOLDERS]


@pytest.fixture(scope="module")
def families(pipeline_folder: Path) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def copy_pipeline(family: str) -> Any:
        if family not in loaded:
            folder = pipeline_folder if family == "own" else FOLDERS[family]()
            others = {"prior": kandinsky_22_prior()} if family == "kandinsky 2.2 controlnet" else {}
            loaded[family] = Text2ImagePipeline.from_pretrained(folder, **others)
            loaded[family].set_progress_bar_config(disable=True)
        return copy.deepcopy(loaded[family])

    return copy_pipeline


def draw(pipeline: Any) -> list[torch.Tensor]:
    """An image of a prompt with a negative one, and where there is an image encoder, a variation of it."""
    steps: dict[str, Any] = {"num_inference_steps": 2}
    if pipeline.decoder.control_factor is not None:
        steps["control_image"] = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(4))
    if pipeline.is_cascade:
        steps["super_res_num_inference_steps"] = 2
    settings = {"generator": [torch.Generator().manual_seed(5)], "output_type": "pt", **steps}
    drawn = pipeline("a red cat", negative_prompt="dog", prior_num_inference_steps=2, **settings)
    pictures = [drawn.image_embeds, drawn.images]
    if getattr(pipeline.clip, "image_encoder", pipeline.clip) is not None:
        settings["generator"] = [torch.Generator().manual_seed(6)]
        pictures.append(ImageVariationPipeline.from_pipe(pipeline)(drawn.images, **settings).images)
    return pictures


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_offloading_changes_no_picture(family: str, way: Any, families: Any, tmp_path: Path) -> None:
    expected, pipeline = draw(families(family)), families(family)
    way(pipeline, tmp_path)
    for found, expected_part in zip(draw(pipeline), expected, strict=True):
        torch.testing.assert_close(found, expected_part, atol=1e-4, rtol=1e-4)
    assert min(measure_waiting_parts(pipeline).values()) > 0.95


@pytest.mark.parametrize("way", [None, *WAYS], ids=lambda way: "none" if way is None else way.__name__)
def test_a_call_looks_once_for_the_device_and_finds_that_of_diffusers(
    way: Any, families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = families("own")
    if way is not None:
        way(pipeline, tmp_path)
    found: list[torch.device] = []
    look = DiskOffloading.find_execution_device
    monkeypatch.setattr(DiskOffloading, "find_execution_device", lambda self: found.append(look(self)) or found[-1])
    pipeline("a red cat", num_inference_steps=2, prior_num_inference_steps=2)
    assert found == [DiffusionPipeline._execution_device.fget(pipeline)]
    # Outside a call it may have changed
    assert pipeline._execution_device == found[0] and len(found) == 2


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_steering_by_a_gradient_through_offloaded_weights_is_the_same(way: Any, families: Any, tmp_path: Path) -> None:
    pictures = []
    for offloads in (False, True):
        pipeline = families("own")
        if offloads:
            way(pipeline, tmp_path)
        settings = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "steering": Steering(10.0, text="dog")}
        generator = torch.Generator().manual_seed(5)
        pictures.append(pipeline("a red cat", generator=generator, output_type="pt", **settings).images)
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_offloaded_upsampler_enlarges_the_same(way: Any, tmp_path: Path) -> None:
    pictures = []
    for offloads in (False, True):
        torch.manual_seed(0)
        model = Upsampler(factor=2, low_size=8, unet=PLAIN).eval()
        pipeline = UpsamplePipeline(model, build_noise_scheduler({"beta_schedule": "linear"}))
        pipeline.set_progress_bar_config(disable=True)
        if offloads:
            way(pipeline, tmp_path)
        picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(5), "output_type": "pt"}
        pictures.append(pipeline(picture, **settings).images)
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_store_fewer_bits_draw_as_rounded_weights_do(family: str, families: Any) -> None:
    pipeline, rounded = families(family), families(family)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
            for key, parameter in rounded.components[name].named_parameters():
                if part.get_parameter(key).dtype == torch.bfloat16:
                    parameter.data = parameter.data.bfloat16().float()
    for found, expected_part in zip(draw(pipeline), draw(rounded), strict=True):
        torch.testing.assert_close(found, expected_part, atol=1e-4, rtol=1e-4)


def test_weights_on_the_disk_are_those_of_this_pipeline(families: Any, tmp_path: Path) -> None:
    """Layers of two models have the same name, and an earlier pipeline may have left its files."""
    for _ in range(2):
        pipeline = families("own")
        with torch.no_grad():
            for parameter in pipeline.decoder.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        expected = draw(pipeline)
        offload_leaves_to_disk(pipeline, tmp_path)
        for found, expected_part in zip(draw(pipeline), expected, strict=True):
            torch.testing.assert_close(found, expected_part, atol=1e-4, rtol=1e-4)


def test_the_prior_alone_is_offloaded_to_folders_of_its_own(families: Callable[[str], Any], tmp_path: Path) -> None:
    plain, offloaded = (PriorPipeline.from_pipe(families("own")) for _ in range(2))
    offloaded.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk"))
    z_i = [
        pipeline("a red circle", generator=torch.Generator().manual_seed(0), prior_num_inference_steps=2).image_embeds
        for pipeline in (plain, offloaded)
    ]
    assert torch.equal(*z_i) and len(list((tmp_path / "disk").iterdir())) == 2


def test_a_pipeline_from_an_offloaded_one_is_offloaded_too(families: Any) -> None:
    pipeline = families("own")
    expected = draw(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    for kind in (ImageVariationPipeline, PriorPipeline, Text2ImagePipeline):
        other = kind.from_pipe(pipeline)
        settings = {"generator": torch.Generator().manual_seed(6)}
        if kind is ImageVariationPipeline:
            drawn = other(expected[1], num_inference_steps=2, output_type="pt", **settings).images
            torch.testing.assert_close(drawn, expected[2], atol=1e-4, rtol=1e-4)
        else:
            other("a red cat", prior_num_inference_steps=2, **settings)
        assert min(measure_waiting_parts(pipeline).values()) == 1
    for found, expected_part in zip(draw(pipeline), expected, strict=True):  # the first one still works
        torch.testing.assert_close(found, expected_part, atol=1e-4, rtol=1e-4)


# Every pipeline


@pytest.mark.parametrize("way", [offload_in_sequence, offload_models, offload_leaves], ids=lambda way: way.__name__)
@for_all()
def test_what_is_offloaded_draws_the_same_twice(case, pipe, way, tmp_path):
    drawn = case.run(pipe)
    way(pipe, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(case.run(pipe), drawn, atol=1e-4, rtol=1e-4)
        assert min(measure_waiting_parts(pipe).values()) > 0.99


@for_all()
def test_a_part_may_be_left_out_of_group_offloading(case, pipe):
    drawn, name = case.run(pipe), next(iter(list_models(pipe)))
    pipe.enable_group_offload(CPU, offload_type="leaf_level", exclude_modules=name)
    torch.testing.assert_close(case.run(pipe), drawn, atol=1e-4, rtol=1e-4)
    waiting = measure_waiting_parts(pipe)
    assert waiting.pop(name) == 0 and all(part > 0.99 for part in waiting.values())


@for_all()
def test_weights_in_eight_bits_draw(case, pipe):
    name = next(name for name in ("decoder", "upsampler", "prior") if getattr(pipe, name, None) is not None)
    drawn, model = case.run(pipe), getattr(pipe, name)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in model.parameters()}
    cast = case.run(pipe)
    assert cast.isfinite().all() and (cast - drawn).abs().max() > 0
