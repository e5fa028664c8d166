"""The JSON files of evaluations: checked before the work, written at once, with the versions of packages."""

import json
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch

from t2i import __version__
from t2i.checks import check_folder_name
from t2i.errors import InputError
from t2i.files.atomic import check_writable_folder, create_file_atomically


def check_result_file(out: Path) -> None:
    """Refuse a result file that cannot be written."""
    if out.is_dir():
        raise InputError(f"out must be a file, got {str(out)!r}, which is a folder")
    check_result_folder(out.parent)


def check_result_folder(out: Path) -> None:
    """Refuse a result folder that cannot be created or written to."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out must be in a folder, got {str(out)!r}, which is a file")
    check_folder_name("out", out)
    check_writable_folder(out)


def write_result_file(result: dict[str, Any], out: Path) -> None:
    """Write a result as JSON, completely or not at all; an existing file is replaced."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with create_file_atomically(out) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


def collect_package_versions() -> dict[str, str]:
    """Return the versions of the packages that figures depend on."""
    return {
        "t2i": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
