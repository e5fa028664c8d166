"""Folders that are shipped with the package: `configs` and `models`."""

from pathlib import Path


def find_shipped_folder(name: str) -> Path:
    """Return a shipped folder: within the package where a wheel installed it, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
