"""Which public layout a folder is, what is refused of it, and that what it holds is drawn with."""

import inspect
import json
from pathlib import Path

import diffusers
import pytest

from t2i.errors import InputError
from t2i.interop.folders import SourceFolder
from t2i.interop.layouts import LAYOUTS, LAYOUTS_BY_CLASS

PIPELINES = [name for name in LAYOUTS_BY_CLASS if name.endswith("Pipeline")]


def index_only(folder: Path, **entries: object) -> Path:
    (folder / "model_index.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_of_diffusers_is_recognised_and_has_the_parts_that_its_class_takes(
    name: str, tmp_path: Path
) -> None:
    layout = SourceFolder(index_only(tmp_path, _class_name=name)).require_layout()
    assert name in layout.classes
    taken = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert set(layout.part_folders.values()) <= set(taken)


def test_a_prior_alone_is_recognised_by_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "PriorTransformer"}')
    assert SourceFolder(tmp_path).require_layout().name == "prior-transformer"


def test_an_unknown_layout_is_refused_with_what_was_found_and_all_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is of 'Kandinsky3Pipeline'") as refused:
        SourceFolder(index_only(tmp_path, _class_name="Kandinsky3Pipeline")).require_layout()
    assert all(layout.name in str(refused.value) for layout in LAYOUTS)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "weights.txt").touch()
    with pytest.raises(InputError, match="has neither a model_index.json nor a config.json, but weights.txt"):
        SourceFolder(tmp_path).require_layout()


@pytest.mark.parametrize("where", ["model_index.json", "config.json"])
def test_remote_code_is_refused(where: str, tmp_path: Path) -> None:
    (tmp_path / where).write_text('{"_class_name": "PriorTransformer", "auto_map": {"AutoModel": "model.Model"}}')
    with pytest.raises(InputError, match="has 'auto_map'; only this project's own code is run"):
        SourceFolder(tmp_path).require_layout()
