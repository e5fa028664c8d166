"""Which files of a model folder may be published, and whether its model card is complete."""

import re
from pathlib import Path
from typing import Any

import yaml

from t2i.errors import InputError
from t2i.files.untrusted import DIFFUSERS_CODE, PICKLE_FILE_TYPES, check_link_target, read_safetensors_header

CARD_FILE = "README.md"
CARD_NAME = "ORGANISATION/NAME"  # in a card, stands for the repository that it is pushed to
TEXT_FILE_TYPES = (".json", ".txt", ".md", ".yaml", ".model")
PICTURE_FILE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
PLAIN_NAMES = ("LICENSE", "LICENCE", "NOTICE")
CARD_FIELDS = ("license", "library_name", "pipeline_tag", "tags")
SEARCHED_BYTES = 20_000_000  # of a text that is searched for secrets: a tokenizer has half of it
# Names of an optimizer's tensors in PyTorch, and of those of this project's checkpoints
OPTIMIZER_TENSOR = re.compile(r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer|state[12]|absmax[12])$")
SECRETS = {
    "a token of the hub": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "a key of an API": re.compile(rb"\b(sk|pk|ghp|gho|github_pat|glpat|xox[abp])[-_][A-Za-z0-9_-]{20,}"),
    "a key of AWS": re.compile(rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a password in an address": re.compile(rb"[a-z]+://[^/\s:@\"']+:[^/\s:@\"']{3,}@"),
}


def find_published_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a model folder that belong to the model, and those that are left out because they are hidden.

    Raises InputError, for the first file that must not leave this machine: code, pickles, an optimizer's state, a link
    out of the folder, a text with a secret, or a kind of file that no model has.
    """
    sent, hidden = [], []
    for path in sorted(folder.rglob("*")):
        check_link_target(path, folder)
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            hidden += [] if path.is_dir() else [path]
        elif not path.is_dir():
            check_published_file(path, folder)
            sent.append(path)
    return sent, hidden


def check_published_file(path: Path, folder: Path) -> None:
    """Raise InputError for a file that must not be published."""
    name, suffix = str(path), path.suffix.lower()
    if not path.is_file():
        raise InputError(f"{name!r} is no plain file, which alone is pushed")
    if suffix in PICKLE_FILE_TYPES:
        raise InputError(f"{name!r} is a pickle, which is not pushed; `t2i convert` makes .safetensors of it")
    if suffix == ".safetensors":
        if found := next(filter(OPTIMIZER_TENSOR.search, read_safetensors_header(path)), None):
            raise InputError(f"{name!r} holds an optimizer's state ({found!r:.80}), which is not pushed; delete it")
    elif suffix in TEXT_FILE_TYPES or path.name in PLAIN_NAMES or path == folder / DIFFUSERS_CODE:
        check_no_secret(path)
    elif suffix not in PICTURE_FILE_TYPES:
        allowed = ", ".join([".safetensors", *TEXT_FILE_TYPES, *PICTURE_FILE_TYPES])
        raise InputError(f"{name!r} belongs to no model and is not pushed; files may be {allowed}; move it elsewhere")


def check_no_secret(path: Path) -> None:
    """Raise InputError for a text with something in it that looks like a password or a key."""
    with open(path, "rb") as file:
        text = file.read(SEARCHED_BYTES)
    for what, pattern in SECRETS.items():
        if match := pattern.search(text):
            line = text.count(b"\n", 0, match.start()) + 1
            raise InputError(f"{str(path)!r} has in line {line} {what}, and is not pushed; take it out")


def read_card(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of a model's card and its front matter. Raises InputError if one is missing or incomplete."""
    path = folder / CARD_FILE
    if not path.is_file():
        raise InputError(f"{str(folder)!r} has no {CARD_FILE}, its model card; `t2i assemble` writes one")
    try:
        text = path.read_text("utf-8")
        match = re.match(r"---\r?\n(.*?\n)---\r?\n", text, re.DOTALL)
        front = yaml.safe_load(match[1]) if match else None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"the card {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(front, dict):
        needed = ", ".join(CARD_FIELDS)
        raise InputError(f"the card {str(path)!r} does not begin with its front matter: --- lines around {needed}")
    if missing := [name for name in CARD_FIELDS if not front.get(name)]:
        raise InputError(f"the card {str(path)!r} lacks {', '.join(missing)} in its front matter")
    return text, front
