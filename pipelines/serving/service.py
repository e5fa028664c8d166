"""The service behind the routes: requests wait for their turn, draw in threads, and report events."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce
from typing import Protocol

from PIL import Image
from t2i.pipelines.serving.admission import Admission, Draining, Ticket
from t2i.pipelines.serving.draw_request import DrawRequest, ModelFacts
from t2i.pipelines.serving.drawing import CheckedRequest, DrawnImage, EngineLost, Watch
from t2i.pipelines.serving.engine import Cancelled, EngineCounts
from t2i.pipelines.serving.events import Event, EventFeed
from t2i.pipelines.serving.pace import Pace

from t2i.errors import InputError

QUEUE_TICK_SECONDS = 0.5  # between two looks at the requests that wait
CHECKING_THREADS = 4
MAX_SQUARES = 64  # of the model's size that a request may draw, unless the server is told otherwise


class AnyDrawer(Protocol):
    """A drawer of a service's requests: a `Drawer` in this process, or a `RemoteDrawer`, which speaks to a worker's."""

    facts: ModelFacts

    @property
    def is_alive(self) -> bool: ...
    @property
    def counts(self) -> EngineCounts: ...
    def check(self, request: DrawRequest) -> CheckedRequest: ...
    def wait_until_ready(self) -> None: ...
    def watch_room(self, report: Callable[[float | None], object]) -> None: ...
    def draw(self, request: DrawRequest, watch: Watch | None = None) -> list[DrawnImage]: ...
    def cancel(self, request: DrawRequest) -> None: ...
    def close(self) -> None: ...


class Job:
    """A request from its arrival to its end, made in the event loop that reads its `events`."""

    ticket: Ticket | None = None  # while it enters
    position: tuple[int, float] | None = None  # in the queue, as it was reported last
    is_stopped = False  # by the server, which shuts down

    def __init__(self, request: DrawRequest):
        self.request, self.events = request, EventFeed()

    def report_position(self, position: tuple[int, float]) -> None:
        """Report the number of images that come before, and the seconds until the job's turn."""
        if self.request.progress and position != self.position:
            self.position = position
            self.events.put(Event("queued", {"position": position[0], "seconds": round(position[1], 1)}))

    # A `Watch`

    def report_step(self, stage: str, step: int, steps: int) -> None:
        self.events.put(Event("step", {"stage": stage, "step": step, "steps": steps}))

    def show_preview(self, number: int, images: list[Image.Image]) -> None:
        self.events.put(Event("preview", {"number": number, "images": images}))


