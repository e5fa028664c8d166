"""Images that responses return by link: kept in memory, for a while."""

import secrets
import threading
import time
from collections import OrderedDict

LIFETIME_SECONDS = 3600.0  # of a link, as OpenAI's
MAX_BYTES = 256_000_000  # of all images together


class ImageStore:
    """Files by names that cannot be guessed. The oldest are dropped when their time or the room is over."""

    def __init__(self, lifetime: float = LIFETIME_SECONDS, max_bytes: int = MAX_BYTES):
        self.lifetime, self.max_bytes = lifetime, max_bytes
        self.lock = threading.Lock()
        self.files: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()  # the oldest first
        self.bytes = 0

    def add(self, data: bytes, media_type: str) -> str:
        """Keep a file, and return its name."""
        name = secrets.token_urlsafe(16)
        with self.lock:
            self.files[name] = (time.monotonic(), data, media_type)
            self.bytes += len(data)
            self.drop_old()
        return name

    def find(self, name: str) -> tuple[bytes, str] | None:
        """Return a file and its media type; None if it is not there, or not any more."""
        with self.lock:
            self.drop_old()
            found = self.files.get(name)
        return None if found is None else found[1:]

    def drop_old(self) -> None:
        """Drop what is too old, and the oldest while all together is too large; the newest stays. The lock is held."""
        while self.files:
            since, data, _ = next(iter(self.files.values()))
            too_large = self.bytes > self.max_bytes and len(self.files) > 1
            if not too_large and time.monotonic() - since < self.lifetime:
                return
            self.files.popitem(last=False)
            self.bytes -= len(data)
