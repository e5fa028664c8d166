"""File systems that lack an operation: nothing is lost, and it is said once."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from accelerate import PartialState
from t2i.training.common.state import lock_folder

from t2i.errors import InputError
from t2i.files import file_systems
from t2i.files.atomic import create_folder_atomically, write_bytes_atomically, write_new_file
from t2i.files.file_systems import measure_free_bytes


@pytest.fixture(autouse=True)
def forget_reports():
    file_systems.report_once.cache_clear()


def fail_with(number: int):
    def fail(*arguments: object, **options: object):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links_a_new_file_is_written_and_never_replaces_another(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(os, "link", fail_with(number))
    (tmp_path / "a.png").write_bytes(b"mine")
    names = ["a.png", "b.png", "c.png"]
    paths = [write_new_file(tmp_path, names, content) for content in (b"first", b"second", b"third")]
    assert paths == [tmp_path / "b.png", tmp_path / "c.png", None]
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {"a.png": b"mine", "b.png": b"first", "c.png": b"second"}
    assert len(caplog.records) == 1 and "lacks an operation" in caplog.text


def test_without_hard_links_a_failure_leaves_no_empty_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    monkeypatch.setattr(os, "replace", fail_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_new_file(tmp_path, ["a.png"], b"content")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_missing_operation(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", fail_with(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        write_new_file(tmp_path, ["a.png"], b"content")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_written_all_the_same(tmp_path, monkeypatch, caplog, number):
    sync = os.fsync

    def sync_files_alone(descriptor: int) -> None:
        if os.path.isdir(f"/dev/fd/{descriptor}"):
            fail_with(number)()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_alone)
    write_bytes_atomically(tmp_path / "a.json", b"{}")
    with create_folder_atomically(tmp_path / "model") as folder:
        (folder / "weights").write_bytes(b"1")
    assert (tmp_path / "a.json").read_bytes() == b"{}" and (tmp_path / "model/weights").read_bytes() == b"1"
    assert len(caplog.records) == 1


def test_a_file_that_does_not_reach_the_disk_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_bytes_atomically(tmp_path / "a.json", b"{}")
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_permissions_keeps_the_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Path, "chmod", fail_with(errno.EPERM))
    for name in ("a", "b"):
        write_bytes_atomically(tmp_path / name, b"1")
    assert (tmp_path / "b").read_bytes() == b"1" and len(caplog.records) == 1


@pytest.mark.skipif(file_systems.fcntl is None, reason="no locks of this kind")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_training_goes_on_without_locks(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(file_systems.fcntl, "lockf", fail_with(number))
    for _ in range(2):
        with lock_folder(PartialState(), tmp_path):
            assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
    assert len(caplog.records) == 1 and "two runs" in caplog.text


@pytest.mark.skipif(file_systems.fcntl is None, reason="no locks of this kind")
def test_a_lock_that_another_process_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(file_systems.fcntl, "lockf", fail_with(errno.EAGAIN))
    with pytest.raises(InputError, match="is locked by"), lock_folder(PartialState(), tmp_path):
        pass


def test_a_disk_of_unknown_size_is_not_full(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    assert measure_free_bytes(tmp_path) <= usage.total
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(0, 0, 0))
    assert measure_free_bytes(tmp_path) > 10**15
