"""What the measurements' JSON files have in common: refused in time, written whole, with the versions behind them."""

import json
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch

from t2i import __version__
from t2i.errors import InputError
from t2i.files.atomic import check_writable_folder, create_file_atomically


def check_result_file(out: Path) -> None:
    """Refuse, before anything is measured, a file that could not be written."""
    if out.is_dir():
        raise InputError(f"out is {str(out)!r}, which is a folder; give the name of a file")
    check_result_folder(out.parent)


def check_result_folder(out: Path) -> None:
    """Refuse, before anything is measured, a folder that could not be made or written to."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out is to be in {str(out)!r}, which is a file; give a folder")
    check_writable_folder(out)


def write_result_file(result: dict[str, Any], out: Path) -> None:
    """Whole or not at all; replaces what was there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with create_file_atomically(out) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def collect_package_versions() -> dict[str, str]:
    """Of what a figure depends on."""
    return {
        "t2i": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
