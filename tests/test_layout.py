"""The layout: every import runs down the layers, none in a circle, and folder names keep model folders loadable."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

import t2i

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. A module may import its own layer and those before it, also lazily.
LAYERS = (
    (
        "t2i.errors",
        "t2i.terminal",
        "t2i.progress",
        "t2i.bulk",
        "t2i.checks",
        "t2i.config",
        "t2i.aliases",
        "t2i.shipped",
        "t2i.texts",
        "t2i.limits",
    ),
    ("t2i.files",),
    ("t2i.runtime",),
    ("t2i.diffusion",),
    ("t2i.networks",),
    ("t2i.data",),
    ("t2i.sampling",),
    ("t2i.interop",),
    ("t2i.evaluation",),
    ("t2i.pipelines",),
    ("t2i.training",),
    ("t2i.commands", "t2i.cli", "t2i.__main__"),
)
FRONT_DOOR = "t2i"  # t2i/__init__.py: lazy public names of all layers


def modules() -> dict[str, Path]:
    """Path of each module by its dotted name."""
    found = {}
    for top in ("t2i", "pipelines", "training"):
        for path in (ROOT / top).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name if top == "t2i" else f"t2i.{name}"] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno}: a relative import; name the module in full"
            found.update(resolve_import(node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(resolve_import(alias.name) for alias in node.names)
    return {name for name in found if name in MODULES and name != FRONT_DOOR}


def resolve_import(module: str, name: str = "") -> str:
    """The module that an import reads: of `from module import name`, the submodule, or where the front door has it."""
    if module.split(".")[0] in ("pipelines", "training"):  # names of a checkout
        module = f"t2i.{module}"
    if module == FRONT_DOOR and name in t2i._MODULES:
        return t2i._MODULES[name]
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def layer(name: str) -> int:
    for number, packages in enumerate(LAYERS):
        if any(name == package or name.startswith(f"{package}.") for package in packages):
            return number
    pytest.fail(f"{name} is in no layer; add it to LAYERS in {Path(__file__).name}")


@pytest.mark.parametrize("name", sorted(GRAPH.keys() - {FRONT_DOOR}))
def test_a_module_imports_only_its_own_layer_and_those_below(name):
    assert not {other for other in GRAPH[name] if layer(other) > layer(name)}


def test_no_import_runs_in_a_circle():
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in finished:
            for other in GRAPH[name]:
                visit(other, (*path, name))
            finished.add(name)

    for name in GRAPH.keys() - {FRONT_DOOR}:
        visit(name, ())


def test_the_servers_api_knows_no_gateway_and_the_gateway_no_application() -> None:
    """What clients say, how it is carried, and who answers: each imports only those before it."""
    serving = "t2i.pipelines.serving"
    above = {"api": ("gateway", "app", "server", "ray_app"), "gateway": ("app", "server", "ray_app")}
    for folder, names in above.items():
        beyond = tuple(f"{serving}.{name}" for name in names)
        found = {name: others for name, others in GRAPH.items() if name.startswith(f"{serving}.{folder}.")}
        assert found and [pair for pair in found.items() if any(other.startswith(beyond) for other in pair[1])] == []


def split_imports(path: Path) -> tuple[set[str], set[str]]:
    """Return the modules that are imported with a file, and those that its functions import."""
    tree = ast.parse(path.read_text())
    inside = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    # Imports for type checkers alone never run
    inside += [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    lazy = {child for node in inside for child in ast.walk(node)}
    found: tuple[set[str], set[str]] = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found[node in lazy].add(str(node.module))
        elif isinstance(node, ast.Import):
            found[node in lazy].update(alias.name for alias in node.names)
    return found


def test_modules_import_declared_packages_alone_and_those_of_extras_in_functions() -> None:
    """pipelines/serving, which needs the extra `serve`, is itself imported in functions alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: rows for name, rows in project["optional-dependencies"].items() if name not in ("dev", "reference")}

    def normalize(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[<>=!\[; ]", name)[0]).lower()

    required = {normalize(row) for row in project["dependencies"]}
    optional = {normalize(row) for rows in extras.values() for row in rows}
    owners = packages_distributions()

    def find_undeclared(modules: set[str], allowed: set[str]) -> set[str]:
        tops = {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"t2i", "pipelines", "training"}
        return {top for top in tops if not allowed & {normalize(owner) for owner in owners.get(top, [top])}}

    found = {}
    for name, path in MODULES.items():
        eager, lazy = split_imports(path)
        serves = name.startswith("t2i.pipelines.serving")
        undeclared = find_undeclared(
            eager, required | ({normalize(row) for row in extras["serve"]} if serves else set())
        )
        undeclared |= find_undeclared(lazy, required | optional)
        if not serves:
            undeclared |= {module for module in eager if "pipelines.serving" in module}
        if undeclared:
            found[name] = undeclared
    assert found == {}


def test_no_package_of_components_is_named_as_a_pipeline_of_diffusers():
    """diffusers writes a wrong module path into model_index.json for a component whose package has such a name."""
    spec = find_spec("diffusers.pipelines")
    assert spec is not None and spec.submodule_search_locations
    theirs = {path.name for path in Path(spec.submodule_search_locations[0]).iterdir() if path.is_dir()}
    assert "kandinsky" in theirs, "diffusers keeps its pipelines elsewhere now"
    packages = {name for module in MODULES for name in module.split(".")[:-1] if module.count(".")}
    assert not (packages - {"t2i"}) & theirs


def test_a_folder_holds_at_most_18_files():
    folders = {path.parent for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]}
    assert {folder: count for folder in folders if (count := len(list(folder.glob("*.py")))) > 18} == {}


def test_docstrings_begin_with_a_verb_or_a_noun():
    odd = re.compile(r"(What|Of|The same|The reverse|Whether|Which|How|Those|That|Where|As)\b")
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found += [f"{name}.{node.name}"] if odd.match(ast.get_docstring(node) or "") else []
    assert found == []


def test_three_lines_in_a_hundred_are_comments():
    texts = [path.read_text() for path in MODULES.values()]
    comments = sum(len(re.findall(r"^\s*#", text, re.MULTILINE)) for text in texts)
    assert comments / sum(text.count("\n") for text in texts) >= 0.03


def test_files_functions_and_their_parameters_keep_to_the_limits():
    beyond = []
    for name, path in MODULES.items():
        if (lines := len(path.read_text().splitlines())) > 400:
            beyond.append(f"{name} has {lines} lines")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_command = name == "t2i.cli" or name.startswith("t2i.commands.")
            lines, taken = node.end_lineno - node.lineno + 1, node.args
            names = {parameter.arg for parameter in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)}
            if lines > 60:
                beyond.append(f"{name}.{node.name} has {lines} lines")
            # The options of a command are its documentation
            if len(names - {"self", "cls"}) > 8 and not is_command and node.name not in ("__init__", "__call__"):
                beyond.append(f"{name}.{node.name} has {len(names)} parameters")
    assert beyond == []


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from t2i import Text2ImagePipeline", "t2i.pipelines"),
        ("from t2i import Steering", "t2i.sampling.steering"),
        ("from pipelines import text2image", "t2i.pipelines.text2image"),
        ("import training.cache_data", "t2i.training.cache_data"),
        ("from t2i.files import atomic", "t2i.files.atomic"),
        ("from t2i.files.atomic import write_json_file", "t2i.files.atomic"),
    ],
)
def test_every_form_of_an_import_is_found(tmp_path, line, module):
    path = tmp_path / "module.py"
    path.write_text(f"def use():\n    {line}\n")
    assert imports(path) == {module}


def test_a_relative_import_is_refused(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("from .atomic import write_json_file\n")
    with pytest.raises(AssertionError, match="a relative import"):
        imports(path)


def test_nothing_outside_the_tests_imports_them():
    tops = ("t2i", "pipelines", "training", "benchmarks", "docs")
    sources = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    assert [path for path in sources if "from tests" in path.read_text() or "import tests" in path.read_text()] == []


def test_names_of_a_checkout_are_the_same_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import t2i.training.train_prior
    from t2i.pipelines.text2image import Text2ImagePipeline as Installed

    from pipelines import Text2ImagePipeline
    from training import train_prior

    assert Text2ImagePipeline is Installed
    assert train_prior is t2i.training.train_prior


def test_benchmarks_have_at_most_1500_lines():
    assert sum(path.read_text().count("\n") for path in (ROOT / "benchmarks").rglob("*.py")) <= 1500
