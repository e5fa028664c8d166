"""Checkpoints that are whole or absent: safetensors and JSON, listed with SHA-256, renamed into place at the end."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i import __version__
from t2i.errors import InputError
from t2i.files.atomic import compute_file_sha256, create_folder_atomically, raise_as_oserror

CHECKPOINT_MANIFEST = "manifest.json"
FORMAT_VERSION = 1  # of checkpoints; a newer version is refused


@dataclass
class Checkpoint:
    """The content of a checkpoint folder."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]  # by file: "model" -> {name: tensor}, memory-mapped
    state: dict[str, Any]  # JSON: the step, the configuration, ...


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> list[str]:
    """Write `folder/step-NNNNNNNN` so that a crash at any point leaves the older checkpoints as they were.

    At the end, all but the newest `keep` checkpoints are deleted, and so are the remains of crashed saves. Returns a
    message for each that could not be deleted. Raises OSError, with nothing changed, if writing fails.
    """
    # Write files, then their hashes, then rename the folder
    final = folder / f"step-{step:08}"
    with create_folder_atomically(final) as unfinished:
        for name, group in tensors.items():
            contiguous = {key: tensor.contiguous() for key, tensor in group.items()}
            with raise_as_oserror():
                save_file(contiguous, unfinished / f"{name}.safetensors")
        state = {"format": FORMAT_VERSION, "version": __version__, "step": step, **state}
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {path.name: compute_file_sha256(path) for path in sorted(unfinished.iterdir())}
        (unfinished / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest, indent=1))
    # Delete only after the rename
    older = [path for path in find_checkpoints(folder) if path.name <= final.name]
    leftovers = [path for suffix in ("unfinished", "replaced") for path in folder.glob(f"step-*.{suffix}")]
    problems: list[str] = []
    for path in [*older[:-keep], *leftovers]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            problems.append(f"{path} cannot be deleted ({error})")
    return problems


def find_newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and a message about each newer one."""
    problems: list[str] = []
    for path in reversed(find_checkpoints(folder)):
        if problem := verify_checkpoint(path):
            problems.append(problem)
            continue
        return path, problems
    return None, problems


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint that `verify_checkpoint` has accepted."""
    names = [name for name in json.loads((path / CHECKPOINT_MANIFEST).read_text()) if name.endswith(".safetensors")]
    tensors = {Path(name).stem: load_file(path / name) for name in names}
    return Checkpoint(path, tensors, json.loads((path / "state.json").read_text()))


def verify_checkpoint(path: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None. Raises InputError if a newer version wrote it."""
    try:
        manifest = json.loads((path / CHECKPOINT_MANIFEST).read_text())
        if "state.json" not in manifest:
            return f"{path / CHECKPOINT_MANIFEST} does not list state.json"
        for name, expected in manifest.items():
            if Path(name).name != name:
                return f"{path / CHECKPOINT_MANIFEST} lists {name!r}, which is not a file beside it"
            actual = compute_file_sha256(path / name)
            if actual != expected:
                return f"{path / name} does not match its SHA-256: {actual} instead of {expected}"
        # A folder that was renamed by hand would resume at another step than the one in its name.
        state = json.loads((path / "state.json").read_text())
        if parse_checkpoint_step(path.name) != state["step"]:
            return f"{path} contains step {state['step']}, which is not the step in its name"
        if state["format"] > FORMAT_VERSION:
            raise InputError(
                f"{path} was written by t2i {state['version']}, this is {__version__}; install that version"
            )
    except InputError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        return f"{path} is not a whole checkpoint ({type(error).__name__}: {error})"
    return None


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders that were renamed into place, oldest first."""
    return sorted(path for path in folder.glob("step-*") if parse_checkpoint_step(path.name) is not None)


def parse_checkpoint_step(name: str) -> int | None:
    """Return the step in a checkpoint's name; None for another name."""
    number = name.removeprefix("step-")
    return int(number) if number.isdecimal() else None
