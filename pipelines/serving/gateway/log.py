"""The log of requests: one line of JSON for each, without what was asked for."""

import json
import logging
import logging.handlers
import re
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from t2i.pipelines.serving.admission import Ticket

from t2i.errors import InputError

REQUEST_LOG = logging.getLogger("t2i.requests")
# Its lines are for programs, and do not mix with messages for people
REQUEST_LOG.propagate = False
CLIENT_GONE = 499  # status in logs of a request whose client went away before the answer


@dataclass
class LogEntry:
    """A request as its line of the log has it, and as metrics count it.

    milliseconds: by stage: "receive" the body, "read" its fields and images, wait in the "queue", "draw", and "send".
    """

    # Of the request
    id: str
    method: str
    route: str
    key: str = ""
    # Of the answer, as far as it is known
    status: int = 0
    error: str | None = None  # the code of the error that was sent
    model: str | None = None
    images: int = 0
    prompt: str | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    first_preview_seconds: float | None = None
    began: float = field(default_factory=time.monotonic)
    marked: float = field(default_factory=time.monotonic)

    def mark(self, stage: str, until: float | None = None) -> None:
        """End a stage, now or at a moment of `time.monotonic`; the next one begins there."""
        now = time.monotonic() if until is None else max(self.marked, until)
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + 1000 * (now - self.marked)
        self.marked = now

    def mark_job(self, ticket: Ticket | None) -> None:
        """End the stages of a job, which may have left the queue before its turn."""
        # A job that was cancelled in the queue has drawn nothing
        started = None if ticket is None else ticket.started
        self.mark("queue", started)
        if started is not None:
            self.mark("draw")

    def note_event(self, kind: str, data: dict[str, Any]) -> None:
        """Note the time of the first preview, and the error of a stream."""
        if kind == "preview" and self.first_preview_seconds is None:
            self.first_preview_seconds = time.monotonic() - self.began
        if kind == "failed":
            self.error = data["error"]["code"]

    def write(self, with_prompt: bool) -> None:
        """Write the line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": self.id,
            "key": self.key or None,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "error": self.error,
            "model": self.model,
            "images": self.images or None,
            "ms": {stage: round(value, 1) for stage, value in self.milliseconds.items()} or None,
            "total_ms": round(1000 * (time.monotonic() - self.began), 1),
            "prompt": self.prompt if with_prompt else None,
        }
        REQUEST_LOG.info(json.dumps({name: value for name, value in line.items() if value is not None}))


def find_entry(request: Request) -> LogEntry:
    """Return the entry of a request; one that nobody writes for an application without the gateway."""
    return getattr(request.state, "entry", None) or LogEntry("", request.method, "")


def choose_request_id(given: str | None) -> str:
    """Return the id that a client gave its request, if it is one; else a new one."""
    # A client's text in a header and in the log must not end a line, nor fill it
    return given if given and re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else f"req_{secrets.token_hex(12)}"


def open_request_log(path: str | Path | None) -> None:
    """Write the log to a file, which may be moved away while it is written, or to stderr. Raises InputError."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if path is not None:
        try:
            handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise InputError(f"log-file {str(path)!r} cannot be written: {error.strerror}") from error
    # A server that starts again in the same process, as in tests, writes each line once
    for other in REQUEST_LOG.handlers[:]:
        REQUEST_LOG.removeHandler(other)
        other.close()
    REQUEST_LOG.addHandler(handler)
    REQUEST_LOG.setLevel(logging.INFO)
