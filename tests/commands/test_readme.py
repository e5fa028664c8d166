"""The README's commands and its Python: drawing runs as written, the rest is checked to parse."""

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.main import get_command

from t2i.cli import app, main
from t2i.config import load_config
from t2i.interop.layouts import DEFAULT_PRIORS
from tests.helpers.processes.forked import run_program

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]
PUBLISHED = {*DEFAULT_PRIORS.keys(), *DEFAULT_PRIORS.values()}
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_is_something_to_run():
    assert len(COMMANDS) >= 8 and len(PYTHON) >= 1


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(code, tmp_path):
    (tmp_path / "models").symlink_to(ROOT / "models")
    result = run_program(["-c", code], folder=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_right(command, tmp_path, monkeypatch, capsys):
    match command:
        case ["git", "clone", *_] | ["cd", _] | ["apt-get", "install", *_]:
            return
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case [program, "launch", *options] if program.endswith("accelerate"):
            script = next(option for option in options if option.endswith(".py"))
            arguments = options[options.index(script) + 1 :]
            check_training(ROOT / script, arguments, monkeypatch)
        case [program, "generate", *words] if program.endswith("t2i") and PUBLISHED & set(words):
            get_command(app).commands["generate"].make_context("generate", words)  # from the hub, which no test asks
        case [program, "train", "all", folder] | [program, "generate", _, "--model", folder] if program.endswith("t2i"):
            folders = [words[words.index("init") + 1] for words in COMMANDS if "init" in words]
            assert folder.removesuffix("/pipeline") in folders  # trained before, which takes long
        case [program, "train", stage, *arguments] if program.endswith("t2i"):
            context = get_command(app).commands["train"].make_context("train", [stage, *arguments])
            arguments = context.params["arguments"]  # without the options, which exist
            check_training(ROOT / f"training/train_{stage}.py", arguments, monkeypatch)
        case [program, "generate", *_] if program.endswith("t2i"):
            (tmp_path / "models").symlink_to(ROOT / "models")
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(sys, "argv", ["t2i", *command[1:]])
            with pytest.raises(SystemExit) as caught:
                main()
            said = capsys.readouterr()
            assert not caught.value.code, said.err[-2000:]
            pictures = said.out.splitlines()
            assert pictures and all((tmp_path / line).is_file() for line in pictures)
        case [program, *arguments] if program.endswith("t2i"):
            command = get_command(app)
            while hasattr(command, "commands"):
                command = command.commands[arguments.pop(0)]
            command.make_context("t2i", arguments)  # parses, and refuses options that do not exist
        case _:
            pytest.fail(f"no check for {command}")


def check_training(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The script exists and takes these arguments."""
    assert script.is_file()
    monkeypatch.chdir(ROOT)
    stage = script.stem.removeprefix("train_")
    load_config(import_module(f"t2i.training.{script.stem}").Config, stage, arguments)
