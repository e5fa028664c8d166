"""Output: no console's encoding ends a run, and no file name reaches a terminal as commands."""

import io
import logging
import sys

import pytest

from t2i.errors import InputError, report_errors
from t2i.terminal import EscapingFormatter, escape_text, print_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("out/a cat-1.png", "out/a cat-1.png"),
        (
            "日本 \u202f\u200d😀.png",
            "日本 \u202f\u200d😀.png",
        ),  # the narrow space of macOS' screenshots, an emoji's joiner
        ("\x1b[31mred\r\n\t\x9b.png", "\\x1b[31mred\\r\\n\\t\\x9b.png"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("caf\udce9.png", "caf\\udce9.png"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_control_characters_are_escaped_and_letters_are_not(text, shown):
    assert escape_text(text) == shown


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"\\u65e5 caf\\xe9\n"), ("cp1252", b"\\u65e5 caf\xe9\n"), ("utf-8", "日 café\n".encode())],
)
def test_what_a_console_cannot_show_is_escaped_and_nothing_fails(monkeypatch, encoding, shown):
    buffers = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, buffer in buffers.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding))
    with pytest.raises(SystemExit) as caught, report_errors():
        print_line("日 café")
        print("日 café", flush=True)  # by another library
        raise InputError("日 café")
    assert caught.value.code == 2
    assert buffers["stdout"].getvalue() == 2 * shown and buffers["stderr"].getvalue() == b"error: " + shown


def test_errors_and_logs_are_escaped(capsys):
    with pytest.raises(SystemExit), report_errors():
        raise OSError("cannot read a\x1b[2J.png")
    assert capsys.readouterr().err == "error: cannot read a\\x1b[2J.png\n"
    records = {
        name: logging.LogRecord(name, logging.WARNING, "", 1, "%s is here", ("a\x1b\n.png",), None)
        for name in ("t2i.files.atomic", "other")
    }
    assert EscapingFormatter().format(records["t2i.files.atomic"]) == "a\\x1b\\n.png is here"
    assert EscapingFormatter().format(records["other"]) == "a\x1b\n.png is here"
