"""A user's own folders `pipelines` and `training` stay theirs, and this project's stay t2i's."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# t2i.pipelines is found, not imported, for that would import torch.
CODE = """
import sys
from importlib.util import find_spec
sys.path.insert(0, "")
import t2i.training.recipe.sizes
import pipelines, training
assert pipelines.mine and training.mine
assert sys.modules["training"] is training is not t2i.training
print(find_spec("t2i.pipelines").origin, t2i.training.recipe.sizes.__file__, sep="\\n")
"""


def test_folders_of_the_same_names_do_not_shadow_the_package(tmp_path: Path) -> None:
    for name in ("pipelines", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = True\n")
    result = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [Path(line) for line in result.stdout.splitlines()]
    assert found == [ROOT / "pipelines/__init__.py", ROOT / "training/recipe/sizes.py"]
