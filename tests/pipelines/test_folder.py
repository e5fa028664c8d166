"""A pipeline's folder: each of its files is read once or twice, and folders of older versions load as before."""

import builtins
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from t2i.pipelines import Text2ImagePipeline, UpsamplePipeline
from t2i.pipelines.folder import COMPONENT_CLASSES, PipelineFolder
from t2i.pipelines.jobs.convert import convert_folder

from t2i.diffusion.samplers import build_sampler
from t2i.diffusion.stored_schedulers import PROJECT_SCHEDULERS
from t2i.files.model_folder import save_model_folder
from t2i.interop.folders import OLD_MODULES
from t2i.networks.upsampler import Upsampler
from tests.helpers.kandinsky_folders import kandinsky_21_combined, kandinsky_22_decoder, kandinsky_22_prior
from tests.helpers.karlo_folders import karlo
from tests.networks.test_upsampler import UNET

# What the version before the folders wrote, by component: its modules were copied from there.
OLD_ENTRIES = {
    "clip": [("t2i.clip", "CLIP"), ("t2i.interop.transformers_clip", "TransformersCLIP")],
    "prior": [
        ("t2i.prior", "Prior"),
        ("t2i.autoregressive_prior", "AutoregressivePrior"),
        ("t2i.regression_prior", "RegressionPrior"),
        ("t2i.interop.eclipse", "EclipsePrior"),
        ("t2i.interop.dalle2_prior", "DALLE2Prior"),
    ],
    "decoder": [
        ("t2i.decoder", "Decoder"),
        ("t2i.unet_decoder", "UNetDecoder"),
        ("t2i.interop.karlo", "KarloDecoder"),
        ("t2i.interop.kandinsky", "KandinskyDecoder"),
        ("t2i.interop.stable_unclip", "StableUnCLIPDecoder"),
        ("t2i.interop.dalle2_decoder", "DALLE2Decoder"),
    ],
    "autoencoder": [
        ("t2i.autoencoder", "Autoencoder"),
        ("t2i.interop.movq", "MoVQ"),
        ("t2i.interop.super_resolution", "SuperResolution"),
        ("t2i.interop.dalle2_decoder", "DALLE2Pixels"),
        ("t2i.interop.dalle2_decoder", "DALLE2Cascade"),
    ],
    "upsampler": [("t2i.upsampler", "Upsampler")],
    "text_encoder": [
        ("t2i.text_encoder", "TextEncoder"),
        ("t2i.interop.multilingual_clip", "MultilingualCLIP"),
    ],
}
OLD_SCHEDULERS = [
    ("t2i.ddim", "ExactDDIMScheduler"),
    ("t2i.continuous", "ProbabilityFlowScheduler"),
    ("t2i.continuous", "ReverseSDEScheduler"),
    ("t2i.interop.scheduler", "UnCLIPRespacedScheduler"),
]


