"""What the environment says of other processes: a launcher's word counts, what is left over does not."""

import os
from types import SimpleNamespace

import pytest

from t2i.errors import InputError
from t2i.runtime import launch
from t2i.runtime.launch import check_environment, has_accelerate_ancestor
from t2i.runtime.rank import LAUNCHER_VARIABLES, RANK_VARIABLES, SINGLE_PROCESS, Rank, find_process_rank


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [
        *RANK_VARIABLES,
        *LAUNCHER_VARIABLES,
        *(name for name in os.environ if name.startswith("ACCELERATE_")),
    ]:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "has_accelerate_ancestor", lambda: False)


@pytest.mark.parametrize(
    "left",
    [{"WORLD_SIZE": "8"}, {"RANK": "3"}, {"LOCAL_RANK": "1"}, {"RANK": "0", "LOCAL_WORLD_SIZE": "4"}, {"RANK": "x"}],
)
def test_what_no_launcher_sets_alone_is_ignored_and_said_once(monkeypatch, caplog, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert find_process_rank() == SINGLE_PROCESS
    check_environment()
    assert not set(left) & set(os.environ)  # so that accelerate does not read it either
    assert len(caplog.records) == 1 and "is ignored" in caplog.text
    assert all(f"{name}={value}" in caplog.text for name, value in left.items())


def test_a_machine_that_says_there_is_one_process_is_passed_over_in_silence(monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert find_process_rank() == SINGLE_PROCESS and not caplog.records


@pytest.mark.parametrize("launcher", [None, *LAUNCHER_VARIABLES])
def test_a_launchers_rank_counts_and_one_that_nobody_knows_is_said(monkeypatch, caplog, launcher):
    for name, value in zip(RANK_VARIABLES, "1212"):
        monkeypatch.setenv(name, value)
    if launcher:
        monkeypatch.setenv(launcher, "0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_process_rank() == Rank(1, 2, 1, 2)
    assert len(caplog.records) == (0 if launcher else 1)
    assert launcher or "process 1 of 2, by RANK and WORLD_SIZE" in caplog.text


def test_a_rank_beyond_the_world_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK must be from 0"):
        find_process_rank()


def test_variables_of_accelerate_that_no_launcher_of_it_set_are_said(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    check_environment()
    assert len(caplog.records) == 1 and "ACCELERATE_USE_CPU=true is set in the environment" in caplog.text
    assert "FSDP" not in caplog.text
    monkeypatch.setattr(launch, "has_accelerate_ancestor", lambda: True)
    check_environment()
    assert len(caplog.records) == 1


def test_an_ancestor_that_launches_is_found(monkeypatch):
    def found(*commands: list[str]) -> bool:
        parents = [SimpleNamespace(cmdline=lambda words=words: words) for words in commands]
        monkeypatch.setattr(launch.psutil, "Process", lambda: SimpleNamespace(parents=lambda: parents))
        return has_accelerate_ancestor()

    assert found(["sh"], ["python", "/venv/bin/accelerate", "launch", "x.py"])
    assert found(["python", "-m", "accelerate.commands.launch", "x.py"])
    assert not found(["bash"], ["python", "-m", "t2i", "train"])
