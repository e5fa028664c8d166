"""What a fault test did: a line in the file named by T2I_FAULTS, from which `make faults` makes its table."""

import functools
import json
import os
from collections.abc import Callable
from typing import Any

import pytest


def record(fault: str, injected: int, survived: int) -> None:
    """Note how often a fault was injected and survived; assert that it was at all, and every time."""
    write(fault, injected, survived)
    assert injected > 0, f"{fault}: never injected"
    assert survived == injected, f"{fault}: survived {survived} of {injected}"


def write(fault: str, injected: int, survived: int) -> None:
    path = os.environ.get("T2I_FAULTS")
    if path:
        line = json.dumps({"fault": fault, "injected": injected, "survived": survived})
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def fault(name: str, times: int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a test that injects a fault so many times: it was survived if the test passes."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def noted(*arguments: Any, **named: Any) -> None:
            try:
                test(*arguments, **named)
            except pytest.skip.Exception:
                raise
            except BaseException:
                write(name, times, 0)
                raise
            write(name, times, times)

        return noted

    return decorate
