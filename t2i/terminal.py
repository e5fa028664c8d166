"""Output that no file name and no console can break."""

import io
import logging
import sys
import unicodedata
from typing import TextIO

# Categories of characters that a terminal may take for commands or for the end of a line: control characters, lone
# surrogates (Python's stand-ins for bytes that are not UTF-8), and separators of lines.
HIDDEN_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def escape_text(text: object) -> str:
    """Return text of unknown origin, such as a file's name, for one line of a terminal: control characters as \\x1b."""
    return "".join(
        character.encode("unicode_escape").decode() if is_hidden(character) else character for character in str(text)
    )


def is_hidden(character: str) -> bool:
    return character in DIRECTION_MARKS or unicodedata.category(character) in HIDDEN_CATEGORIES


def print_line(text: object, file: TextIO | None = None) -> None:
    """Print text on one line, escaped, and at once."""
    # One write per line: the processes of a launcher are unbuffered, and print writes the line's end apart.
    print(f"{escape_text(text)}\n", end="", flush=True, file=file)


def make_output_safe() -> None:
    """Let output escape what the console's encoding lacks, instead of failing; and log file names escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # the handler of programs that configure none
        logging.lastResort.setFormatter(EscapingFormatter())


class EscapingFormatter(logging.Formatter):
    """A format of this project's log records, each on one line. Those of other libraries stay as they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return escape_text(text) if record.name.startswith("t2i.") else text
