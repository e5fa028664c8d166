"""uvicorn's server with connections that are watched, and with an end that loses no request."""

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from t2i.pipelines.serving.gateway.connections import GuardedConnection
from t2i.pipelines.serving.gateway.limits import Limits


class DrainingApi(Protocol):
    """Routes whose requests the server counts and ends."""

    def build_app(self) -> ASGIApp: ...
    def drain(self) -> None: ...
    def count_jobs(self) -> int: ...
    def cancel_all(self) -> None: ...


class DrainingServer(uvicorn.Server):
    """A server that goes on until its requests have ended when it is told to stop, and ends them when told again.

    Meanwhile it listens, is not ready, and refuses new requests.

    drain: seconds for requests to end. Beyond them, they are stopped before their next step.
    """

    def __init__(self, api: DrainingApi, limits: Limits, drain: float = 0.0, **settings: Any):
        connection: Any = partial(GuardedConnection, limits=limits)
        config = uvicorn.Config(
            api.build_app(),
            # Whatever else is installed: limits of connections are those of this loop and this parser
            loop="asyncio",
            http=connection,
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(limits.idle_seconds),
            timeout_graceful_shutdown=math.ceil(limits.exit_seconds),
            h11_max_incomplete_event_size=limits.head_bytes,
            **settings,
        )
        super().__init__(config)
        self.api, self.limits, self.drain = api, limits, drain
        self.signals = 0
        self.next_check = 0.0
        self.stops_at: float | None = None  # when requests are stopped
        self.has_stopped = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Count a signal, and refuse new requests at once; `on_tick` does the rest."""
        # uvicorn's own method would also end the process by the signal afterwards, as if it had failed
        self.signals += 1
        self.api.drain()

    async def on_tick(self, counter: int) -> bool:
        """Look after connections and the end, ten times a second; return True when it is over."""
        if await super().on_tick(counter):
            return True
        now = time.monotonic()
        if now >= self.next_check:
            self.next_check = now + self.limits.check_seconds
            for connection in list(self.server_state.connections):
                connection.check(now)  # type: ignore[union-attr]
        return self.signals > 0 and self.has_drained(now)

    def has_drained(self, now: float) -> bool:
        """Return True when all requests have ended, or their time is over; stop them before that."""
        if self.stops_at is None:
            self.stops_at = now + self.drain
            if jobs := self.api.count_jobs():
                what = f"{jobs} requests have {self.drain:g} seconds to end; a second signal stops them"
                print(f"shutting down: {what}", file=sys.stderr, flush=True)
        if self.signals > 1:
            self.stops_at = min(self.stops_at, now)
        # Answers may still be on their way; uvicorn waits for them
        if not self.api.count_jobs():
            return True
        if now >= self.stops_at and not self.has_stopped:
            self.has_stopped = True
            self.api.cancel_all()
        return now > self.stops_at + self.limits.exit_seconds


@contextmanager
def end_process_after(seconds: float) -> Iterator[None]:
    """End the process with status 1 if what is inside takes longer, such as an engine whose step never ends."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