class Service:
    """One model that draws for many.

    Args:
        name: of the model in the API.
        drawers: of the same model, one for each lane of the admission.
        queue_timeout: seconds that a request may wait for its turn.
        max_pixels: of all images that a request draws, or gives to a pass of the upsampler; None is `MAX_SQUARES` times
            the model's square.
    """

    def __init__(
        self,
        name: str,
        drawers: Sequence[AnyDrawer],
        admission: Admission,
        queue_timeout: float = 300.0,
        max_pixels: int | None = None,
    ):
        self.given_max_pixels = max_pixels
        self.name, self.drawers, self.admission, self.queue_timeout = name, drawers, admission, queue_timeout
        self.created, self.pace = int(time.time()), Pace()
        # A thread for each request that draws: each has one image at least
        self.threads = ThreadPoolExecutor(admission.max_running, thread_name_prefix="t2i-request")
        # Of this model's own, so that a worker that hangs holds up no other model, and neither images nor words
        self.checking_threads = ThreadPoolExecutor(CHECKING_THREADS, thread_name_prefix="t2i-check")
        self.jobs: set[Job] = set()
        for lane, drawer in zip(admission.lanes, drawers, strict=True):
            drawer.watch_room(partial(admission.set_room, lane))
        self.closed = threading.Event()
        threading.Thread(target=self.watch_queue, name="t2i-queue", daemon=True).start()

    @property
    def drawer(self) -> AnyDrawer:
        """The first drawer; any is as good for questions about the model."""
        return self.drawers[0]

    @property
    def counts(self) -> EngineCounts:
        """The counts of all engines together."""
        return reduce(EngineCounts.add, (drawer.counts for drawer in self.drawers))

    @property
    def facts(self) -> ModelFacts:
        return self.drawer.facts

    @property
    def max_pixels(self) -> int:
        """The most pixels of all images that a request draws, or gives to a pass of the upsampler."""
        square = self.facts.image_size**2
        return MAX_SQUARES * square if self.given_max_pixels is None else self.given_max_pixels

    @property
    def is_alive(self) -> bool:
        """True while an engine takes steps, or waits for some."""
        return any(drawer.is_alive for drawer in self.drawers)

    @property
    def is_ready(self) -> bool:
        """True while an engine is there to draw."""
        return any(lane.is_open for lane in self.admission.lanes)

    async def check(self, request: DrawRequest) -> CheckedRequest:
        """Check a request before it waits. Raises InputError, and EngineLost while nothing can check it."""
        return await asyncio.get_running_loop().run_in_executor(self.checking_threads, self.check_now, request)

    def check_now(self, request: DrawRequest) -> CheckedRequest:
        """Return what a drawer says of a request, and the unknown words of its texts, which are sought here alone."""
        self.check_pixels(request)
        checked, known = self.ask_drawers(request), self.facts.known_words
        found = [] if known is None else known.find_unknown_words(*request.list_texts())
        unknown = [word for word in found if not word.is_keyword]
        if unknown and (request.strict or self.facts.is_strict):
            raise InputError(f"prompt has unknown words: {'. '.join(map(str, unknown))}")
        return replace(checked, unknown_words=found)

    def check_pixels(self, request: DrawRequest) -> None:
        """Raise InputError for a request that draws, or enlarges in a pass, more pixels than it may."""
        drawn, enlarged = request.count_drawn_pixels(self.facts), request.count_enlarged_pixels(self.facts)
        limit = f"this server takes at most {self.max_pixels:,} of a request"
        if drawn > self.max_pixels:
            raise InputError(f"{request.find_size_setting()} asks for {drawn:,} pixels in all; {limit}")
        if enlarged > self.max_pixels:
            raise InputError(f"upsample asks for a last pass over {enlarged:,} pixels in all; {limit}")

    def ask_drawers(self, request: DrawRequest) -> CheckedRequest:
        """Return what the first drawer that answers says of a request."""
        opened = [drawer for lane, drawer in zip(self.admission.lanes, self.drawers) if lane.is_open]
        for drawer in opened[:-1]:
            with suppress(EngineLost):
                return drawer.check(request)
        return (opened or self.drawers)[-1].check(request)

    def submit(self, request: DrawRequest, key: str = "") -> Job:
        """Start a request. Raises QueueFull and Draining, and EngineLost while nothing can draw."""
        # While a worker starts again requests wait for it; one that cannot start would let them wait for nothing
        if not self.is_alive:
            raise EngineLost(f"{self.name} cannot be drawn with now; try again later")
        job = Job(request)
        pixels = request.count_pixels(self.drawer.facts)
        self.jobs.add(job)
        try:
            job.ticket = self.admission.enter(
                *(request.count, key, pixels, request.input_bytes),
                lambda ticket: self.threads.submit(self.run, job, ticket),
            )
        except BaseException:
            self.jobs.discard(job)
            raise
        if position := self.admission.find_positions().get(job.ticket):
            job.report_position(position)
        return job

    def run(self, job: Job, ticket: Ticket) -> None:
        """Draw a job whose turn it is, in a thread."""
        try:
            if job.request.cancelled.is_set():
                raise Cancelled("cancelled before it began")
            event = Event("done", {"images": self.find_drawer(ticket).draw(job.request, job)})
        except BaseException as error:
            # Whatever went wrong, the client waits for an end
            event = Event("failed", {"error": error})
        # Before others are admitted to their memory
        job.request.drop_inputs()
        self.admission.leave(ticket, event.kind == "done")
        self.finish(job, event)

    def find_drawer(self, ticket: Ticket) -> AnyDrawer:
        """Return the drawer of the lane that a request was admitted to."""
        assert ticket.lane is not None
        return self.drawers[self.admission.lanes.index(ticket.lane)]

    def finish(self, job: Job, event: Event) -> None:
        """End a job with the event "done" or "failed"."""
        if job.is_stopped and isinstance(event.data.get("error"), Cancelled):
            event = Event("failed", {"error": Draining("the server shut down before the images were drawn")})
        self.jobs.discard(job)
        job.events.put(event)

    def watch_queue(self) -> None:
        """Report their positions to the jobs that wait, and end those that waited too long, until the service ends."""
        while not self.closed.wait(QUEUE_TICK_SECONDS):
            positions = self.admission.find_positions()
            now = time.monotonic()
            for job in list(self.jobs) if positions else []:
                if job.ticket is None or job.ticket not in positions:
                    continue
                job.report_position(positions[job.ticket])
                if now - job.ticket.entered > self.queue_timeout:
                    reason = f"the request waited {self.queue_timeout:g} seconds for its turn; try again later"
                    self.withdraw(job, TimeoutError(reason))

    def withdraw(self, job: Job, error: Exception) -> bool:
        """End a job that waits; return False if it does not wait any more."""
        assert job.ticket is not None
        if waited := self.admission.withdraw(job.ticket):
            job.request.drop_inputs()
            self.finish(job, Event("failed", {"error": error}))
        return waited

    def cancel(self, job: Job) -> None:
        """End a job before its next step, from any thread. One that has ended takes no harm."""
        job.request.cancelled.set()
        assert job.ticket is not None
        if not self.withdraw(job, Cancelled("cancelled before it began")) and job.ticket.is_admitted:
            self.find_drawer(job.ticket).cancel(job.request)

    def cancel_all(self) -> None:
        """End all jobs before their next step."""
        for job in list(self.jobs):
            self.cancel(job)

    def close(self) -> None:
        """Refuse new requests, end all jobs and the engines."""
        self.admission.drain()
        self.closed.set()
        self.cancel_all()
        for drawer in self.drawers:
            drawer.close()
        self.threads.shutdown()
        self.checking_threads.shutdown()
