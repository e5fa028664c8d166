"""A checkpoint is the new one or the older one, never a mixture and never none, wherever the process dies."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from t2i.training.common.checkpoint import Checkpoint, find_newest_checkpoint, load_checkpoint, save_checkpoint

from t2i.files.atomic import compute_file_sha256
from tests.faults.test_checkpoint_faults import die_at_call, in_child
from tests.helpers.stages import train

# What commit 9b39f46 wrote into checkpoints of configs/tiny, by stage: state.json, and the shapes of all tensors
BEFORE = json.loads(Path(__file__).with_name("checkpoints_of_9b39f46.json").read_text())


def save(folder: Path, step: int, keep: int = 1) -> None:
    group = {"a": torch.full((5,), float(step)), "b": torch.full((2, 2), float(step))}
    save_checkpoint(folder, step, {"model": group, "ema": group}, {"note": f"of step {step}"}, keep)


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    path, problems = find_newest_checkpoint(folder)
    return path and load_checkpoint(path), problems


def killed_at(call: int, folder: Path) -> bool:
    """Save step 2 in a child that dies at the n-th call; whether it did."""

    def action() -> None:
        die_at_call(call)
        save(folder, 2)

    return in_child(action)


def test_a_save_killed_anywhere_leaves_a_whole_checkpoint(tmp_path):
    deaths = 0
    for call in range(1, 200):
        folder = tmp_path / str(call)
        save(folder, 1)
        killed = killed_at(call, folder)
        checkpoint, problems = load_latest(folder)
        assert checkpoint is not None and not problems
        step = checkpoint.state["step"]
        assert step in (1, 2) and checkpoint.state["note"] == f"of step {step}"
        for group in checkpoint.tensors.values():
            assert all((value == step).all() for value in group.values())
        if not killed:
            assert step == 2
            break
        deaths += 1
        save(folder, 3)  # and what the dead left behind is in nobody's way
        assert load_latest(folder)[0].state["step"] == 3
        assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert deaths > 10


def test_damage_of_any_file_is_found_and_the_older_checkpoint_loads(tmp_path):
    for name in ("model.safetensors", "ema.safetensors", "state.json", "manifest.json"):
        folder = tmp_path / name
        save(folder, 1, keep=2)
        save(folder, 2, keep=2)
        (folder / "step-00000002" / name).unlink()
        checkpoint, problems = load_latest(folder)
        assert checkpoint.state["step"] == 1 and len(problems) == 1 and "step-00000002" in problems[0]


def test_older_checkpoints_are_pruned(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("stage", list(BEFORE))
def test_a_checkpoint_of_before_the_new_layout_of_the_code_is_resumed(stage, shapes, runs, tmp_path, capsys):
    """That of today, with the state.json of then; only the identities of data and models are those of this test."""
    shutil.copytree(runs / stage, tmp_path / stage)
    path, _ = find_newest_checkpoint(tmp_path / stage / "checkpoints")
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    shapes_now = {file: {name: list(value.shape) for name, value in group.items()} for file, group in tensors.items()}
    assert shapes_now == BEFORE[stage]["tensors"]
    identities = json.loads((path / "state.json").read_text())["made_from"]
    state = BEFORE[stage]["state"]
    assert identities.keys() == state["made_from"].keys() and path.name == f"step-{state['step']:08}"
    (path / "state.json").write_text(json.dumps({**state, "made_from": identities}))
    manifest = {file.name: compute_file_sha256(file) for file in path.iterdir() if file.name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    parts = {part: runs / part for part in ("clip", "autoencoder") if part in identities}
    train(stage, shapes, tmp_path, state["step"] + 1, **parts)
    assert f"resuming from {path}" in capsys.readouterr().out
