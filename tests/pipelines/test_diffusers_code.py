"""Saved folders carry code by which plain diffusers draws with them; our own loading never runs it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from t2i.pipelines.folder import PIPELINE_NAMES
from torch.testing import assert_close

import t2i
from t2i.errors import InputError
from tests.helpers.pipelines import Case, for_all, list_models, pipe, tiny_upsampler  # noqa: F401


@for_all()
def test_diffusers_loads_a_saved_folder_as_the_class_that_was_saved(case: Case, pipe, tmp_path):  # noqa: F811
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is case.kind
    for name, model in list_models(pipe).items():
        assert_close(dict(loaded.components[name].state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path)
    if case.name == "Text2ImagePipeline":
        assert torch.equal(case.run(loaded), case.run(pipe))


@for_all()
def test_our_own_loading_never_runs_the_code_of_a_folder(case: Case, pipe, tmp_path):  # noqa: F811
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "pipeline.py").is_file()
    (tmp_path / "pipeline.py").write_text(f"open({str(tmp_path / 'the code ran')!r}, 'w')\nraise SystemExit")
    loaded = case.kind.from_pretrained(tmp_path)
    assert type(loaded) is case.kind
    assert not (tmp_path / "the code ran").exists()
    # The same with an argument that only diffusers' own loading handles
    if case.name in PIPELINE_NAMES:
        case.kind.from_pretrained(tmp_path, low_cpu_mem_usage=True, trust_remote_code=True)
    assert not (tmp_path / "the code ran").exists()


def test_folders_of_older_versions_load(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "Text2ImagePipeline"]
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "Text2ImagePipeline"}))
    (tmp_path / "pipeline.py").unlink()
    t2i.Text2ImagePipeline.from_pretrained(tmp_path)


def test_a_subclass_is_saved_as_the_public_class_that_it_is_a_kind_of(pipeline, tmp_path):
    class Mine(t2i.Text2ImagePipeline):
        pass

    Mine.from_pipe(pipeline).save_pretrained(tmp_path)
    assert type(t2i.Text2ImagePipeline.from_pretrained(tmp_path)) is t2i.Text2ImagePipeline
    assert type(DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)) is t2i.Text2ImagePipeline


@pytest.mark.parametrize("own", [["pipeline", "KandinskyV22Pipeline"], ["pipeline", "Evil"], ["other", "Evil"]])
def test_a_folder_whose_class_is_code_of_its_own_is_refused(own, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": own}))
    with pytest.raises(InputError, match=own[1]):
        t2i.Text2ImagePipeline.from_pretrained(tmp_path)


def test_the_shipped_model_carries_the_code_that_saving_writes(pipeline, tmp_path):
    shipped = Path(t2i.__file__).parents[1] / "models" / "emoji"
    pipeline.save_pretrained(tmp_path)
    assert (shipped / "pipeline.py").read_text() == (tmp_path / "pipeline.py").read_text()
