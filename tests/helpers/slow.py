"""Mark the tests that tests/slow.txt names: `make test` leaves them out, `make test-all` and `.ci/run` run them."""

import re
from pathlib import Path

import pytest

LIST = Path(__file__).resolve().parents[1] / "slow.txt"


def mark_slow_tests(items: list[pytest.Item]) -> None:
    """Add the marker `slow` to the tests whose ids begin as a line of the list does; "*" stands for any text.

    Of several such lines the last one counts; one with "!" before it takes the marker away.
    """
    rules = [(compile_line(line.removeprefix("!")), not line.startswith("!")) for line in read_list()]
    for item in items:
        marks = [is_slow for pattern, is_slow in rules if pattern.match(item.nodeid)]
        if marks and marks[-1]:
            item.add_marker(pytest.mark.slow)


def compile_line(line: str) -> re.Pattern[str]:
    return re.compile(re.escape(line).replace(r"\*", ".*"))


def read_list() -> list[str]:
    """Return the lines of the list without comments."""
    lines = [line.partition("# ")[0].strip() for line in LIST.read_text().splitlines()]
    return [line for line in lines if line and line != "#"]
