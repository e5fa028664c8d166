"""Write files and folders that appear under their name only when they are complete."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError

from t2i.errors import InputError
from t2i.files.file_systems import REFUSED_ERRORS, UNSUPPORTED_ERRORS, tolerate_missing


def compute_file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def create_folder_atomically(final: Path) -> Iterator[Path]:
    """Yield a folder to write into; at the end it becomes `final`, and after an error it is removed."""
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
    """Rename a finished folder to `final`, after all its files are on disk."""
    for path in [*unfinished.rglob("*"), unfinished]:
        if path.is_file():
            apply_umask(path)
        sync_to_disk(path)
    # A folder cannot be replaced by a rename. An older one keeps a second name until the new one is in its place.
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


@contextmanager
def create_file_atomically(final: Path) -> Iterator[Path]:
    """Yield a path to write to; at the end its file replaces `final`, and after an error it is removed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with create_unfinished_file(final.parent) as unfinished:
        yield unfinished
        apply_umask(unfinished)
        sync_to_disk(unfinished)
        os.replace(unfinished, final)
        sync_to_disk(final.parent)


@contextmanager
def create_unfinished_file(folder: Path) -> Iterator[Path]:
    """Yield a hidden path in `folder` to write to. Its file is removed at the end, unless it was renamed."""
    unfinished = folder / f".t2i-{os.getpid()}-{secrets.token_hex(4)}.unfinished"
    try:
        yield unfinished
    finally:
        unfinished.unlink(missing_ok=True)


def write_json_file(path: Path, content: dict[str, Any]) -> None:
    write_bytes_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    with create_file_atomically(path) as unfinished:
        unfinished.write_bytes(content)


def write_new_file(folder: Path, names: Iterable[str], content: bytes) -> Path | None:
    """Write a file under the first of `names` that is free, and return its path; None if all names are taken.

    Safe while other processes write to the same folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with create_unfinished_file(folder) as unfinished:
        unfinished.write_bytes(content)
        for name in names:
            with suppress(FileExistsError):
                rename_to_new(unfinished, folder / name)
                return folder / name
    return None


def rename_to_new(unfinished: Path, final: Path) -> None:
    """Give a file a second name. Raises FileExistsError if there is a file of this name."""
    # Unlike a rename, a link never replaces a file.
    with tolerate_missing("a crash may leave an empty file in place of a new one", REFUSED_ERRORS):
        os.link(unfinished, final)
        return
    # Whoever creates the empty file owns the name, and may replace it.
    os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        os.replace(unfinished, final)
    except BaseException:
        final.unlink(missing_ok=True)
        raise


def apply_umask(path: Path) -> None:
    """Give a file the permissions of a new one. safetensors makes its files private."""
    mask = os.umask(0)
    os.umask(mask)
    with tolerate_missing("files keep the permissions that their folder gives them", REFUSED_ERRORS):
        path.chmod(0o666 & ~mask)


def sync_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    # A folder that may be written to need not be readable, and on Windows none can be opened.
    errors = REFUSED_ERRORS | {errno.EBADF, errno.EISDIR} if path.is_dir() else UNSUPPORTED_ERRORS
    with tolerate_missing("after a power failure the newest files may be missing", errors):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def raise_as_oserror() -> Iterator[None]:
    """Raise safetensors' errors, such as for a full disk, as OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def check_writable_folder(folder: Path) -> None:
    """Raise InputError for a folder that cannot be written or made. Leaves nothing behind."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if parent == folder and not folder.is_dir():
        return  # a file, which the caller refuses in its own words
    try:
        with TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"output={str(folder)!r} cannot be written ({error}); give another folder") from error
