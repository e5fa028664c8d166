"""Worker processes as the server sees them: each draws with a model of its own, and is started again when it dies."""

import atexit
import itertools
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from t2i.pipelines.jobs.planning import ModelSource
from t2i.pipelines.serving.draw_request import DrawRequest, ModelFacts
from t2i.pipelines.serving.drawing import CheckedRequest, DrawnImage, EngineLost, Watch
from t2i.pipelines.serving.engine import MAX_SILENCE_SECONDS, EngineCounts
from t2i.pipelines.serving.messages import decode_message, encode_message, unpack_error
from t2i.pipelines.serving.worker import run_worker

from t2i.errors import InputError

logger = logging.getLogger(__name__)

MAX_START_SECONDS = 1800.0  # of imports and loading
# A worker that dies is started again after a second, then after twice as long, unless it lived for a while
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS, LONG_LIFE_SECONDS = 1.0, 60.0, 120.0
TICK_SECONDS = 0.5
CHECK_SECONDS = 10.0  # that a worker may take for a check, which takes it milliseconds
SILENT = "the model does not answer; try again later"


class RemoteDrawer:
    """A drawer whose model is in a process of its own. The methods are those of `Drawer`.

    Args:
        max_batch: images that it draws at the same time.
        processes: those of this machine that load a model on the same device.
    """

    facts: ModelFacts

    def __init__(self, source: ModelSource, max_batch: int, processes: int = 1):
        self.source, self.max_batch, self.processes = source, max_batch, processes
        self.counts, self.starts = EngineCounts(), 0
        self.failure: str | None = None  # of the last start
        self.answers: dict[int, tuple[DrawRequest, SimpleQueue]] = {}  # of requests that it draws, by number
        self.numbers = itertools.count()
        # Guards the answers and the link. Reentrant: a signal's handler cancels in the thread that may just hold it.
        self.lock = threading.RLock()
        self.link: WorkerLink | None = None  # while a worker is ready
        self.report_room: Callable[[float | None], object] = lambda pixels: None
        self.closed, self.tried = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.supervise, name="t2i-worker", daemon=True)
        self.thread.start()
        # Before multiprocessing waits for its processes, which do not end by its signal
        atexit.register(self.close)

    @property
    def is_alive(self) -> bool:
        """True unless the worker could not be started again."""
        return self.failure is None

    def wait_until_ready(self) -> None:
        """Wait for the worker's model. Raises InputError if it cannot be loaded."""
        self.tried.wait()
        if self.failure is not None:
            raise InputError(self.failure)

    def watch_room(self, report: Callable[[float | None], object]) -> None:
        """Report the pixels that fit into the worker's memory, now and when it starts again; None when it dies."""
        with self.lock:
            self.report_room = report
            report(None if self.link is None else self.facts.max_pixels)

    def close(self) -> None:
        """End the worker, and the requests that it draws with EngineLost."""
        atexit.unregister(self.close)
        self.closed.set()
        self.thread.join()

    # Drawing

    def check(self, request: DrawRequest) -> CheckedRequest:
        """Return what the worker's drawer says of a request; see `draw`. Raises EngineLost for one that is silent."""
        fields = request.pack(with_pixels=False)
        return CheckedRequest(**self.ask("check", request, fields, seconds=CHECK_SECONDS))

    def draw(self, request: DrawRequest, watch: Watch | None = None) -> list[DrawnImage]:
        """Return the images of a request. Raises what the worker's drawer raises, and EngineLost if it dies."""
        return [DrawnImage(**image) for image in self.ask("draw", request, request.pack(), watch)["images"]]

    def ask(
        self,
        asked: str,
        request: DrawRequest,
        fields: dict[str, Any],
        watch: Watch | None = None,
        seconds: float | None = None,
    ) -> dict[str, Any]:
        """Return the worker's answer to a message about a request.

        seconds: in which it has to answer; None waits as long as it lives. Raises its error, and EngineLost if it dies
        or is late.
        """
        number, answers = next(self.numbers), SimpleQueue[tuple[str, dict[str, Any]]]()
        with self.lock:
            link = self.link
            if link is None:
                raise EngineLost("the model is being loaded again; try again later")
            # Nobody has to wait to learn what is known already
            if seconds is not None and time.monotonic() - link.last_message > seconds:
                raise EngineLost(SILENT)
            self.answers[number] = request, answers
        try:
            link.send(asked, number=number, request=fields)
            # One that was cancelled meanwhile may have been unknown to the worker
            if request.cancelled.is_set():
                link.send("cancel", number=number)
            while True:
                kind, data = answers.get(timeout=seconds)
                if kind == "done":
                    return {name: value for name, value in data.items() if name != "number"}
                if kind == "failed":
                    raise unpack_error(data)
                if kind == "lost":
                    raise EngineLost("the engine stopped while it drew; try again")
                if kind == "step" and watch is not None:
                    watch.report_step(data["stage"], data["step"], data["steps"])
                if kind == "preview" and watch is not None:
                    watch.show_preview(data["preview"], data["images"])
        except Empty as error:
            raise EngineLost(SILENT) from error
        finally:
            with self.lock:
                self.answers.pop(number, None)

    def cancel(self, request: DrawRequest) -> None:
        """End a request that draws, or will draw, before its next step; from any thread."""
        request.cancelled.set()
        with self.lock:
            if self.link is not None:
                for number in [number for number, (other, _) in self.answers.items() if other is request]:
                    self.link.send("cancel", number=number)

    # The process

    def supervise(self) -> None:
        """Start the worker, again whenever it dies, until the drawer is closed."""
        pause = FIRST_PAUSE_SECONDS
        while not self.closed.is_set():
            start = time.monotonic()
            self.run_process()
            if time.monotonic() - start > LONG_LIFE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            self.closed.wait(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def run_process(self) -> None:
        """Run one process until it ends, hangs, or the drawer is closed; then end the requests that it drew."""
        self.starts += 1
        link = WorkerLink(self.handle_message, (self.source, self.max_batch, self.processes))
        reason = link.wait_for_end(self.closed)
        with self.lock:
            was_ready, self.link = self.link is not None, None
            self.report_room(None)
            lost = list(self.answers.values())
        link.end()
        if not self.closed.is_set():
            what = f"the worker of {self.source.model} on {self.source.device} {reason}"
            # A first start that fails ends the server, with what the worker said
            if was_ready or self.tried.is_set() or self.failure is None:
                logger.error("%s; it is started again, and %d requests failed", what, len(lost))
            if not was_ready:
                self.failure = self.failure or what
        self.tried.set()
        for _, answers in lost:
            answers.put(("lost", {}))

    def handle_message(self, link: "WorkerLink", kind: str, data: dict[str, Any]) -> None:
        """Take a message of the worker, in the thread that reads its connection."""
        if kind == "heartbeat":
            if data:
                self.counts, link.hangs = EngineCounts(**data["counts"]), not data["is_alive"]
        elif kind == "broken":
            self.failure = data["message"]
        elif kind == "ready":
            self.facts, self.failure, link.is_ready = ModelFacts.unpack(data["facts"]), None, True
            with self.lock:
                self.link = link
                self.report_room(self.facts.max_pixels)
            self.tried.set()
        else:
            with self.lock:
                found = self.answers.get(data["number"])
            # It may have ended by an error on this side
            if found is not None:
                found[1].put((kind, data))


class WorkerLink:
    """A worker process and the connection to it. Nothing that the server calls waits for the process.

    handle: called with each message, in a thread of the link. arguments: of `run_worker`.
    """

    def __init__(self, handle: Callable[["WorkerLink", str, dict[str, Any]], object], arguments: tuple):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=run_worker, args=(other, *arguments), daemon=True)
        self.process.start()
        # The last copy of the other end is the worker's, so that its death ends the connection
        other.close()
        self.handle, self.outbox = handle, SimpleQueue[bytes | None]()
        self.is_ready = self.hangs = False
        self.last_message = time.monotonic()
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.read, self.write)]
        for thread in self.threads:
            thread.start()

    def send(self, kind: str, **data: Any) -> None:
        """Send a message without waiting. One to a dead worker is lost."""
        self.outbox.put(encode_message(kind, **data))

    def read(self) -> None:
        """Handle messages until the connection ends."""
        try:
            while True:
                message = self.connection.recv_bytes()
                self.last_message = time.monotonic()
                self.handle(self, *decode_message(message))
        except (EOFError, OSError):
            pass
        finally:
            self.ended.set()

    def write(self) -> None:
        """Write what was sent, until the connection ends."""
        while (message := self.outbox.get()) is not None:
            try:
                self.connection.send_bytes(message)
            except OSError:
                return

    def wait_for_end(self, closed: threading.Event) -> str:
        """Wait until the process dies or hangs, or the event is set, and return what happened."""
        while not self.ended.wait(TICK_SECONDS) and not closed.is_set():
            silence = time.monotonic() - self.last_message
            if self.hangs or silence > (MAX_SILENCE_SECONDS if self.is_ready else MAX_START_SECONDS):
                return f"was silent for {silence:.0f} seconds, or its engine was"
        self.process.join(TICK_SECONDS)
        return f"ended with status {self.process.exitcode}"

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()  # it has nothing to lose; also one that is stopped ends
        self.process.join()
        self.outbox.put(None)
        for thread in self.threads:
            thread.join()
        self.connection.close()
        self.process.close()
