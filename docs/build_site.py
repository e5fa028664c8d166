"""Build the documents as a site, strictly and offline: `make docs`, or `python docs/build_site.py FOLDER`.

The documents are copied with what they link to, each to its place in the repository, so that a link leads to the same
file on the site as in a checkout. The packages are linked as they are installed, for their docstrings.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/**/*.md", "docs/images/*.png", "models/*/README.md")
MOVED_PACKAGES = ("pipelines", "training")  # beside the package t2i in a checkout, in it once installed


def build_site(folder: Path) -> Path:
    """Write `docs`, `api` and `site` into a folder, and return the path of the site. Raises if a link is broken."""
    pages, packages = folder / "docs", folder / "api"
    for path in (pages, packages, folder / "site"):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        place = pages / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    (packages / "t2i").mkdir(parents=True)
    for path in [*(ROOT / "t2i").iterdir(), *(ROOT / name for name in MOVED_PACKAGES)]:
        (packages / "t2i" / path.name).symlink_to(path)
    shutil.copy(ROOT / "mkdocs.yml", folder)
    zensical = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", "mkdocs.yml"]
    subprocess.run(zensical, cwd=folder, check=True)
    return folder / "site"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    print(build_site(target))
