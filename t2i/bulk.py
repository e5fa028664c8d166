"""Jobs over many inputs: a bad one is named and left out, the others are done, and the exit status reports that."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from t2i.errors import InputError
from t2i.terminal import print_line


class BulkJob:
    """A job over several inputs. A job over a single input has nothing to go on with, so it raises its error at once.

    total: number of inputs. what: their name in the plural, for messages.
    """

    def __init__(self, total: int = 1, what: str = "images"):
        self.total, self.what = total, what
        self.faults: list[str] = []

    @contextmanager
    def skip_bad_input(self, name: object, *errors: type[Exception]) -> Iterator[None]:
        """Name an input that raises InputError, or another of `errors`, and go on."""
        expected: tuple[type[Exception], ...] = (InputError, *errors)
        try:
            yield
        except expected as error:
            if self.total == 1:
                raise
            known = str(name) in str(error)
            self.faults.append(str(error) if known else f"{str(name)!r}: {error}")
            print_line(f"left out: {self.faults[-1]}", sys.stderr)

    def check_any_left(self) -> None:
        """Raise InputError if all inputs were left out."""
        if self.total and len(self.faults) == self.total:
            raise InputError(f"none of {self.total} {self.what} can be used; the first: {self.faults[0]}")

    def finish(self) -> None:
        """Raise InputError, with the number, if inputs were left out; call it when all else is done."""
        self.check_any_left()
        if self.faults:
            first = f"the first: {self.faults[0]}"
            raise InputError(f"{len(self.faults)} of {self.total} {self.what} were left out, all others done; {first}")