@contextmanager
def counted_files() -> Iterator[Counter[Path]]:
    """How often each JSON file is opened inside."""
    counts: Counter[Path] = Counter()
    real = builtins.open

    def counted(file: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(file, str | Path) and Path(file).suffix == ".json":
            counts[Path(file)] += 1
        return real(file, *arguments, **options)

    builtins.open = io.open = counted
    try:
        yield counts
    finally:
        builtins.open = io.open = real


def in_old_layout(folder: Path) -> Path:
    """The folder, with the index that the version before would have written."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    old = {
        (OLD_MODULES[module], name): module
        for entries in [*OLD_ENTRIES.values(), OLD_SCHEDULERS]
        for module, name in entries
    }
    for name, entry in index.items():
        if isinstance(entry, list) and str(entry[0]).startswith("t2i."):
            index[name] = [old[tuple(entry)], entry[1]]
    path.write_text(json.dumps(index))
    return folder


def modules_of(folder: Path) -> set[str]:
    index = json.loads((folder / "model_index.json").read_text())
    return {entry[0] for entry in index.values() if isinstance(entry, list) and str(entry[0]).startswith("t2i.")}


def assert_same_weights(pipeline: Any, other: Any) -> None:
    for name, component in pipeline.components.items():
        assert type(component) is type(other.components[name])
        if isinstance(component, torch.nn.Module):
            for key, tensor in component.state_dict().items():
                assert torch.equal(tensor, other.components[name].state_dict()[key]), (name, key)


def test_each_file_of_our_own_folder_is_read_at_most_twice(pipeline_folder: Path) -> None:
    with counted_files() as counts:
        Text2ImagePipeline.from_pretrained(pipeline_folder)
    names = {path.relative_to(pipeline_folder).as_posix() for path in counts}
    assert {"model_index.json", "clip/config.json", "decoder_scheduler/scheduler_config.json"} <= names
    assert max(counts.values()) <= 2, counts


def test_saved_folders_do_not_tell_where_their_parts_were_loaded_from(pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline = Text2ImagePipeline.from_pretrained(pipeline_folder)
    origins = [part.config["_name_or_path"] for part in (pipeline, pipeline.prior)]
    assert all(str(pipeline_folder) in str(origin) for origin in origins)
    pipeline.save_pretrained(tmp_path / "copy")
    save_model_folder(pipeline.prior, tmp_path / "run")
    found = [path for path in tmp_path.rglob("*.json") if "_name_or_path" in path.read_text()]
    assert found == [] and (tmp_path / "run/model/config.json").exists()
    # In memory they know it, and what saving notes is kept
    assert origins == [part.config["_name_or_path"] for part in (pipeline, pipeline.prior)]
    assert (
        pipeline.clip.config.fingerprint == json.loads((tmp_path / "copy/clip/config.json").read_text())["fingerprint"]
    )


def test_each_file_of_a_public_model_in_two_folders_is_read_at_most_twice() -> None:
    decoder, prior = kandinsky_22_decoder(), kandinsky_22_prior()
    with counted_files() as counts:
        Text2ImagePipeline.from_pretrained(decoder, prior=prior)
    assert counts[decoder / "model_index.json"] == counts[prior / "model_index.json"] == 1
    assert counts[prior / "prior/config.json"] == counts[decoder / "unet/config.json"] == 1
    assert max(counts.values()) <= 2, counts


def test_every_class_of_before_is_found_under_its_old_module(tmp_path: Path) -> None:
    found = set()
    for component, entries in OLD_ENTRIES.items():
        for module, name in entries:
            (tmp_path / "model_index.json").write_text(json.dumps({component: [module, name]}))
            component_class = PipelineFolder(tmp_path).find_component_class(component)
            assert component_class is not None and component_class.__name__ == name
            found.add(component_class)
    assert found == {one for name, classes in COMPONENT_CLASSES.items() if name in OLD_ENTRIES for one in classes}
    assert {(OLD_MODULES[module], name) for module, name in OLD_SCHEDULERS} == {
        (module, name) for module, names in PROJECT_SCHEDULERS.items() for name in names
    }
    used = {module for entries in [*OLD_ENTRIES.values(), OLD_SCHEDULERS] for module, _ in entries}
    assert used == OLD_MODULES.keys()


@pytest.mark.parametrize("options", [{}, {"offload_state_dict": False}], ids=["loaded here", "loaded by diffusers"])
def test_our_own_folder_of_before_loads_unchanged_and_is_saved_with_the_modules_of_today(
    options: dict, pipeline_folder: Path, tmp_path: Path
) -> None:
    folder = in_old_layout(Path(shutil.copytree(pipeline_folder, tmp_path / "old")))
    assert "t2i.unet_decoder" in modules_of(folder)
    before = (folder / "model_index.json").read_bytes()
    pipeline = Text2ImagePipeline.from_pretrained(folder, **options)
    assert (folder / "model_index.json").read_bytes() == before
    assert_same_weights(pipeline, Text2ImagePipeline.from_pretrained(pipeline_folder))
    pipeline.save_pretrained(tmp_path / "new")
    assert modules_of(tmp_path / "new") == modules_of(pipeline_folder)


@pytest.mark.parametrize("name", ["ddim", "ode", "sde"])
def test_our_schedulers_of_before_load(name: str, pipeline: Any, tmp_path: Path) -> None:
    pipeline.decoder_scheduler = build_sampler(name, pipeline.decoder_scheduler)
    pipeline.save_pretrained(tmp_path)
    assert modules_of(in_old_layout(tmp_path)) & {"t2i.ddim", "t2i.continuous"}
    again = Text2ImagePipeline.from_pretrained(tmp_path)
    assert type(again.decoder_scheduler) is type(pipeline.decoder_scheduler)


@pytest.mark.parametrize("build", [karlo, kandinsky_21_combined])
def test_a_public_model_that_was_saved_before_loads_in_its_stored_dtype_and_is_converted_back(
    build: Any, tmp_path: Path
) -> None:
    pipeline = Text2ImagePipeline.from_pretrained(build(), dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "old")
    assert {"t2i.interop.scheduler", "t2i.prior"} < modules_of(in_old_layout(tmp_path / "old"))
    again = Text2ImagePipeline.from_pretrained(tmp_path / "old")
    assert again.decoder.dtype == torch.float16
    assert_same_weights(again, pipeline)
    layout = "karlo" if build is karlo else "kandinsky-2-1-combined"
    back = convert_folder(str(tmp_path / "old"), tmp_path / "back", layout)
    assert (back / "model_index.json").is_file()


def test_an_upsampler_is_taken_out_of_a_folder_of_before(pipeline: Any, tmp_path: Path) -> None:
    parts = {"upsampler": Upsampler(2, 16, UNET, patch_size=2), "upsampler_scheduler": pipeline.decoder_scheduler}
    Text2ImagePipeline.from_pipe(pipeline, **parts).save_pretrained(tmp_path)
    assert "t2i.upsampler" in modules_of(in_old_layout(tmp_path))
    assert isinstance(UpsamplePipeline.from_pretrained(tmp_path).upsampler, Upsampler)


def edit_config(component: Path, **changes: Any) -> None:
    config = json.loads((component / "config.json").read_text())
    (component / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


def test_each_model_has_the_sampling_defaults_that_its_configuration_stores(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    edit_config(tmp_path / "prior", default_steps=3, default_guidance_scale=1.0)
    edit_config(tmp_path / "decoder", default_steps=2, default_guidance_scale=1.25)
    quick = Text2ImagePipeline.from_pretrained(tmp_path)
    given = {"prior_num_inference_steps": 3, "prior_guidance_scale": 1.0, "num_inference_steps": 2}
    expected = pipeline("red circle", generator=torch.Generator().manual_seed(0), guidance_scale=1.25, **given)
    drawn = quick("red circle", generator=torch.Generator().manual_seed(0))
    assert drawn.images[0].tobytes() == expected.images[0].tobytes()
    # They stay with the model
    quick.save_pretrained(tmp_path / "again")
    again = Text2ImagePipeline.from_pretrained(tmp_path / "again").resolve_options()
    assert (again.prior.prior_num_inference_steps, again.decoder.num_inference_steps) == (3, 2)


def test_a_prior_of_before_keeps_its_guidance_and_a_model_without_stored_defaults_has_those_of_its_class(
    pipeline: Any, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    edit_config(tmp_path / "prior", default_steps=None, default_guidance_scale=None, usual_guidance=4.5)
    edit_config(tmp_path / "decoder", default_steps=None, default_guidance_scale=None)
    options = Text2ImagePipeline.from_pretrained(tmp_path).resolve_options()
    assert options.prior.prior_guidance_scale.scale == 4.5 and options.decoder.guidance_scale.scale == 1.5
    assert (options.prior.prior_num_inference_steps, options.decoder.num_inference_steps) == (25, 25)
