"""Publish a model folder on the hub: the job of `t2i push`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from t2i.pipelines.calls.components import CODE_TEMPLATE
from t2i.pipelines.folder import COMPONENT_CLASSES, PipelineFolder

from t2i import __version__
from t2i.errors import InputError
from t2i.files.publishing import CARD_FILE, CARD_NAME, find_published_files, read_card
from t2i.files.untrusted import DIFFUSERS_CODE, format_error, is_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """Files that are sent to the hub.

    repository: ORGANISATION/NAME. files: the content or the path of each file, by its name in the repository. hidden:
    files that are left out.
    """

    repository: str
    files: dict[str, bytes | Path]
    hidden: list[Path]

    def list_sizes(self) -> dict[str, int]:
        """Return the bytes of each file, by its name."""
        files = self.files.items()
        return {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files}


def plan_upload(folder: Path, repository: str) -> Upload:
    """Return what `push_folder` would send; the hub is not asked.

    Raises InputError for a name that the hub does not allow, a folder that is no sound model, an incomplete model card,
    and for a file that must not leave this machine.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{repository!r:.100} is no name on the hub: {format_error(error)}") from error
    # The hub would put a bare name below the user's own account
    if repository.count("/") != 1:
        raise InputError(f"{repository!r:.100} must be ORGANISATION/NAME, or USER/NAME")
    if not is_folder(folder):
        raise InputError(f"no folder {str(folder)!r:.200}")
    sent, hidden = find_published_files(folder)
    text, front = read_card(folder)
    check_model_folder(folder)
    if front["license"] == "unknown":
        logger.warning("the licence of %s is unknown: name it in %s", folder, CARD_FILE)
    files: dict[str, bytes | Path] = {path.relative_to(folder).as_posix(): path for path in sent}
    files[CARD_FILE] = text.replace(CARD_NAME, repository).encode()
    return Upload(repository, files, hidden)


def check_model_folder(folder: Path) -> None:
    """Raise InputError for a folder that is no model, or a pipeline that is not sound or has code of others."""
    if not (folder / "model_index.json").is_file():
        if not (folder / "config.json").is_file():
            name = str(folder)
            raise InputError(f"{name!r} has neither a model_index.json nor a config.json; `t2i assemble` makes a model")
        return
    pipeline = PipelineFolder(folder)
    if pipeline.is_own:
        pipeline.check(list(COMPONENT_CLASSES))
    code = folder / DIFFUSERS_CODE
    # Bytes that are no text are not that code either
    if code.is_file() and code.read_text("utf-8", errors="replace") != CODE_TEMPLATE.format(name=pipeline.class_name):
        raise InputError(f"{str(code)!r} is not the code that saving writes, and is not pushed; delete it")


def push_folder(upload: Upload, public: bool = False) -> str:
    """Send the files as one commit to a new or an existing repository, and return its address.

    public: whether everyone sees the repository. One that is there must have this visibility already. The token is that
    of `hf auth login` or of HF_TOKEN. Raises InputError, in one line, if there is none, or the hub refuses.
    """
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be pushed")
    if get_token() is None:
        raise InputError("no token for the hub; `hf auth login` stores one, or set HF_TOKEN")
    disable_progress_bars()
    api, name = HfApi(library_name="t2i", library_version=__version__), upload.repository
    with explain_refusal(name):
        # The visibility is compared first: an existing repository keeps its own, whatever create_repo asks for
        try:
            is_private = bool(api.model_info(name).private)
        except RepositoryNotFoundError:
            is_private = not public
            api.create_repo(name, private=is_private)
        if is_private == public:
            seen = "private; leave --public out, or make it public" if is_private else "public already; give --public"
            raise InputError(f"{name!r} is {seen}")
        operations = [CommitOperationAdd(path, file) for path, file in upload.files.items()]
        api.create_commit(name, operations, commit_message=f"Upload by t2i {__version__}")
    return f"{api.endpoint}/{name}"


@contextmanager
def explain_refusal(name: str) -> Iterator[None]:
    """Raise errors of the hub's library, and of the connection to it, as InputError in one line."""
    try:
        yield
    except InputError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = "; its token needs the right to write" if status in (401, 403) else ""
        raise InputError(f"the hub refuses {name!r} (status {status}): {format_error(error):.300}{remedy}") from error
    except Exception as error:  # the classes of connection errors differ between versions of the library
        raise InputError(f"{name!r} cannot be pushed: {format_error(error):.300}") from error
