"""Image files of a folder without captions, to be measured, sorted or searched."""

import hashlib
from pathlib import Path

from t2i.data.manifest import MANIFEST_FILE, MANIFEST_FOLDER
from t2i.data.pictures import is_converted
from t2i.data.sources.samples import SUPPORTED_SUFFIXES
from t2i.errors import InputError
from t2i.files.atomic import compute_file_sha256


def compute_picture_digest(path: Path) -> bytes:
    """Return the SHA-256 of an image's file; another one if its values are converted when they are read.

    So what is stored for images by their digest, before conversions existed, stays valid for all others.
    """
    digest = bytes.fromhex(compute_file_sha256(path))
    return hashlib.sha256(digest + b"converted").digest() if is_converted(path) else digest


def find_images(folder: str | Path) -> list[Path]:
    """Return the image files in a folder and below, sorted. Raises InputError if there is none.

    Hidden files and the result of `t2i data check` are left out.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"no folder {str(folder)!r}; give one with images")
    checked = root / MANIFEST_FOLDER if (root / MANIFEST_FOLDER / MANIFEST_FILE).exists() else None
    images = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SUPPORTED_SUFFIXES and path.is_file()
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
        if checked is None or not path.is_relative_to(checked)
    ]
    if not images:
        raise InputError(f"no images in {str(folder)!r}; they end in {', '.join(sorted(SUPPORTED_SUFFIXES))}")
    return images
