"""Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from t2i.errors import InputError
from t2i.files.untrusted import is_folder

HUB_TIMEOUT = 4.0  # seconds that the hub may take to answer


def query_hub_repository(
    name: str, revision: str | None = None, token: str | bool | None = None
) -> tuple[dict[str, Any], set[str] | None]:
    """Options of `snapshot_download`, which waits without end for a hub that does not answer: then the cache alone.

    And the names of the repository's files; None where the hub does not say.
    """
    if constants.HF_HUB_OFFLINE:
        return {}, None
    try:
        found = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT, token=token)
    except (HfHubHTTPError, HFValidationError):
        return {}, None  # an answer
    except Exception:  # the client's own errors differ between versions of the hub's library
        return {"local_files_only": True}, None
    return {}, None if found.siblings is None else {file.rfilename for file in found.siblings}


@contextmanager
def explain_hub_errors(name: str) -> Iterator[None]:
    """What the hub's library raises, in one line. Raises InputError, too, for the name of a file."""
    try:
        if Path(name).exists():
            raise InputError(f"{name!r} is a file; give the folder of a model")
        yield
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"no folder {name!r:.200}, and no such model on the hub, or no hub ({error})") from error


def find_or_download_folder(name: str | Path, patterns: list[str]) -> Path:
    """A folder; or, if there is none of this name, what matches `patterns` in the hub's repository of that name."""
    if is_folder(name):
        return Path(name)
    with explain_hub_errors(str(name)):
        return Path(snapshot_download(str(name), allow_patterns=patterns, **query_hub_repository(str(name))[0]))
