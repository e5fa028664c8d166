"""Texts as people and other programs write them: where lines end, and characters that nobody sees."""

import codecs
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from t2i.errors import InputError

Texts = TypeVar("Texts", bound=Iterable[str])

LINE_END = re.compile(r"\r\n|\r|\n")  # not the other separators of str.splitlines, such as U+2028 and form feeds
# Byte-order mark, zero-width space, word joiner, soft hyphen, invisible operators, and marks of the writing direction
INVISIBLE_CHARACTERS = re.compile("[\ufeff\u200b\u2060-\u2064\u00ad\u180e\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Joiners change emoji and the letters of Persian and Indian scripts, and nothing beside Latin letters.
LONE_JOINERS = re.compile("(?<![\u0300-\U0010ffff])[\u200c\u200d]+|[\u200c\u200d]+(?![\u0300-\U0010ffff])")


def normalize_text(text: str) -> str:
    """Return a text with single spaces for white space, also of line ends, and without characters of no width.

    Every tokenizer calls this first, so that prompts, captions and labels that look the same are the same.
    """
    if not text.isascii():
        text = LONE_JOINERS.sub("", INVISIBLE_CHARACTERS.sub("", text))
    return " ".join(text.split())


def wrap_text(texts: str | Texts) -> list[str] | Texts:
    """Return one text as a list of it, for a string is also a sequence of its letters; several texts as they are."""
    return [texts] if isinstance(texts, str) else texts


def find_encoding(start: bytes) -> str:
    """Return the encoding of a text file by its first bytes: UTF-16, as Excel and PowerShell write it, or UTF-8."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decode_text(data: bytes) -> str:
    """Return the text of a file, without its byte-order mark. Raises UnicodeDecodeError."""
    return data.decode(find_encoding(data))


def split_lines(text: str) -> list[str]:
    """Return the lines of a text as an editor shows them: they end with LF, CR LF or CR, and with nothing else."""
    return LINE_END.split(text)


def read_lines(file: Path, content: str) -> list[str]:
    """Return the lines of a text file without the empty ones; "-" is standard input. `content` names them in errors."""
    try:
        text = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        lines = split_lines(decode_text(text))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the {content} in {str(file)!r} ({error}); give a UTF-8 text file") from error
    return [line.strip() for line in lines if normalize_text(line)]
