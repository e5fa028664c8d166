"""Stages in dtypes of their own: what is loaded in which, what is drawn then, and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from t2i.pipelines import ImageToImagePipeline, Text2ImagePipeline

from t2i.errors import InputError
from tests.commands.test_cli import QUICK, run
from tests.interop.test_loading import ONE_EACH, load
from tests.interop.test_loading import draw as draw_public

BF16, FP32 = torch.bfloat16, torch.float32
STAGES = ("clip", "prior", "decoder", "autoencoder")
# Of a pixel from 0 to 1, on average: four times what was measured here. Two prompts' images differ by 0.07, and what
# a decoder with weights of three bits draws differs by 0.003.
ALLOWED = {"clip": 1.2e-4, "prior": 4e-5, "decoder": 1e-3, "autoencoder": 5e-3}


def dtypes_of(pipeline: Any) -> dict[str, torch.dtype]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {name: next(one.dtype for one in part.parameters()) for name, part in parts.items()}


def draw(pipeline: Any, **settings: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    own = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    settings = {"num_inference_steps": 3, "prior_num_inference_steps": 2, "prior_candidates": 1, **settings}
    return pipeline(["red circle", "blue square"], generator=own, output_type="pt", **settings).images


@pytest.mark.parametrize("part", STAGES)
def test_one_stage_in_bf16_draws_nearly_what_all_draw_in_fp32(pipeline: Any, tmp_path: Path, part: str) -> None:
    pipeline.save_pretrained(tmp_path)
    mixed = Text2ImagePipeline.from_pretrained(tmp_path, dtype={part: BF16})
    assert dtypes_of(mixed) == dict.fromkeys(STAGES, FP32) | {part: BF16}
    expected, drawn = draw(pipeline), draw(mixed)
    assert drawn.dtype == FP32
    error = (drawn - expected).abs()
    assert 0 < error.mean() < ALLOWED[part] and (error > 0).float().mean() > 0.5  # it is computed in another dtype
    assert error.max() < 10 * ALLOWED[part] and (expected[0] - expected[1]).abs().mean() > 10 * ALLOWED[part]


def test_what_a_dict_does_not_name_is_its_default(pipeline_folder: Path) -> None:
    pipeline = Text2ImagePipeline.from_pretrained(pipeline_folder, torch_dtype={"default": BF16, "decoder": FP32})
    assert dtypes_of(pipeline) == dict.fromkeys(STAGES, BF16) | {"decoder": FP32}


def test_pictures_are_read_by_stages_of_other_dtypes(pipeline_folder: Path) -> None:
    dtype = {"clip": BF16, "decoder": BF16}
    drawn = []
    for more in ({}, {"dtype": dtype}):
        pipeline = ImageToImagePipeline.from_pretrained(pipeline_folder, **more)
        pipeline.set_progress_bar_config(disable=True)
        picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        own = torch.Generator().manual_seed(2)
        drawn.append(pipeline(picture, generator=own, num_inference_steps=3, output_type="pt").images)
    error = (drawn[1] - drawn[0]).abs()
    assert 0 < error.mean() < ALLOWED["decoder"] and error.max() < 10 * ALLOWED["decoder"]


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_public_models_decoder_alone_is_in_bf16_also_after_saving(name: str, tmp_path: Path) -> None:
    pipeline = load(name, dtype={"decoder": BF16})
    found = dtypes_of(pipeline)
    assert found.pop("decoder") == BF16 and set(found.values()) == {FP32}
    assert draw_public(pipeline).isfinite().all()
    pipeline.save_pretrained(tmp_path)
    again = Text2ImagePipeline.from_pretrained(tmp_path, dtype={"prior": BF16, "clip": BF16})
    assert dtypes_of(again) == found | {"decoder": BF16, "clip": BF16} | ({"prior": BF16} if "prior" in found else {})


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ({"unet": BF16}, "dtype names the part 'unet'; the parts are clip, text_encoder, prior, decoder, autoencoder"),
        ({"decoder": "bf16"}, "dtype must be a torch.dtype, a dict of them, or 'auto', got 'bf16'"),
        ({"decoder": "auto"}, "dtype must be a torch.dtype, a dict of them, or 'auto', got 'auto'"),
        ({"decoder": None}, "dtype must be a torch.dtype, a dict of them, or 'auto', got None"),
    ],
)
def test_other_parts_and_other_values_are_refused(pipeline_folder: Path, dtype: Any, message: str) -> None:
    for load_it in (
        lambda: Text2ImagePipeline.from_pretrained(pipeline_folder, dtype=dtype),
        lambda: load("karlo", dtype=dtype),
    ):
        with pytest.raises(InputError, match=message):
            load_it()


def test_a_command_draws_with_the_decoder_in_bf16(monkeypatch, capsys, pipeline_folder, tmp_path) -> None:
    common = ["generate", "red circle", "--model", pipeline_folder, "--seed", 1, *QUICK]
    said = {}
    for name, more in {
        "all": ["bf16"],
        "long": ["bfloat16"],
        "one": ["decoder=bf16"],
        "two": ["decoder=bf16", "fp32"],
    }.items():
        options = [word for one in more for word in ("--dtype", one)]
        status, out, err = run(monkeypatch, capsys, *common, "--out", tmp_path / name, *options)
        assert status == 0, err
        with Image.open(out.strip()) as image:
            said[name] = json.loads(image.info["t2i"])["dtype"]
    parts = {"decoder": "bfloat16"}
    assert said == {"all": "bfloat16", "long": "bfloat16", "one": parts, "two": parts | {"default": "float32"}}


def test_a_command_draws_in_fp16_on_a_processor_and_does_not_say_that_it_fails(
    monkeypatch, capsys, caplog, pipeline_folder, tmp_path
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    words = ["generate", "red circle", "--model", pipeline_folder, "--out", tmp_path, "--dtype", "fp16", *QUICK]
    status, _, err = run(monkeypatch, capsys, *words)
    assert status == 0, err
    assert "cannot run" not in err + caplog.text and len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize("options", [["--dtype", "bf16"], ["--dtype", "decoder=bf16", "--device", "cpu"]])
def test_a_command_on_a_processor_without_bf16_says_so_in_one_line(
    monkeypatch, capsys, pipeline_folder, tmp_path, options
) -> None:
    monkeypatch.undo()  # of the fixture by which any machine does
    monkeypatch.setattr("t2i.runtime.devices.has_bf16_instructions", lambda: False)
    monkeypatch.setattr("t2i.runtime.devices.find_available_devices", lambda: ["cpu"])
    common = ["generate", "red circle", "--model", pipeline_folder, "--out", tmp_path / "out", *QUICK]
    status, out, err = run(monkeypatch, capsys, *common, *options)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "dtype bfloat16 needs bfloat16 instructions, which device 'cpu' lacks; float32 is faster here" in err
    assert not (tmp_path / "out").exists()
    status, _, err = run(monkeypatch, capsys, *common)
    assert status == 0, err


def test_files_in_bf16_on_a_machine_without_it_are_one_line_of_warning(
    monkeypatch, caplog, pipeline_folder, tmp_path
) -> None:
    """Nobody asked for it, so nothing is refused."""
    monkeypatch.undo()  # of the fixture by which any machine does
    monkeypatch.setattr("t2i.runtime.devices.find_available_devices", lambda: ["cpu"])
    Text2ImagePipeline.from_pretrained(pipeline_folder).to(BF16).save_pretrained(tmp_path)
    for has, dtype, expected in ((False, None, 0), (False, "auto", 1), (True, "auto", 0), (False, FP32, 0)):
        monkeypatch.setattr("t2i.runtime.devices.has_bf16_instructions", lambda has=has: has)
        with caplog.at_level(logging.WARNING, "t2i"):
            Text2ImagePipeline.from_pretrained(tmp_path, dtype=dtype)
        said = [record.message for record in caplog.records if "bfloat16" in record.message]
        assert len(said) == expected
        caplog.clear()
    public = load("karlo").to(BF16)
    public.save_pretrained(tmp_path / "public")  # whose own dtype is what is loaded where nothing is said
    monkeypatch.setattr("t2i.runtime.devices.has_bf16_instructions", lambda: False)
    Text2ImagePipeline.from_pretrained(tmp_path / "public")
    (line,) = [record.message for record in caplog.records if "bfloat16" in record.message]
    assert "decoder" in line and line.endswith(
        "stored in bfloat16, which is slow on this machine; dtype=torch.float32 (--dtype fp32) is faster"
    )


def test_a_part_that_is_none_is_one_line(monkeypatch, capsys, pipeline_folder, tmp_path) -> None:
    common = ["generate", "a", "--model", pipeline_folder, "--out", tmp_path / "out"]
    status, out, err = run(monkeypatch, capsys, *common, "--dtype", "vae=bf16")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "dtype's part must be one of clip, " in err
    status, out, err = run(monkeypatch, capsys, *common, "--dtype", "text_encoder=fp32")
    lines = [line for line in err.splitlines() if line.strip() and "Loading" not in line]
    assert (status, out, len(lines)) == (2, "", 1) and not (tmp_path / "out").exists()
    assert "dtype names the part 'text_encoder', which this model lacks; it has clip, prior, decoder, auto" in lines[0]
