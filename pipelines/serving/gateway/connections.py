"""Connections that silent and slow clients cannot hold: what uvicorn's own do not limit."""

import asyncio
import json
import time
from typing import Any

from t2i.pipelines.serving.api.errors import ApiError
from t2i.pipelines.serving.gateway.limits import Limits
from t2i.pipelines.serving.gateway.log import choose_request_id
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

# Bytes that one read takes from a socket: little more is read than what a body may have
READ_BYTES = 32 * 2**10


class GuardedConnection(H11Protocol):
    """A connection that `check` closes when its client sends no request, or reads nothing of an answer.

    Bodies have their limits in `Gateway`, which counts their bytes.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.waiting_since = time.monotonic()  # for a request, or the rest of its headers
        self.head_until: float | None = None  # None: idle, which uvicorn's timer ends, or a request is answered
        self.blocked_since: float | None = None  # nothing of what is to be sent was taken since then
        self.unsent = 0  # bytes, at the last check

    @property
    def is_waiting(self) -> bool:
        """True while no request is answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        others: Any = [other for other in self.connections if not other.transport.is_closing()]
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        self.head_until = self.waiting_since + self.limits.head_seconds
        if len(others) >= self.limits.connections:
            # A client that holds many without a request must not keep others out
            waiting = [other for other in others if other.is_waiting]
            if waiting:
                min(waiting, key=lambda other: other.waiting_since).transport.abort()
            else:
                what = "too many connections; try again later"
                self.refuse(ApiError(503, "overloaded", what, headers={"retry-after": "5"}))

    def data_received(self, data: bytes) -> None:
        if self.is_waiting and self.head_until is None:
            self.head_until = time.monotonic() + self.limits.head_seconds
        super().data_received(data)
        if not self.is_waiting:
            self.head_until = None

    def on_response_complete(self) -> None:
        self.waiting_since = time.monotonic()
        super().on_response_complete()

    def resume_writing(self) -> None:
        self.blocked_since = None
        super().resume_writing()

    def check(self, now: float) -> None:
        """Close the connection if its time is over."""
        # A slow reader makes progress; one that reads nothing makes none
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            self.blocked_since = None
        elif self.blocked_since is None or unsent < self.unsent:
            self.blocked_since = now
        self.unsent = unsent
        if self.blocked_since is not None and now - self.blocked_since > self.limits.write_seconds:
            # Closing would wait for the client to read
            self.transport.abort()
        elif self.head_until is not None and now > self.head_until:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in the API's shape."""
        self.refuse(ApiError(400, "invalid_request", "the request is not valid HTTP, or its headers are too long"))

    def refuse(self, error: ApiError) -> None:
        """Answer with an error and close the connection."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            # Inside another answer it would be taken for a part of it
            self.transport.abort()
            return
        body = json.dumps(error.body).encode()
        headers = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
        headers["x-request-id"] = choose_request_id(None)
        lines = [f"{name}: {value}\r\n" for name, value in (headers | error.headers).items()]
        head = f"HTTP/1.1 {error.status} {STATUS_PHRASES[error.status].decode()}\r\n{''.join(lines)}\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
