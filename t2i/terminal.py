"""Output that no file name and no console can break: results, notes, and the status line of a terminal."""

import io
import logging
import os
import sys
import unicodedata
import warnings
from contextlib import suppress
from typing import TextIO

# Categories of characters that a terminal may take for commands or for the end of a line: control characters, lone
# surrogates (Python's stand-ins for bytes that are not UTF-8), and separators of lines.
HIDDEN_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

# What `--quiet` sets, also for the processes that a command starts. The others are variables of libraries.
QUIET_ENVIRONMENT = {
    "T2I_QUIET": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}

status = ""  # the text that stands in the last line of the terminal and is replaced in place


def escape_text(text: object) -> str:
    """Return text of unknown origin, such as a file's name, for one line of a terminal: control characters as \\x1b."""
    return "".join(
        character.encode("unicode_escape").decode() if is_hidden(character) else character for character in str(text)
    )


def is_hidden(character: str) -> bool:
    return character in DIRECTION_MARKS or unicodedata.category(character) in HIDDEN_CATEGORIES


def print_line(text: object, file: TextIO | None = None) -> None:
    """Print text on one line, escaped, and at once; above the status line, if there is one."""
    shown = status
    show_status("")
    # One write per line: the processes of a launcher are unbuffered, and print writes the line's end apart.
    print(f"{escape_text(text)}\n", end="", flush=True, file=file)
    show_status(shown)


def print_note(text: object, file: TextIO | None = None, is_shown: bool = True) -> None:
    """Print what is neither a result nor an error, as `print_line` does; nothing with `--quiet`.

    is_shown: False prints nothing, in all but one of several processes.
    """
    if is_shown and not is_quiet():
        print_line(text, file)


def show_status(text: str) -> None:
    """Replace the status line, the last line of the terminal on standard error; "" removes it."""
    global status
    if text == status:
        return
    # Spaces erase it on every terminal. A terminal that has gone must not end the work.
    padding = max(0, count_columns(status) - count_columns(text))
    with suppress(OSError, ValueError):
        print(f"\r{text}{' ' * padding}" + ("" if text else "\r"), end="", flush=True, file=sys.stderr)
    status = text


def count_columns(text: str) -> int:
    """Return the width of a text on a terminal: wide letters, such as Chinese ones, take two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def format_duration(seconds: float) -> str:
    """Return a duration in at most two units, such as "3 d 4 h", "2 h 5 min", "12 min" or "45 s"."""
    # Rounded before the comparison: 59.9 s are 1 min, not 60 s
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def is_quiet() -> bool:
    """Return True if nothing but results and errors is to be printed."""
    return os.environ.get("T2I_QUIET", "") not in ("", "0")


def be_quiet() -> None:
    """Print nothing but results and errors from now on, also in the processes that this one starts."""
    os.environ.update(QUIET_ENVIRONMENT)
    make_output_safe()


def make_output_safe() -> None:
    """Let output escape what the console's encoding lacks, instead of failing; and log file names escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # the handler of programs that configure none
        logging.lastResort.setFormatter(EscapingFormatter())
        logging.lastResort.addFilter(remove_status_before)
        logging.lastResort.setLevel(logging.ERROR if is_quiet() else logging.WARNING)
    if is_quiet():
        warnings.simplefilter("ignore")


def remove_status_before(record: logging.LogRecord) -> bool:
    """Pass each log record on, after the line that it would be appended to is gone."""
    show_status("")
    return True


class EscapingFormatter(logging.Formatter):
    """A format of this project's log records, each on one line. Those of other libraries stay as they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return escape_text(text) if record.name.startswith("t2i.") else text
