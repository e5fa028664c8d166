"""Admission: which requests draw, which wait, and which are refused. It counts images, and is independent of HTTP."""

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, inf

RATE_SMOOTHING = 0.9  # of the moving average of the seconds that an image takes
FIRST_GUESS_SECONDS = 1.0  # of an image, before one was drawn


class QueueFull(RuntimeError):
    """A request that is refused because too many images wait. retry_after: seconds until there is room again."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class KeyLimit(QueueFull):
    """A request that is refused because too many images of its own key wait."""


class Draining(RuntimeError):
    """A request that comes while the server shuts down."""


@dataclass(eq=False)
class Ticket:
    """A request's place: in the queue until it has a `lane`, then among those that draw, until it is returned.

    images: how many it draws. key: whose request it is, for requests of one key take turns with those of others.
    pixels: of all its images, by which memory is counted. input_bytes: of what it is given, once it draws.
    on_admitted: called with the ticket at its turn, with the lock of the admission held. passed: images of other keys
    that began while it had the turn, but no room.
    """

    images: int
    key: str = ""
    pixels: int = 0
    input_bytes: int = 0
    on_admitted: Callable[["Ticket"], object] = lambda ticket: None
    lane: "Lane | None" = None
    entered: float = field(default_factory=time.monotonic)
    started: float | None = None
    passed: int = 0

    @property
    def is_admitted(self) -> bool:
        return self.lane is not None


@dataclass(eq=False)
class Lane:
    """The room of one engine, for images that it draws at the same time.

    max_images, max_pixels: the most at a time; pixels are those that fit into memory. is_open: False while there is no
    engine.
    """

    max_images: int
    max_pixels: float = inf
    is_open: bool = True
    running: set[Ticket] = field(default_factory=set)

    @property
    def images(self) -> int:
        return sum(ticket.images for ticket in self.running)

    def has_room(self, ticket: Ticket) -> bool:
        """Return True if a request may draw beside those that do; a key that draws nothing has a little more room."""
        # One request alone is admitted whatever its size: the pipeline itself refuses what cannot fit
        if not self.running:
            return self.is_open
        images = self.images + ticket.images
        pixels = sum(other.pixels for other in self.running) + ticket.pixels
        is_first = all(other.key != ticket.key for other in self.running)
        max_images = self.max_images + (count_spare_images(self.max_images) if is_first else 0)
        return self.is_open and images <= max_images and pixels <= self.max_pixels


def count_spare_images(max_images: int) -> int:
    """Return how many images more than others a lane takes for a key that draws nothing there.

    So a key that asks for little does not wait for one that fills the lane.
    """
    return max_images // 4


class Admission:
    """A bounded queue of requests, in which keys take turns. The lane that draws the fewest images takes the next one.

    Args:
        max_running: images that a lane draws at the same time; see also `count_spare_images`.
        max_queued: images that wait, of all keys together.
        max_queued_per_key: images that wait for one key; None is no limit but `max_queued`.
        lanes: number of engines.
        max_input_bytes: of what the requests that draw at the same time are given, in all lanes.
    """

    def __init__(
        self,
        max_running: int,
        max_queued: int,
        max_queued_per_key: int | None = None,
        lanes: int = 1,
        max_input_bytes: float = inf,
    ):
        self.lanes = [Lane(max_running) for _ in range(lanes)]
        self.max_queued, self.max_input_bytes = max_queued, max_input_bytes
        self.max_queued_per_key = max_queued if max_queued_per_key is None else max_queued_per_key
        # Reentrant: a signal's handler drains in the thread that may just hold it
        self.lock = threading.RLock()
        self.queues: OrderedDict[str, deque[Ticket]] = OrderedDict()  # by key; the first one has the next turn
        self.seconds_per_image = FIRST_GUESS_SECONDS
        self.draining = False
        self.coming: set[Ticket] = set()  # of requests that are still read

    @property
    def max_running(self) -> int:
        return sum(lane.max_images + count_spare_images(lane.max_images) for lane in self.lanes)

    @property
    def queued_images(self) -> int:
        with self.lock:
            return sum(ticket.images for queue in self.queues.values() for ticket in queue)

    @property
    def running_images(self) -> int:
        with self.lock:
            return sum(lane.images for lane in self.lanes)

    def enter(
        self,
        images: int,
        key: str = "",
        pixels: int = 0,
        input_bytes: int = 0,
        on_admitted: Callable[[Ticket], object] = lambda ticket: None,
    ) -> Ticket:
        """Return a ticket for a request; see `Ticket`. Raises QueueFull and Draining."""
        ticket = Ticket(images, key, pixels, input_bytes, on_admitted)
        with self.lock:
            if self.draining:
                raise Draining("the server is shutting down")
            queued, own = self.queued_images, sum(other.images for other in self.queues.get(key, ()))
            self.queues.setdefault(key, deque()).append(ticket)
            self.admit_next()
            if not ticket.is_admitted:
                try:
                    self.check_places(images, queued, own)
                except QueueFull:
                    self.withdraw(ticket)
                    raise
        return ticket

    @contextmanager
    def expect(self, images: int, key: str = "") -> Iterator[None]:
        """Count a request that is still read, and enters afterwards. Raises QueueFull and Draining, as `enter` does.

        A full queue is noticed before the request's images are decoded, also by many that come at the same time.
        """
        ticket = Ticket(images, key)
        with self.lock:
            if self.draining:
                raise Draining("the server is shutting down")
            before = [*self.coming, *(other for queue in self.queues.values() for other in queue)]
            queued = sum(other.images for other in before)
            own = sum(other.images for other in before if other.key == key)
            # Those that will draw at once do not wait; one alone may be larger than its lane
            free = sum(max(lane.max_images - lane.images, 0) for lane in self.lanes if lane.is_open)
            is_first = not queued and any(lane.has_room(ticket) for lane in self.lanes)
            if queued + images > free and not is_first:
                self.check_places(images, max(0, queued - free), max(0, own - free))
            self.coming.add(ticket)
        try:
            yield
        finally:
            with self.lock:
                self.coming.discard(ticket)

    def check_places(self, images: int, queued: int, own: int) -> None:
        """Refuse images for which the queue has no place beside those that wait; own: of the same key."""
        if queued + images > self.max_queued:
            what = f"{queued} images wait, and the queue takes {self.max_queued}"
            raise QueueFull(f"{what}; try again later", self.estimate_wait(queued))
        if own + images > self.max_queued_per_key:
            what = f"{own} images of this key wait, and the queue takes {self.max_queued_per_key} of a key"
            raise KeyLimit(f"{what}; try again later", self.estimate_wait(own))

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a request out of the queue; return False if it does not wait there."""
        with self.lock:
            queue = self.queues.get(ticket.key, deque())
            if ticket not in queue:
                return False
            queue.remove(ticket)
            # It may have been too large for the room, and held up the others
            self.admit_next()
            return True

    def leave(self, ticket: Ticket, has_drawn: bool = True) -> None:
        """Take a request out, whether it waits or draws. has_drawn: to its end, which tells how long an image takes."""
        with self.lock:
            if not self.withdraw(ticket) and ticket.lane is not None and ticket in ticket.lane.running:
                if has_drawn:
                    self.learn_rate(ticket)
                ticket.lane.running.discard(ticket)
                self.admit_next()

    def set_room(self, lane: Lane, max_pixels: float | None) -> None:
        """Open a lane, with the pixels that fit into its memory at once; None closes it for further requests."""
        with self.lock:
            lane.is_open = max_pixels is not None
            lane.max_pixels = inf if max_pixels is None else max_pixels
            self.admit_next()

    def admit_next(self) -> None:
        """Admit the requests whose turn it is, while there is room. The lock is held."""
        self.drop_empty_queues()
        while found := self.find_next():
            ticket, lane = found
            first = self.list_first()
            for other in first[: first.index(ticket)]:
                other.passed += ticket.images
            self.queues[ticket.key].popleft()
            # The key's next request comes after one of every other key
            self.queues.move_to_end(ticket.key)
            self.drop_empty_queues()
            lane.running.add(ticket)
            ticket.started, ticket.lane = time.monotonic(), lane
            ticket.on_admitted(ticket)

    def drop_empty_queues(self) -> None:
        """Drop the queues of keys of which no request waits, or there would be one for every client that ever asked."""
        for key in [key for key, queue in self.queues.items() if not queue]:
            del self.queues[key]

    def list_first(self) -> list[Ticket]:
        """Return the first request of each key, in the order of turns."""
        return [queue[0] for queue in self.queues.values()]

    def find_next(self) -> tuple[Ticket, Lane] | None:
        """Return the next request that there is room for, and its lane; None if there is none.

        One that needs more room than there is lets the requests of other keys pass, up to as many images as its own:
        then they wait until it begins, or it never would.
        """
        for ticket in self.list_first():
            lanes = [lane for lane in self.lanes if lane.has_room(ticket)]
            if lanes and self.has_memory(ticket):
                return ticket, min(lanes, key=lambda lane: lane.images)
            if ticket.passed >= ticket.images:
                return None
        return None

    def has_memory(self, ticket: Ticket) -> bool:
        """Return True if what a request is given may be held beside what those that draw have; of one alone, it may."""
        held = sum(other.input_bytes for lane in self.lanes for other in lane.running)
        return not held or held + ticket.input_bytes <= self.max_input_bytes

    def learn_rate(self, ticket: Ticket) -> None:
        """Learn from a request that ends how long an image takes, all that draw at once counted."""
        assert ticket.started is not None
        shared = sum(len(lane.running) for lane in self.lanes)
        seconds = (time.monotonic() - ticket.started) / (ticket.images * shared)
        self.seconds_per_image = RATE_SMOOTHING * self.seconds_per_image + (1 - RATE_SMOOTHING) * seconds

    def estimate_wait(self, images: int) -> float:
        """Return the seconds until so many images are drawn."""
        return images * self.seconds_per_image

    def find_positions(self) -> dict[Ticket, tuple[int, float]]:
        """Return, for each request that waits, the number of images before it and the seconds until its turn."""
        positions, before = {}, 0
        with self.lock:
            # Those that draw are half done on average
            running = ceil(self.running_images / 2)
            # In the order of turns: the first request of each key, then the second of each
            for turn in itertools.zip_longest(*self.queues.values()):
                for ticket in turn:
                    if ticket is not None:
                        positions[ticket] = before, self.estimate_wait(before + running)
                        before += ticket.images
        return positions

    def drain(self) -> None:
        """Refuse new requests. Those that wait and those that draw go on."""
        with self.lock:
            self.draining = True
