"""The worker process: it loads a model, and draws what its server sends, until the server is gone."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from PIL import Image
from t2i.pipelines.jobs.planning import ModelSource
from t2i.pipelines.serving.admission import count_spare_images
from t2i.pipelines.serving.draw_request import DrawRequest
from t2i.pipelines.serving.drawing import Drawer, load_drawer
from t2i.pipelines.serving.messages import EXPECTED_ERRORS, decode_message, encode_message, pack_error

from t2i.errors import InputError
from t2i.runtime.memory import return_large_memory

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the thread that started it ends


def run_worker(connection: Connection, source: ModelSource, max_batch: int, processes: int) -> None:
    """Load a model and serve the connection; the function that a worker process runs.

    processes: those of this machine that load a model on the same device.
    """
    end_with_server()
    return_large_memory()
    # The server ends its workers by closing the connection, after they have drawn what they have. Signals that a
    # terminal or systemd sends to all processes are for the server.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    worker = Worker(connection)
    try:
        worker.drawer = load_drawer(source, max_batch, processes)
    except BaseException as error:
        known = isinstance(error, InputError)
        if not known:
            logger.error("%s cannot be loaded", source.model, exc_info=error)
        worker.send("broken", message=str(error) if known else f"{source.model} cannot be loaded: {error!r}")
        os._exit(1)
    worker.threads = ThreadPoolExecutor(max_batch + count_spare_images(max_batch), thread_name_prefix="t2i-request")
    with suppress(EOFError, OSError):  # the server is gone, or closed the connection
        worker.send("ready", facts=worker.drawer.facts.pack())
        worker.receive()
    # Without waiting for threads, for one may hang
    os._exit(0)


def end_with_server() -> None:
    """Have the system kill this process when its server dies: one that is stopped, or hangs, would not notice.

    Elsewhere than on Linux, heartbeats alone end it.
    """
    if sys.platform != "linux":
        return
    server = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have died before
    if server is not None and os.getppid() != server.pid:
        os._exit(0)


class Worker:
    """The server's side of a drawer, in the worker's process."""

    drawer: Drawer | None = None  # while the model loads
    threads: ThreadPoolExecutor

    def __init__(self, connection: Connection):
        self.connection, self.lock = connection, threading.Lock()
        self.requests: dict[int, DrawRequest] = {}  # that wait or draw, by number
        self.heart = threading.Thread(target=self.beat, name="t2i-heartbeat", daemon=True)
        self.heart.start()

    def send(self, kind: str, **data: Any) -> None:
        """Send a message, from any thread. Raises OSError if the server is gone."""
        message = encode_message(kind, **data)
        with self.lock:
            self.connection.send_bytes(message)

    def beat(self) -> None:
        """Tell the server once a second that the process lives, and whether the engine does; end with the server."""
        try:
            while True:
                state: dict[str, Any] = {}
                if self.drawer is not None:
                    state = {"is_alive": self.drawer.is_alive, "counts": asdict(self.drawer.counts)}
                self.send("heartbeat", **state)
                time.sleep(HEARTBEAT_SECONDS)
        except OSError:
            os._exit(0)

    def receive(self) -> None:
        """Start and cancel requests as the server says. Raises EOFError when it closes the connection."""
        assert self.drawer is not None
        while True:
            kind, data = decode_message(self.connection.recv_bytes())
            number = data["number"]
            if kind == "check":
                # At once, whatever is drawn: it takes milliseconds
                self.answer(number, partial(self.check, DrawRequest(**data["request"])))
            elif kind == "draw":
                self.requests[number] = DrawRequest(**data["request"])
                self.threads.submit(self.draw, number)
            elif kind == "cancel" and (request := self.requests.get(number)) is not None:
                self.drawer.cancel(request)

    def check(self, request: DrawRequest) -> dict[str, Any]:
        """Return what is known of a request before it is drawn."""
        assert self.drawer is not None
        return vars(self.drawer.check(request))

    def draw(self, number: int) -> None:
        """Draw a request, and send what becomes of it."""
        drawer = self.drawer
        assert drawer is not None

        def run() -> dict[str, Any]:
            return {"images": [vars(one) for one in drawer.draw(self.requests[number], RemoteWatch(self, number))]}

        self.answer(number, run)

    def answer(self, number: int, run: Callable[[], dict[str, Any]]) -> None:
        """Send what a function returns for a request, or its error."""
        try:
            message: tuple[str, dict[str, Any]] = "done", run()
        except BaseException as error:
            packed = pack_error(error)
            if packed["error"] not in EXPECTED_ERRORS:
                logger.error("drawing failed in process %d", os.getpid(), exc_info=error)
            message = "failed", packed
        self.requests.pop(number, None)
        with suppress(OSError):  # the server is gone
            self.send(message[0], number=number, **message[1])


class RemoteWatch:
    """A `Watch` that sends to the server what it sees."""

    def __init__(self, worker: Worker, number: int):
        self.worker, self.number = worker, number

    def report_step(self, stage: str, step: int, steps: int) -> None:
        self.worker.send("step", number=self.number, stage=stage, step=step, steps=steps)

    def show_preview(self, number: int, images: list[Image.Image]) -> None:
        self.worker.send("preview", number=self.number, preview=number, images=images)
