"""A prior alone, public or of a run, in pipelines and in `t2i convert`; halves of public models; variants, dtypes."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline, PriorTransformer
from PIL import Image
from safetensors.torch import load_file
from t2i.pipelines.jobs.convert import convert_folder
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i import cli
from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.errors import InputError
from t2i.sampling.embeddings import load_prior
from tests.helpers.kandinsky_folders import (
    kandinsky_21_combined,
    kandinsky_21_decoder,
    kandinsky_21_prior,
    kandinsky_22_decoder,
    kandinsky_22_prior,
)
from tests.helpers.karlo_folders import karlo
from tests.helpers.public_folders import save_eclipse_prior
from tests.helpers.stable_unclip_folders import stable_unclip
from tests.helpers.stages import seeds

EMOJI = Path(__file__).parents[2] / "models" / "emoji"  # whose token states are as wide as its embeddings
STEPS = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "pt"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["t2i", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def draw(pipeline: Text2ImagePipeline) -> torch.Tensor:
    return pipeline(["a red circle", "x"], generator=seeds(1, 2), **STEPS).images


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project's prior as a PriorTransformer."""
    return convert_folder(str(EMOJI), tmp_path_factory.mktemp("exported") / "prior", "prior-transformer")


def test_an_exported_prior_draws_in_its_pipeline_what_the_original_does(exported: Path):
    original, again = (Text2ImagePipeline.from_pretrained(EMOJI, **one) for one in ({}, {"prior": str(exported)}))
    assert again.prior.config.unit_length
    assert again.prior.default_guidance_scale == original.prior.default_guidance_scale
    torch.testing.assert_close(draw(again), draw(original), atol=1e-4, rtol=0)
    assert PriorTransformer.from_pretrained(exported).dtype == torch.float32


def test_the_command_line_takes_it_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    there, back = tmp_path / "there", tmp_path / "back"
    assert run(monkeypatch, "convert", EMOJI, there, "--to", "prior-transformer") == 0
    assert run(monkeypatch, "convert", there, back) == 2
    assert "is a prior alone; give --clip, the folder of its CLIP" in capsys.readouterr().err
    assert run(monkeypatch, "convert", there, back, "--clip", EMOJI) == 0
    pictures = []
    for number, prior in enumerate([[], ["--prior", there], ["--prior", back]]):
        out = tmp_path / f"{number}.png"
        few = ["--steps", 2, "--prior-steps", 2, "--seed", 1, "--out", out]
        assert run(monkeypatch, "generate", "a red circle", "--model", EMOJI, *few, *prior) == 0
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert all(abs(picture - pictures[0]).max() <= 1 for picture in pictures)  # rounded to whole levels


def test_the_scheduler_is_its_own_or_that_of_the_prior_it_replaces(exported: Path, tmp_path: Path):
    bare = Path(shutil.copytree(exported, tmp_path / "bare"))
    shutil.rmtree(bare / "scheduler")
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    settings = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    settings |= {"_class_name": "UnCLIPScheduler", "prediction_type": "sample", "clip_sample": False}
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    own = Text2ImagePipeline.from_pretrained(EMOJI)
    again = Text2ImagePipeline.from_pretrained(EMOJI, prior=bare)
    assert dict(again.prior_scheduler.config) == dict(own.prior_scheduler.config)
    made = Text2ImagePipeline.from_pretrained(EMOJI, prior=other).prior_scheduler
    assert isinstance(made, UnCLIPRespacedScheduler)
    index = json.loads((EMOJI / "model_index.json").read_text())
    without = Path(shutil.copytree(EMOJI, tmp_path / "without"))
    (without / "model_index.json").write_text(
        json.dumps(index | {"prior": [None, None], "prior_scheduler": [None, None]})
    )
    with pytest.raises(InputError, match="is a diffusion prior without a scheduler.*give prior_scheduler="):
        Text2ImagePipeline.from_pretrained(without, prior=bare)
    given = Text2ImagePipeline.from_pretrained(without, prior=bare, prior_scheduler=own.prior_scheduler)
    assert given.prior_scheduler is own.prior_scheduler


@pytest.mark.parametrize("build", [kandinsky_22_prior, lambda: kandinsky_22_prior() / "prior"])
def test_public_priors_go_into_this_projects_folders(build: Callable[[], Path], tmp_path: Path):
    """Of a pipeline's folder, or a part of one."""
    ours = Text2ImagePipeline.from_pretrained(kandinsky_22_decoder(), prior=kandinsky_22_prior())
    ours.save_pretrained(tmp_path / "ours")
    again = Text2ImagePipeline.from_pretrained(tmp_path / "ours", prior=build())
    torch.testing.assert_close(draw(again), draw(ours), atol=1e-5, rtol=0)


def test_an_eclipse_prior_goes_into_a_folder_of_this_project_without_a_scheduler(tmp_path: Path):
    save_eclipse_prior(tmp_path / "eclipse")
    public = Text2ImagePipeline.from_pretrained(kandinsky_22_decoder(), prior=kandinsky_22_prior())
    public.save_pretrained(tmp_path / "ours")
    made = Text2ImagePipeline.from_pretrained(tmp_path / "ours", prior=tmp_path / "eclipse")
    assert made.prior_scheduler is None and draw(made).isfinite().all()


def test_a_prior_of_other_embeddings_is_refused(pipeline_folder: Path):
    with pytest.raises(InputError, match="they do not belong together"):
        Text2ImagePipeline.from_pretrained(pipeline_folder, prior=kandinsky_22_prior())


