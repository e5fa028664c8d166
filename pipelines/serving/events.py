"""What happens to a request that is drawn, from the thread that draws it to the event loop that answers it."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

REPLACED = ("queued", "step", "preview")  # kinds of which only the newest is kept for a client that reads slowly


@dataclass(frozen=True)
class Event:
    """Something that happened to a request: its kind "queued", "step", "preview", "done" or "failed", and its data."""

    kind: str
    data: dict[str, Any] = field(default_factory=dict)


class EventFeed:
    """Events in order, of bounded size: an unread step or preview is replaced by the next. Made in an event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.unread: list[Event] = []
        self.arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event, from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self.loop.call_soon_threadsafe(self.add, event)

    def add(self, event: Event) -> None:
        """Add an event, in the event loop."""
        if event.kind in REPLACED:
            self.unread = [other for other in self.unread if other.kind != event.kind]
        self.unread.append(event)
        self.arrived.set()

    async def get(self) -> Event:
        """Return the next event, when it has arrived."""
        await self.arrived.wait()
        event = self.unread.pop(0)
        if not self.unread:
            self.arrived.clear()
        return event
