"""Each row of docs/reference/for-diffusers-users.md: what users of diffusers, Kandinsky and kohya do, done here."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.habits import TESTS, calling, read_rows, running
from tests.helpers.offloading import waiting_weights_are_nan

__all__ = ["calling", "running", "waiting_weights_are_nan"]  # tests, which register themselves, and a fixture

ROOT = Path(__file__).resolve().parents[1]
CHECKS = ROOT / "tests" / "diffusers_checks.txt"


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    assert read_rows() == {what: verdict for what, (verdict, _) in TESTS.items()}


@pytest.mark.parametrize("what", read_rows())
def test_it_is_as_the_page_says(what: str, request: pytest.FixtureRequest) -> None:
    test = TESTS[what][1]
    test(**{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters})


def test_each_check_of_diffusers_has_a_test_here_or_a_reason() -> None:
    answers: dict[tuple[str, str], str] = {}
    section = module = ""
    for line in CHECKS.read_text().splitlines():
        if line.startswith("#"):
            section, _, module = line.removeprefix("# ").partition(": ")
            continue
        if not line:
            continue
        checks, _, answer = line.partition(": ")
        for check in checks.split(", "):
            assert (section, check) not in answers
            answers[section, check] = answer
        if not answer.startswith("because "):
            path, _, name = answer.rpartition("::")
            assert re.search(rf"^def {name}\(", (ROOT / (path or module)).read_text(), re.MULTILINE), line
    assert len(answers) > 150


@pytest.fixture
def pipe(pipeline: Any) -> Any:
    return pipeline
