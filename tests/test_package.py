"""The package: what sdist and wheel contain, and that the installed wheel draws and trains without the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("t2i", "pipelines", "training", "configs", "models", "tests", "benchmarks", "docs")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
MAX_BYTES = 60_000_000


def run(*command: object, **options: object) -> str:
    """Run a command outside the checkout's environment variables and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist from a copy of the checkout, with its caches and its build folders left by others."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    (copy / "t2i" / "__pycache__").mkdir(exist_ok=True)
    (copy / "t2i" / "__pycache__" / "cli.cpython-311.pyc").write_bytes(b"")
    built = copy / "dist"
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(built)!r})"
    run(sys.executable, "-c", code, cwd=copy)
    [path] = built.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the sdist: what the sdist lacks, the wheel lacks."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, sdist)
    [path] = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in an environment that sees the dependencies of this one, but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    run(sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-deps", "--no-index", wheel)
    [packages] = folder.glob("lib/python*/site-packages")
    # Python searches a folder that a .pth file names, but does not read its .pth files, such as an editable t2i's.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder


def expected_modules() -> set[str]:
    """Return the paths of all modules in the wheel."""
    paths = {path.relative_to(ROOT).as_posix() for path in (ROOT / "t2i").rglob("*.py")}
    for top in ("pipelines", "training"):
        paths |= {f"t2i/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / top).rglob("*.py")}
    return paths


def expected_data() -> set[str]:
    """Return the paths of all other files in the wheel: configurations, templates, the models that are defaults."""
    data = [path for path in (ROOT / "configs").glob("*/*.yaml")] + [ROOT / "configs/emoji/sentences.txt"]
    for model in ("emoji", "emoji-upsampler"):
        data += [path for path in (ROOT / "models" / model).rglob("*") if path.is_file()]
    data += [path for path in (ROOT / "training").rglob("*.yaml")]
    data += [path for path in (ROOT / "pipelines/serving/page").rglob("*") if path.is_file()]
    own = [path for path in (ROOT / "t2i").rglob("*") if path.suffix in (".json", ".typed")]
    return {f"t2i/{path.relative_to(ROOT).as_posix()}" for path in data} | {
        path.relative_to(ROOT).as_posix() for path in own
    }


def test_the_wheel_holds_modules_configurations_and_default_models_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if name.startswith("t2i-")}
    assert names - about == expected_modules() | expected_data()
    assert {name.partition("/")[2] for name in about} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }
    assert wheel.stat().st_size < MAX_BYTES


def test_the_sdist_holds_the_licence_and_no_caches_and_no_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {*FILES, "PKG-INFO"} <= names
    assert {name.partition("/")[0] for name in names} == {
        *FILES, "PKG-INFO", "setup.cfg", "t2i", "t2i.egg-info", "pipelines", "training", "configs", "models",
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert sdist.stat().st_size < MAX_BYTES


def test_the_installed_wheel_draws_what_the_checkout_draws(environment: Path, tmp_path: Path) -> None:
    """Offline, from any folder; the image is the same byte for byte."""
    where = run(environment / "bin/python", "-c", "import t2i; print(t2i.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    words = ("generate", "a cat", "--seed", "0", "--out")
    run(environment / "bin/t2i", *words, tmp_path / "installed.png", cwd=tmp_path)
    run(sys.executable, "-m", "t2i", *words, tmp_path / "checkout.png", cwd=ROOT)
    assert (tmp_path / "installed.png").read_bytes() == (tmp_path / "checkout.png").read_bytes()


def test_the_installed_wheel_finds_its_configurations(environment: Path, tmp_path: Path) -> None:
    code = """
from t2i.config import load_config
from t2i.training.recipe import recipe
from t2i.training.train_prior import Config
assert load_config(Config, "prior", []) == load_config(Config, "prior", ["configs/emoji-quick/prior.yaml"])
assert recipe.TEMPLATES.is_dir() and [*recipe.TEMPLATES.glob("*.yaml")]
"""
    run(environment / "bin/python", "-c", code, cwd=tmp_path)
