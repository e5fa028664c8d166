"""Completion in a shell: what a real bash is offered, and what it costs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from t2i.commands import flags

ROOT = Path(__file__).resolve().parents[2]
WORDS = {  # what was typed, and what is offered for the last word
    ("t2i", "gen"): ["generate"],
    ("t2i", "train", "pr"): ["prior"],
    ("t2i", "generate", '"a cat"', "--sampler", "dd"): ["ddpm", "ddim"],
    ("t2i", "eval", "q"): ["quality"],
    ("t2i", "data", "check", "--qu"): ["--quiet"],
    ("t2i", "inpaint", "pict"): [],  # bash goes on with the names of files
}


@pytest.fixture
def environment(tmp_path):
    """Variables with which a shell finds `t2i`, as its installed script, which fails if torch is imported."""
    script = tmp_path / "t2i"
    lines = (
        "import sys",
        "from t2i.cli import main",
        "try:\n    main()",
        "finally:\n    assert 'torch' not in sys.modules",
    )
    script.write_text("\n".join((f"#!{sys.executable}", *lines)) + "\n")
    script.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_and_values_without_torch(environment):
    lines = ["t2i --install-completion >/dev/null", "source ~/.bash_completions/t2i.sh", "complete -p t2i"]
    for words in WORDS:
        quoted = " ".join("'" + word + "'" for word in words)
        lines += [f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _t2i_completion t2i", 'echo "${COMPREPLY[*]}"']
    result = subprocess.run(["bash", "--norc", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
    assert result.stderr == ""
    installed, *offered = result.stdout.splitlines()
    assert installed == "complete -o default -F _t2i_completion t2i"
    assert dict(zip(WORDS, offered, strict=True)) == {words: " ".join(found) for words, found in WORDS.items()}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_and_what_is_offered_with_its_help(environment, shell):
    result = subprocess.run(
        ["t2i"], env=environment | {"_T2I_COMPLETE": f"source_{shell}"}, capture_output=True, text=True
    )
    assert result.returncode == 0 and f"_T2I_COMPLETE=complete_{shell}" in result.stdout
    variables = {"_T2I_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "t2i parit"}
    variables["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    result = subprocess.run(["t2i"], env=environment | variables, capture_output=True, text=True)
    assert result.returncode == 0 and "parity" in result.stdout


def test_the_samplers_that_are_offered_are_all():
    from t2i.diffusion.samplers import SAMPLERS

    assert set(flags.SAMPLERS) == set(SAMPLERS)
