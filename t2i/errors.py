"""The one error that means "the user asked for something that cannot be done"."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: one line that names the thing, its value and what is allowed. Raised before any work starts."""


@contextmanager
def reported() -> Iterator[None]:
    """Show an `InputError` as one line on standard error and exit with status 2, as command-line programs do."""
    try:
        yield
    except (InputError, OSError) as error:  # an OSError names the file and what is wrong with it
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
