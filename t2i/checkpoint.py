"""Checkpoints that are whole or absent: safetensors and JSON, listed with their hashes, moved into place at the end."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module

from t2i import __version__
from t2i.errors import InputError
from t2i.untrusted import SCHEDULERS, check_finite, check_model, check_scheduler, described, is_folder, read_json
from t2i.weights import read_model

MANIFEST = "manifest.json"
EXACT = (torch.float32, torch.float16)  # dtypes that keep what a fingerprint is made from
FIRST = 1024  # values of a tensor, that a brief digest reads
FORMAT = 1  # of checkpoints; a newer one is refused

Loaded = TypeVar("Loaded")


@dataclass
class Checkpoint:
    path: Path
    tensors: dict[str, dict[str, Tensor]]  # by file: "model" -> {name: tensor}, mapped from the files
    state: dict[str, Any]  # JSON: the step, the configuration, ...


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> list[str]:
    """Write `folder/step-NNNNNNNN` so that a crash at any point leaves the older checkpoints as they were.

    Older ones than the last `keep`, and what crashed saves left behind, are deleted at the end; returns what could not
    be. Raises OSError if the new one cannot be written: nothing of it stays, and nothing else changes.
    """
    final = folder / f"step-{step:08}"
    with new_folder(final) as unfinished:
        for name, group in tensors.items():
            contiguous = {key: tensor.contiguous() for key, tensor in group.items()}
            with as_oserror():
                save_file(contiguous, unfinished / f"{name}.safetensors")
        state = {"format": FORMAT, "version": __version__, "step": step, **state}
        (unfinished / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {path.name: digest(path) for path in sorted(unfinished.iterdir())}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
    older = [path for path in complete(folder) if path.name <= final.name]
    leftovers = [path for suffix in ("unfinished", "replaced") for path in folder.glob(f"step-*.{suffix}")]
    problems: list[str] = []
    for path in [*older[:-keep], *leftovers]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            problems.append(f"{path} cannot be deleted ({error})")
    return problems


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one."""
    problems: list[str] = []
    for path in reversed(complete(folder)):
        if problem := verify(path):
            problems.append(problem)
            continue
        return path, problems
    return None, problems


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that verifies."""
    names = [name for name in json.loads((path / MANIFEST).read_text()) if name.endswith(".safetensors")]
    tensors = {Path(name).stem: load_file(path / name) for name in names}
    return Checkpoint(path, tensors, json.loads((path / "state.json").read_text()))


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Raises InputError if it was written by a newer version."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if "state.json" not in manifest:
            return f"{path / MANIFEST} does not list state.json"
        for name, expected in manifest.items():
            if Path(name).name != name:
                return f"{path / MANIFEST} lists {name!r}, which is not a file beside it"
            if (found := digest(path / name)) != expected:
                return f"{path / name} does not match its SHA-256: {found} instead of {expected}"
        state = json.loads((path / "state.json").read_text())
        if complete_name(path.name) != state["step"]:
            return f"{path} holds step {state['step']}, another than its name says"
        if state["format"] > FORMAT:
            raise InputError(f"{path} was written by t2i {state['version']}, this is {__version__}; install that")
    except InputError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        return f"{path} is not a whole checkpoint ({type(error).__name__}: {error})"
    return None


def complete(folder: Path) -> list[Path]:
    """Checkpoint folders that were moved into place, oldest first."""
    return sorted(path for path in folder.glob("step-*") if complete_name(path.name) is not None)


def complete_name(name: str) -> int | None:
    """The step that a checkpoint's name tells."""
    number = name.removeprefix("step-")
    return int(number) if number.isdecimal() else None


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `final` at the end, or is gone if anything fails."""
    unfinished = final.with_name(f"{final.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        publish(unfinished, final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def publish(unfinished: Path, final: Path) -> None:
    """Put a finished folder in its place: everything on disk first, then one rename, then the parent on disk.

    A folder already there is moved aside until the new one stands. Files get the permissions that the user's umask
    gives (safetensors makes them private).
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in [*unfinished.rglob("*"), unfinished]:
        if path.is_file():
            path.chmod(0o666 & ~mask)
        sync(path)
    aside = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    try:
        os.rename(unfinished, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def export_model(model: Any, folder: Path, name: str = "model") -> None:
    """Save a diffusers model or scheduler as `folder/name`, whole or not at all, replacing an older one."""
    with new_folder(folder / name) as unfinished, as_oserror():
        model.save_pretrained(unfinished)


@contextmanager
def as_oserror() -> Iterator[None]:
    """safetensors says in its own way that a disk is full."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def load_model(classes: Any, folder: str | Path) -> Any:
    """A model that `export_model` saved in a run's folder, or a folder that is a model itself.

    Of several classes, the one that the folder's config.json names. Raises InputError, in one line, if the model is
    missing, incomplete, truncated, not finite or of another class; see `t2i.untrusted` for what else.
    """
    path = Path(folder)
    # The second, if a process died while it replaced the first.
    path = next((path / part for part in ("model", "model.replaced") if is_folder(path / part)), path)
    known = {one.__name__: one for one in (classes if isinstance(classes, tuple) else (classes,))}
    wanted = " or ".join(known)
    name = class_name(path) if is_folder(path) else None
    if name is None:
        raise InputError(f"no trained {wanted} in {str(folder)!r}, it has no config.json; train that stage first")
    if name not in known:
        raise InputError(f"{str(path)!r} holds a {name:.80}; it must be a {wanted}")
    check_model(known[name], path, Path(folder))
    model = loaded(lambda folder: read_model(known[name], folder), path)
    check_finite(model, path)
    return model


def load_scheduler(folder: Path, root: Path | None = None) -> SchedulerMixin:
    """The scheduler that a prior or a decoder was trained with: of the class that its file names, of diffusers or ours.

    root: of the pipeline, which links may lead into.
    """
    check_scheduler(folder, root=root)
    name = read_json(folder / "scheduler_config.json").get("_class_name", DDIMScheduler.__name__)
    home = next((home for home, names in SCHEDULERS.items() if name in names), "diffusers")
    check_scheduler(folder, name, root, home)
    return loaded(getattr(import_module(home), name).from_pretrained, folder)


def weights_digest(model: Module, more: str = "") -> str:
    """16 hexadecimal digits for a model's weights (and some text), the same in fp32 and fp16."""
    return tensors_digest(model.state_dict(), more)


def brief_digest(models: Mapping[str, Module | None], more: str = "") -> str:
    """16 hexadecimal digits for the weights of models by name (and some text): for the names, the shapes and the first
    `FIRST` values of their tensors, as float32. Cheap for large ones, of which little is read; the same wherever they
    are."""
    hasher = hashlib.sha256(more.encode())
    for part, model in models.items():
        weights = {} if model is None else {name: one for name, one in model.state_dict().items() if not one.is_meta}
        hasher.update(repr([part, [(name, tuple(one.shape)) for name, one in weights.items()]]).encode())
        first = [one.reshape(-1)[:FIRST].float() for one in weights.values()]
        if first:
            hasher.update(torch.cat(first).cpu().numpy().tobytes())
    return hasher.hexdigest()[:16]


def described_schedulers(components: Mapping[str, object]) -> str:
    """What the configurations of a pipeline's schedulers say, as JSON; not where they lie or what read them."""
    said = {
        name: {"class": type(one).__name__} | {key: value for key, value in one.config.items() if key[0] != "_"}
        for name, one in components.items()
        if isinstance(one, SchedulerMixin)
    }
    return json.dumps(said, sort_keys=True)


def stored_digest(folder: Path) -> str:
    """`weights_digest` of the model saved in a folder, without building it."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= loaded(load_file, path)
    return tensors_digest(tensors)


def files_digest(folder: Path, patterns: Iterable[str]) -> str:
    """16 hexadecimal digits for the names and bytes of the files in a folder that match any of `patterns`."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    found = {path.relative_to(folder).as_posix(): digest(path) for path in paths}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def tensors_digest(tensors: dict[str, Tensor], more: str = "") -> str:
    hasher = hashlib.sha256(more.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().half().reshape(-1).numpy())
    return hasher.hexdigest()[:16]


def check_fingerprint(model: Any, folder: Path) -> None:
    """Refuse a loaded model whose weights are not those of the fingerprint in its configuration.

    One in a dtype that does not keep them is `rounded`: it cannot be compared, now or later.
    """
    expected = model.config.fingerprint
    if model.dtype not in EXACT:
        model.register_to_config(rounded=True)
    elif expected and not model.config.rounded and model.fingerprint() != expected:
        raise InputError(f"the weights in {str(folder)!r} are not those of fingerprint {expected} in its config")


def class_name(folder: Path) -> str | None:
    """The class that a model folder's config.json names; None if it has no such file."""
    path = folder / "config.json"
    return str(read_json(path).get("_class_name")) if path.exists() else None


def loaded(load: Callable[[Path], Loaded], path: Path) -> Loaded:
    """`load(path)`, with what can be wrong with the folder said in one line."""
    try:
        return load(path)
    except InputError:
        raise
    except Exception as error:  # whatever a library makes of a damaged file
        raise InputError(f"{str(path)!r} does not load: {described(error)}") from error
