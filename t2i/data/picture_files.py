"""Picture files of a folder without captions, to be measured, sorted or searched."""

from pathlib import Path

from t2i.data.manifest import MANIFEST_FILE, MANIFEST_FOLDER
from t2i.data.sources.samples import SUPPORTED_SUFFIXES
from t2i.errors import InputError


def find_images(folder: str | Path) -> list[Path]:
    """Return the picture files in a folder and below, sorted. Raises InputError if there is none.

    Hidden files and the result of `t2i data check` are left out.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"no folder {str(folder)!r}; give one with pictures")
    checked = root / MANIFEST_FOLDER if (root / MANIFEST_FOLDER / MANIFEST_FILE).exists() else None
    images = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SUPPORTED_SUFFIXES and path.is_file()
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
        if checked is None or not path.is_relative_to(checked)
    ]
    if not images:
        raise InputError(f"no pictures in {str(folder)!r}; they end in {', '.join(sorted(SUPPORTED_SUFFIXES))}")
    return images