def test_a_part_of_a_public_pipeline_becomes_a_run_with_the_null_of_its_clip(tmp_path: Path):
    """And a PriorTransformer again, tensor by tensor."""
    source = kandinsky_22_prior() / "prior"
    prior, scheduler = load_prior(convert_folder(str(source), tmp_path / "run"))
    whole = Text2ImagePipeline.from_pretrained(kandinsky_22_decoder(), prior=kandinsky_22_prior())
    assert type(scheduler) is type(whole.prior_scheduler)
    assert prior.state_dict().keys() == whole.prior.state_dict().keys()
    for name, tensor in whole.prior.state_dict().items():
        assert torch.equal(prior.state_dict()[name], tensor), name
    for one in (source, tmp_path / "run"):
        back = convert_folder(str(one), tmp_path / f"back-{one.name}", "prior-transformer")
        before, after = load_file(source / WEIGHTS), load_file(back / WEIGHTS)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_prior_alone_is_no_whole_pipeline(tmp_path: Path):
    with pytest.raises(InputError, match="is not a complete pipeline, which karlo needs"):
        convert_folder(str(kandinsky_22_prior() / "prior"), tmp_path / "new", "karlo")
    with pytest.raises(InputError, match="is a prior alone; give --clip"):
        save_eclipse_prior(tmp_path / "alone")
        convert_folder(str(tmp_path / "alone"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("build", "to", "kind"),
    [
        (kandinsky_22_decoder, "kandinsky-2-2", KandinskyV22Pipeline),
        (kandinsky_22_prior, "kandinsky-2-2-prior", KandinskyV22PriorPipeline),
        (kandinsky_21_decoder, "kandinsky-2-1", None),
        (kandinsky_21_prior, "prior-transformer", PriorTransformer),
        (kandinsky_21_combined, "kandinsky-2-1-prior", None),
    ],
)
def test_a_half_is_converted_without_the_other(build: Callable[[], Path], to: str, kind, tmp_path: Path):
    made = convert_folder(str(build()), tmp_path / "half", to, fp16=True)
    if kind is not None:
        kind.from_pretrained(made)
    for path in made.rglob("*.safetensors"):
        place = path.parent.relative_to(made).as_posix()
        place = "prior" if place == "." else f"prior_{place}" if build is kandinsky_21_combined else place
        before, after = load_file(build() / place / path.name), load_file(path)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor.half() if tensor.is_floating_point() else tensor), name


@pytest.mark.parametrize("build", [karlo, kandinsky_21_combined, stable_unclip])
def test_half_precision_and_variants_of_public_models_come_back_from_this_projects_layout(
    build: Callable[[], Path], tmp_path: Path
):
    ours = convert_folder(str(build()), tmp_path / "ours", fp16=True)
    half = Text2ImagePipeline.from_pretrained(ours)
    assert dtypes(half) == {torch.float16} == dtypes(Text2ImagePipeline.from_pretrained(ours, dtype="auto"))
    assert dtypes(Text2ImagePipeline.from_pretrained(ours, dtype=torch.float32)) == {torch.float32}
    half.save_pretrained(tmp_path / "half", variant="fp16")
    files = [path.name for path in (tmp_path / "half").rglob("*.safetensors")]
    assert files and all(".fp16." in name for name in files)
    again = Text2ImagePipeline.from_pretrained(tmp_path / "half", variant="fp16")
    assert dtypes(again) == {torch.float16}
    for name, part in models(half).items():
        for key, tensor in part.state_dict().items():
            assert torch.equal(models(again)[name].state_dict()[key], tensor), key


def models(pipeline: Text2ImagePipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def dtypes(pipeline: Text2ImagePipeline) -> set[torch.dtype]:
    return {one.dtype for part in models(pipeline).values() for one in part.parameters() if one.is_floating_point()}


def test_models_that_were_trained_here_load_in_fp32_unless_they_are_asked_as_stored(
    pipeline_folder: Path, tmp_path: Path
):
    Text2ImagePipeline.from_pretrained(pipeline_folder, dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert dtypes(Text2ImagePipeline.from_pretrained(tmp_path, variant="fp16")) == {torch.float32}
    assert dtypes(Text2ImagePipeline.from_pretrained(tmp_path, variant="fp16", dtype="auto")) == {torch.float16}
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {"diffusion_pytorch_model.fp16.safetensors"}


@pytest.mark.parametrize("variant", ["bf16", "fp1", "../x", 3])
def test_a_variant_that_no_part_has_is_refused(variant: object, pipeline_folder: Path, tmp_path: Path):
    said = "must be a plain name" if variant in ("../x", 3) else "has the variant.*the variants are fp16"
    public = Path(shutil.copytree(karlo(), tmp_path / "public"))
    shutil.copy(public / "prior" / WEIGHTS, public / "prior" / "diffusion_pytorch_model.fp16.safetensors")
    ours = Path(shutil.copytree(pipeline_folder, tmp_path / "ours"))
    shutil.copy(ours / "prior" / WEIGHTS, ours / "prior" / "diffusion_pytorch_model.fp16-00001-of-00001.safetensors")
    for folder in (public, ours):
        with pytest.raises(InputError, match=said):
            Text2ImagePipeline.from_pretrained(folder, variant=variant)
    Text2ImagePipeline.from_pretrained(public, variant="fp16")
