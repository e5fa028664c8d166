"""The documents: links lead somewhere, commands parse, named files and modules exist, and the size stays readable."""

import importlib
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from t2i.pipelines.serving.api.fields import FIELDS, PATHS
from t2i.pipelines.serving.api.values import Choice, Number
from typer.main import get_command

from t2i.cli import app
from t2i.diffusion.samplers import SAMPLERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    ROOT / line
    for line in subprocess.run(
        ["git", "ls-files", "*.md", "docs/**/*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
)
DOCS = [page for page in PAGES if page.is_relative_to(ROOT / "docs")]
HISTORY = ROOT / "CHANGELOG.md"  # names modules and files of before
BEFORE = ROOT / "docs/explanation/before-and-after.md"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_documents_have_at_most_15_000_words():
    assert sum(len(page.read_text().split()) for page in DOCS) <= 15_000


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=name)
def test_prose_calls_an_image_by_the_word_of_the_public_arguments(page):
    assert re.findall(r"(?<![\w/.-])pictures?\b(?!\.\w)", page.read_text(), re.IGNORECASE) == []


def test_the_tree_of_the_architecture_has_every_top_level_module_and_every_folder():
    tree = re.search(r"```text\n(.*?)```", (ROOT / "docs/explanation/architecture.md").read_text(), re.DOTALL)[1]
    modules = {path.stem for path in (ROOT / "t2i").glob("*.py") if not path.stem.startswith("__")}
    assert modules - set(re.findall(r"\w+", tree)) == set()
    folders = Counter(
        path.parent.name for top in ("t2i", "pipelines", "training") for path in (ROOT / top).rglob("__init__.py")
    )
    assert folders - Counter(re.findall(r"(\w+)/", tree)) == Counter()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_code_of_today_on_the_page_of_before_and_after_is_that_of_its_file():
    shown = re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", BEFORE.read_text(), re.DOTALL)
    assert len(shown) == 5
    for file, code in shown:
        lines = ["...", *map(str.strip, (ROOT / file).read_text().splitlines())]
        assert [line for line in map(str.strip, code.splitlines()) if line not in lines] == [], file


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (HISTORY, BEFORE)], ids=name)
def test_named_files_and_modules_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:t2i|pipelines|training|tests|benchmarks|configs|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for dotted in re.findall(r"\bt2i(?:\.[a-z_]\w*)+(?:\.[A-Z]\w*)?", text):
        parts = dotted.split(".")
        modules = [".".join(parts[:end]) for end in (len(parts), len(parts) - 1) if end]
        assert any(resolves(module, dotted) for module in modules), dotted


def resolves(module: str, dotted: str) -> bool:
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    rest = dotted[len(module) :].lstrip(".")
    return not rest or hasattr(found, rest)


def commands(page: Path) -> list[list[str]]:
    """The `t2i ...` lines of a page's code blocks, without what a shell adds."""
    blocks = re.findall(r"```bash\n(.*?)```|((?:^    .*\n)+)", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(one or other for one, other in blocks).replace("\\\n", " ").splitlines()
    words = (line.strip().removeprefix("$ ") for line in lines)
    return [shlex.split(line, comments=True) for line in words if re.match(r"(\.venv/bin/)?t2i ", line)]


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], ids=name)
def test_commands_parse(page):
    for _, *words in commands(page):
        if "…" in words or "..." in words:
            continue
        command, arguments = get_command(app), list(words)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context("t2i", arguments)


def test_the_page_of_the_server_has_every_field_with_its_routes_and_its_values():
    page = (ROOT / "docs/how-to/serve.md").read_text()
    found = {}
    for routes, *cells in re.findall(r"^\| ([GEVU]+) \|(.*)\|(.*)\|$", page, re.MULTILINE):
        for clause in "; ".join(cells).split(";"):
            values = re.sub(r"`\w+`", "", clause)
            found |= {name: (routes, values) for name in re.findall(r"`(\w+)`", clause)}
    expected = {name: field.routes.upper().replace("T", "") for name, field in FIELDS.items()}
    assert {name: routes for name, (routes, _) in found.items()} == expected
    for name, field in FIELDS.items():
        match getattr(field.kind, "each", field.kind):
            case Number(low, high):
                assert f"{low:.16g} to {high:.16g}" in found[name][1], name
            case Choice(choices) if choices != tuple(SAMPLERS):
                assert [choice for choice in choices if not re.search(rf"\b{choice}\b", found[name][1])] == [], name
    links = ("GET /v1/models", "GET /health", "/ready", "/metrics", *(f"POST {path}" for path in PATHS))
    assert [link for link in links if f"`{link}`" not in page] == []


def test_options_on_the_page_of_the_server_exist():
    page = (ROOT / "docs/how-to/serve.md").read_text()
    options = {option for parameter in get_command(app).commands["serve"].params for option in parameter.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", page)) - options == set()
