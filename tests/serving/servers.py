"""Servers for tests: on this machine alone, in a thread, without a model where none is needed."""

import io
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from PIL import Image
from t2i.pipelines.serving.admission import Admission
from t2i.pipelines.serving.app import ImagesApi
from t2i.pipelines.serving.draw_request import DrawRequest, ModelFacts
from t2i.pipelines.serving.drawing import CheckedRequest, DrawnImage
from t2i.pipelines.serving.engine import Cancelled, EngineCounts
from t2i.pipelines.serving.gateway.draining import DrainingServer
from t2i.pipelines.serving.gateway.limits import Limits
from t2i.pipelines.serving.service import Service
from t2i.pipelines.serving.store import ImageStore

# What a client of the network sees of shortened limits
SHORT = Limits(
    head_seconds=0.5, body_seconds=0.5, idle_seconds=1, write_seconds=0.3, check_seconds=0.05, exit_seconds=2
)


class PaintDrawer:
    """A drawer without a model: images of one colour, after some steps that wait."""

    facts = ModelFacts(32, 1, math.inf)
    is_alive = True

    def __init__(self, steps: int = 1, step_seconds: float = 0.0, side: int = 32):
        self.steps, self.step_seconds, self.side = steps, step_seconds, side
        self.counts = EngineCounts()
        self.finished: list[DrawRequest] = []

    def check(self, request: DrawRequest) -> CheckedRequest:
        return CheckedRequest([], {})

    def watch_room(self, report: Any) -> None:
        report(self.facts.max_pixels)

    def draw(self, request: DrawRequest, watch: Any = None) -> list[DrawnImage]:
        image = Image.new("RGB", (self.side, self.side), "teal")
        for step in range(self.steps):
            if request.cancelled.wait(self.step_seconds):
                raise Cancelled("cancelled before a step")
            if watch is not None and request.previews:
                watch.show_preview(step, [image] * request.count)
        self.finished.append(request)
        return [DrawnImage(image, {}, request.seed + number) for number in range(request.count)]

    def cancel(self, request: DrawRequest) -> None:
        request.cancelled.set()

    def close(self) -> None:
        pass


class GatedDrawer(PaintDrawer):
    """A drawer that draws when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.opened = threading.Event(), threading.Event()

    def draw(self, request: DrawRequest, watch: Any = None) -> list[DrawnImage]:
        self.began.set()
        assert self.opened.wait(60)
        return super().draw(request, watch)


def build_paint_api(
    drawer: PaintDrawer | None = None, running: int = 8, queued: int = 16, **settings: Any
) -> ImagesApi:
    """Return routes whose images are painted by a `PaintDrawer`."""
    service = Service("tiny", [drawer or PaintDrawer()], Admission(running, queued))
    return ImagesApi({"tiny": service}, ImageStore(), **settings)


@contextmanager
def run_server(api: ImagesApi, limits: Limits = SHORT, drain: float = 5.0) -> Iterator[DrainingServer]:
    """Run the server of `t2i serve` in a thread; `port` is where it listens."""
    server = DrainingServer(api, limits, drain, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    server.port = server.servers[0].sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    server.thread = thread  # type: ignore[attr-defined]
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        api.close()
        assert not thread.is_alive()


class RawClient:
    """A connection of bytes."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.began = time.monotonic()

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, data: bytes | str) -> None:
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def read_to_end(self) -> bytes:
        """Return all bytes until the server closes."""
        found = b""
        with suppress(ConnectionError):
            while chunk := self.socket.recv(65536):
                found += chunk
        return found

    def read_until(self, end: bytes) -> bytes:
        """Return the bytes up to one that ends what is waited for."""
        found = b""
        while not found.endswith(end) and (chunk := self.socket.recv(65536)):
            found += chunk
        return found

    def read_error(self) -> tuple[int, dict[str, Any]]:
        """Return the status and the error of an answer after which the server closes."""
        head, _, body = self.read_to_end().partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)["error"]


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
