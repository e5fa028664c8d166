"""The one error that means "the user asked for something that cannot be done"."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: one line that names the thing, its value and what is allowed. Raised before any work starts."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split())[:1000])  # what it quotes may be a whole file


@contextmanager
def reported() -> Iterator[None]:
    """Errors as one line on standard error: exit status 2 for bad input, 1 for a run that failed, 130 for Ctrl-C."""
    try:
        yield
    except (InputError, OSError) as error:  # an OSError names the file and what is wrong with it
        complain(error)
        sys.exit(2)
    except FloatingPointError as error:  # not the input's fault
        complain(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def complain(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
