"""A checkpoint is the new one or the older one, never a mixture and never none, wherever the process dies."""

from pathlib import Path

import torch
from t2i.training.common.checkpoint import Checkpoint, find_newest_checkpoint, load_checkpoint, save_checkpoint

from tests.faults.test_checkpoint_faults import die_at_call, in_child


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
