"""The exceptions of this project, and how a program reports them and exits."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from t2i.terminal import make_output_safe, print_line

RESUMABLE_STATUS = 75  # exit status of a run that was stopped and can be resumed (EX_TEMPFAIL of sysexits.h)


class InputError(ValueError):
    """Bad input: one line with the thing, its value and what is allowed. Raised before any work starts."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        if len(line) > 1000:  # a message may quote a whole file
            line = f"{line[:490]} ... {line[-500:]}"
        super().__init__(line)


class RunError(RuntimeError):
    """A run that failed for another reason than its input: one line with what happened and what is kept."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class RunStopped(Exception):
    """A run that was stopped and has saved its state. `status` is the exit status of the program."""

    def __init__(self, message: str, status: int = RESUMABLE_STATUS):
        super().__init__(message)
        self.status = status


@contextmanager
def report_errors() -> Iterator[None]:
    """Print errors as one line on standard error and exit.

    Exit status: 2 for bad input, 1 for a run that failed, 75 for a run that was stopped and can be resumed, 130 for
    Ctrl-C.
    """
    make_output_safe()
    try:
        yield
    except RunStopped as stopped:
        print_line(stopped, sys.stderr)
        sys.exit(stopped.status)
    except (InputError, OSError, RunError) as error:  # the message of an OSError contains the file and the reason
        print_error_line(error)
        sys.exit(1 if isinstance(error, RunError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)


def print_error_line(error: object) -> None:
    print_line(f"error: {' '.join(str(error).split())}", sys.stderr)
