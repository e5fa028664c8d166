"""Each row of docs/reference/for-diffusers-users.md: what users of diffusers, Kandinsky and kohya do, done here."""

import inspect
from typing import Any

import pytest

from tests.helpers.habits import TESTS, calling, read_rows, running
from tests.helpers.offloading import waiting_weights_are_nan

__all__ = ["calling", "running", "waiting_weights_are_nan"]  # tests, which register themselves, and a fixture


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    assert read_rows() == {what: verdict for what, (verdict, _) in TESTS.items()}


@pytest.mark.parametrize("what", read_rows())
def test_it_is_as_the_page_says(what: str, request: pytest.FixtureRequest) -> None:
    test = TESTS[what][1]
    test(**{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters})


@pytest.fixture
def pipe(pipeline: Any) -> Any:
    return pipeline
