"""The service behind the routes: requests wait for their turn, draw in threads, and report events."""

import time
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from t2i.pipelines.serving.admission import Admission, Ticket
from t2i.pipelines.serving.drawing import Drawer, DrawnImage, DrawRequest
from t2i.pipelines.serving.engine import Cancelled
from t2i.pipelines.serving.events import Event, EventFeed

MAX_SILENCE_SECONDS = 60.0  # of an engine; a step of the largest models takes less


class Job:
    """A request from its arrival to its end, made in the event loop that reads its `events`."""

    def __init__(self, request: DrawRequest, ticket: Ticket):
        self.request, self.ticket, self.events = request, ticket, EventFeed()

    # A `Watch`

    def report_step(self, stage: str, step: int, steps: int) -> None:
        self.events.put(Event("step", {"stage": stage, "step": step, "steps": steps}))

    def show_preview(self, number: int, images: list[Image.Image]) -> None:
        self.events.put(Event("preview", {"number": number, "images": images}))


class Service:
    """One model that draws for many.

    Args:
        name: of the model in the API.
        queue_timeout: seconds that a request may wait for its turn.
    """

    def __init__(self, name: str, drawer: Drawer, admission: Admission, queue_timeout: float = 300.0):
        self.name, self.drawer, self.admission, self.queue_timeout = name, drawer, admission, queue_timeout
        self.created = int(time.time())
        # A thread for each request that draws or waits: each has one image at least
        limit = admission.max_running + admission.max_queued
        self.threads = ThreadPoolExecutor(limit, thread_name_prefix="t2i-request")
        self.jobs: set[Job] = set()

    @property
    def is_alive(self) -> bool:
        """True while the engine takes steps, or waits for some."""
        return time.monotonic() - self.drawer.engine.last_heartbeat < MAX_SILENCE_SECONDS

    def submit(self, request: DrawRequest, key: str = "") -> Job:
        """Start a request. Raises QueueFull and Draining."""
        job = Job(request, self.admission.enter(request.count, key))
        self.jobs.add(job)
        self.threads.submit(self.run, job)
        return job

    def run(self, job: Job) -> None:
        """Wait for the job's turn, draw, and end with the event "done" or "failed"."""
        try:
            if not job.ticket.admitted.wait(self.queue_timeout):
                raise TimeoutError(f"the request waited {self.queue_timeout:g} seconds for its turn; try again later")
            if job.request.cancelled.is_set():
                raise Cancelled("cancelled before it began")
            images: list[DrawnImage] = self.drawer.draw(job.request, job)
            job.events.put(Event("done", {"images": images}))
        except BaseException as error:
            # Whatever went wrong, the client waits for an end
            job.events.put(Event("failed", {"error": error}))
        finally:
            self.admission.leave(job.ticket)
            self.jobs.discard(job)

    def cancel(self, job: Job) -> None:
        """End a job before its next step, from any thread. One that has ended takes no harm."""
        self.drawer.engine.cancel(job.request.cancelled)
        job.ticket.admitted.set()  # wakes a job that waits

    def cancel_all(self) -> None:
        """End all jobs before their next step."""
        for job in list(self.jobs):
            self.cancel(job)

    def close(self) -> None:
        """Refuse new requests, end all jobs and the engine."""
        self.admission.drain()
        self.cancel_all()
        self.threads.shutdown()
        self.drawer.engine.close()
