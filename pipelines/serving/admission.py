"""Admission: which requests draw, which wait, and which are refused. It counts images, and is independent of HTTP."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil

RATE_SMOOTHING = 0.9  # of the moving average of the seconds that an image takes
FIRST_GUESS_SECONDS = 1.0  # of an image, before one was drawn


class QueueFull(RuntimeError):
    """A request that is refused because too many images wait. retry_after: seconds until there is room again."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Draining(RuntimeError):
    """A request that comes while the server shuts down."""


@dataclass(eq=False)
class Ticket:
    """A request's place: in the queue until `admitted`, then among those that draw, until it is returned.

    images: how many it draws. key: whose request it is, for requests of one key take turns with those of others.
    """

    images: int
    key: str = ""
    admitted: threading.Event = field(default_factory=threading.Event)
    started: float | None = None


class Admission:
    """A bounded queue of requests, in which keys take turns.

    Args:
        max_running: images that are drawn at the same time.
        max_queued: images that wait, of all keys together.
        max_queued_per_key: images that wait for one key; None is no limit but `max_queued`.
        fits: returns whether memory suffices for so many images at a time; asked before a request draws.
    """

    def __init__(
        self,
        max_running: int,
        max_queued: int,
        max_queued_per_key: int | None = None,
        fits: Callable[[int], bool] = lambda images: True,
    ):
        self.max_running, self.max_queued = max_running, max_queued
        self.max_queued_per_key = max_queued if max_queued_per_key is None else max_queued_per_key
        self.fits = fits
        # Reentrant: a signal's handler drains in the thread that may just hold it
        self.lock = threading.RLock()
        self.queues: OrderedDict[str, deque[Ticket]] = OrderedDict()  # by key; the first one has the next turn
        self.running: set[Ticket] = set()
        self.seconds_per_image = FIRST_GUESS_SECONDS
        self.draining = False

    @property
    def queued_images(self) -> int:
        return sum(ticket.images for queue in self.queues.values() for ticket in queue)

    @property
    def running_images(self) -> int:
        return sum(ticket.images for ticket in self.running)

    def enter(self, images: int, key: str = "") -> Ticket:
        """Return a ticket for a request; its `admitted` is set when it may draw. Raises QueueFull and Draining."""
        ticket = Ticket(images, key)
        with self.lock:
            if self.draining:
                raise Draining("the server is shutting down")
            queued, own = self.queued_images, sum(other.images for other in self.queues.get(key, ()))
            # With others in the queue a request waits too, even if there is room for it
            starts_at_once = not queued and self.running_images + images <= self.max_running
            if not starts_at_once and queued + images > self.max_queued:
                what = f"{queued} images wait, and the queue takes {self.max_queued}"
                raise QueueFull(f"{what}; try again later", self.estimate_wait(queued))
            if not starts_at_once and own + images > self.max_queued_per_key:
                what = f"{own} images of this key wait, and the queue takes {self.max_queued_per_key} of a key"
                raise QueueFull(f"{what}; try again later", self.estimate_wait(own))
            self.queues.setdefault(key, deque()).append(ticket)
            self.admit_next()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Take a request out, whether it waits or draws."""
        with self.lock:
            if ticket in self.running:
                self.running.discard(ticket)
                self.learn_rate(ticket)
            elif ticket in (queue := self.queues.get(ticket.key, deque())):
                queue.remove(ticket)
            # Also after one that waited: it may have been too large for the room, and held up the others
            self.admit_next()

    def admit_next(self) -> None:
        """Admit the requests whose turn it is, while there is room. The lock is held."""
        while ticket := self.find_next():
            self.queues[ticket.key].popleft()
            # The key's next request comes after one of every other key
            self.queues.move_to_end(ticket.key)
            self.running.add(ticket)
            ticket.started = time.monotonic()
            ticket.admitted.set()
        # Else a key would stay for every client that ever asked
        for key in [key for key, queue in self.queues.items() if not queue]:
            del self.queues[key]

    def find_next(self) -> Ticket | None:
        """Return the request whose turn it is; None if there is no room for it, or none waits."""
        ticket = next((queue[0] for queue in self.queues.values() if queue), None)
        if ticket is None:
            return None
        total = self.running_images + ticket.images
        # One request alone is admitted whatever its size: the pipeline itself refuses what cannot fit
        return ticket if not self.running or (total <= self.max_running and self.fits(total)) else None

    def learn_rate(self, ticket: Ticket) -> None:
        """Learn from a request that ended how long an image takes, all that draw at once counted."""
        assert ticket.started is not None
        # The request itself is not among `running` any more
        shared = max(1, len(self.running) + 1)
        seconds = (time.monotonic() - ticket.started) / (ticket.images * shared)
        self.seconds_per_image = RATE_SMOOTHING * self.seconds_per_image + (1 - RATE_SMOOTHING) * seconds

    def estimate_wait(self, images: int) -> float:
        """Return the seconds until so many images are drawn."""
        return images * self.seconds_per_image

    def find_position(self, ticket: Ticket) -> tuple[int, float]:
        """Return the number of images before a request that waits, and the seconds until its turn; else zeros."""
        with self.lock:
            if ticket.admitted.is_set() or ticket not in self.queues.get(ticket.key, ()):
                return 0, 0.0
            before = 0
            # In the order of turns: the first request of each key, then the second of each
            for number in range(max(len(queue) for queue in self.queues.values())):
                for queue in self.queues.values():
                    if number < len(queue):
                        if queue[number] is ticket:
                            # Those that draw are half done on average
                            return before, self.estimate_wait(before + ceil(self.running_images / 2))
                        before += queue[number].images
            raise AssertionError("a waiting request is in a queue")

    def drain(self) -> None:
        """Refuse new requests. Those that wait and those that draw go on."""
        with self.lock:
            self.draining = True
