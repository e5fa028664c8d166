"""The page's modules without a browser: their tests are JavaScript, which node runs."""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
MIN_VERSION = 20  # of node, whose modules need no package.json


def find_node() -> str | None:
    node = shutil.which("node")
    if node is None:
        return None
    version = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=30).stdout
    return node if int(version.lstrip("v").partition(".")[0] or 0) >= MIN_VERSION else None


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.test.mjs")), ids=lambda path: path.name)
def test_modules_pass_their_tests(path):
    node = find_node()
    if node is None:
        pytest.skip(f"node {MIN_VERSION} or later is not installed")
    found = subprocess.run([node, "--test", str(path)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
