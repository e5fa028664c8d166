"""Files and folders whole or absent."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError

from t2i.errors import InputError


def compute_file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def create_folder_atomically(final: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `final` at the end, or is gone if anything fails."""
    unfinished = final.with_name(f"{final.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        publish_folder(unfinished, final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def publish_folder(unfinished: Path, final: Path) -> None:
    """Put a finished folder in its place: everything on disk first, then one rename, then the parent on disk.

    A folder already there is moved aside until the new one stands. Files get the permissions that the user's umask
    gives (safetensors makes them private).
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in [*unfinished.rglob("*"), unfinished]:
        if path.is_file():
            path.chmod(0o666 & ~mask)
        sync_to_disk(path)
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
    sync_to_disk(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def raise_as_oserror() -> Iterator[None]:
    """safetensors says in its own way that a disk is full."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def check_writable_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written or made; leaves nothing."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if parent == folder and not folder.is_dir():
        return  # a file, which `refuse_another` names
    try:
        with TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"output={str(folder)!r} cannot be written ({error}); give another folder") from error


def write_json_file(path: Path, content: dict[str, Any]) -> None:
    with create_file_atomically(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def create_file_atomically(final: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `final` at the end, or is gone if anything fails."""
    unfinished = final.with_name(f".{final.name}.{os.getpid()}.unfinished")
    mask = os.umask(0)
    os.umask(mask)
    try:
        yield unfinished
        unfinished.chmod(0o666 & ~mask)  # safetensors makes files private
        sync_to_disk(unfinished)
        os.replace(unfinished, final)
        sync_to_disk(final.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all, in place of an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        sync_to_disk(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
