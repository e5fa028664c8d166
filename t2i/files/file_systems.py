"""Operations that some file systems lack: exFAT, network folders, FUSE. Work goes on without them.

A missing operation costs safety, not data, so it is reported once and left out.
"""

import errno
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# A file system that lacks an operation raises these. A full or broken disk has other numbers.
UNSUPPORTED_ERRORS = frozenset(
    getattr(errno, name) for name in ("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK") if hasattr(errno, name)
)
REFUSED_ERRORS = UNSUPPORTED_ERRORS | {errno.EPERM, errno.EACCES}  # where permission is no matter of the user


@contextmanager
def tolerate_missing(loss: str, errors: frozenset[int] = UNSUPPORTED_ERRORS) -> Iterator[None]:
    """Suppress the OSError of a file system that lacks an operation, and report `loss` once."""
    try:
        yield
    except OSError as error:
        if error.errno not in errors:
            raise
        report_once(loss, error.strerror or str(error))


@cache
def report_once(loss: str, reason: str) -> None:
    logger.warning("the file system lacks an operation (%s): %s", reason, loss)


def lock_file(file: IO[str]) -> bool:
    """Lock an open file for this process until it is closed; return False if another process has locked it.

    The system releases the lock when the process ends, also by SIGKILL. Without locks, True.
    """
    if fcntl is None:
        return True
    try:
        with tolerate_missing("two runs in one folder are not noticed; start only one"):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def measure_free_bytes(folder: str | Path) -> int:
    """Return the free bytes of a folder's disk; a number without limit where the file system reports no size."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else sys.maxsize
