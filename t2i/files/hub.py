"""Ask the hub for a repository without waiting for it, and explain its errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from t2i.errors import InputError
from t2i.files.untrusted import is_folder

HUB_TIMEOUT = 4.0  # seconds for the hub's first answer


def query_hub_repository(
    name: str, revision: str | None = None, token: str | bool | None = None
) -> tuple[dict[str, Any], set[str] | None]:
    """Return options for `snapshot_download`, and the names of the repository's files, None if the hub lists none.

    `snapshot_download` waits without end for a hub that does not answer. In that case the options restrict it to the
    cache.
    """
    if constants.HF_HUB_OFFLINE:
        return {}, None
    try:
        info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT, token=token)
    except (HfHubHTTPError, HFValidationError):
        return {}, None  # the hub has answered
    except Exception:  # the classes of connection errors differ between versions of the library
        return {"local_files_only": True}, None
    return {}, None if info.siblings is None else {file.rfilename for file in info.siblings}


@contextmanager
def explain_hub_errors(name: str) -> Iterator[None]:
    """Raise errors of the hub's library as InputError, in one line. Raises InputError, too, for the name of a file."""
    try:
        if Path(name).exists():
            raise InputError(f"{name!r} is a file; give the folder of a model")
        yield
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"no folder {name!r:.200}, and no such model on the hub, or no hub ({error})") from error


def find_or_download_folder(name: str | Path, patterns: list[str]) -> Path:
    """Return the folder of this name; without one, download the files of the hub's repository that match `patterns`."""
    if is_folder(name):
        return Path(name)
    with explain_hub_errors(str(name)):
        return Path(snapshot_download(str(name), allow_patterns=patterns, **query_hub_repository(str(name))[0]))
