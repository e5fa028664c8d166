"""The card of an assembled pipeline has what its run left behind, and can be pushed as it is."""

import json
import re
import shutil
from pathlib import Path

import pytest
from t2i.pipelines.jobs.assemble import assemble_pipeline_folder
from t2i.pipelines.jobs.model_card import CardFacts, StageRecord
from t2i.pipelines.jobs.push import plan_upload

from t2i.errors import InputError
from t2i.files.publishing import read_card


def test_the_card_has_data_steps_losses_and_the_licence_that_is_given(runs, shapes, tmp_path):
    facts = CardFacts("cc-by-4.0", ("someone/shapes",))
    folder = assemble_pipeline_folder(runs, tmp_path / "model", facts=facts)
    text, front = read_card(folder)
    assert front == {
        "license": "cc-by-4.0",
        "library_name": "t2i",
        "pipeline_tag": "text-to-image",
        "tags": ["unclip", "text-to-image"],
        "datasets": ["someone/shapes"],
    }
    assert "`shapes`: 32 images to train on and 4 held out, with 36 captions. 0 samples were left out." in text
    last = json.loads((runs / "prior" / "metrics.jsonl").read_text().splitlines()[-1])
    row = next(line for line in text.splitlines() if line.startswith("| prior | Prior |"))
    assert row.split(" | ")[3] == "3 x 8"
    assert f"loss {last['loss']:.4g}" in row and f"cosine {last['cosine']:.4g}" in row
    assert str(runs) not in text and str(tmp_path) not in text  # no path of this machine
    compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "card", "exec")
    assert b"someone/model" in plan_upload(folder, "someone/model").files["README.md"]


def test_a_run_without_log_checkpoints_and_data_has_a_card_too(runs, tmp_path):
    for stage in ("clip", "autoencoder", "prior", "decoder"):
        shutil.copytree(runs / stage / "model", tmp_path / "runs" / stage / "model")
    for stage in ("prior", "decoder"):
        shutil.copytree(runs / stage / "scheduler", tmp_path / "runs" / stage / "scheduler")
    text, front = read_card(assemble_pipeline_folder(tmp_path / "runs", tmp_path / "model"))
    assert front["license"] == "unknown" and "datasets" not in front
    assert "## Data\n\nNot known.\n" in text
    assert "| taken over |" in text


def test_a_stage_s_record_survives_a_line_that_was_cut(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5, "memory_gb": 1}\n{"st')
    assert StageRecord.read_folder(tmp_path) == StageRecord(2, None, {}, {"loss": 1.5})


@pytest.mark.parametrize("wrong", [{"license": "My Own"}, {"license": ""}, {"datasets": ("shapes",)}])
def test_facts_that_the_hub_would_not_take_are_refused(wrong):
    with pytest.raises(InputError):
        CardFacts(**wrong)
