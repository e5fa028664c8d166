"""Answers while the models load: status 503, on the socket that the server listens on later."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from t2i.pipelines.serving.api.errors import ApiError

POLL_SECONDS = 0.1  # after which the end is noticed
CLIENT_SECONDS = 1.0  # that a client may take
MAX_CLIENTS = 64  # at a time
HEAD_BYTES = 65_536
RETRY_SECONDS = 5


@contextmanager
def answer_while_loading(listener: socket.socket) -> Iterator[None]:
    """Answer every request to a socket with status 503 and the code "loading". A browser asks again by itself."""
    loaded = threading.Event()
    thread = threading.Thread(target=answer_until, args=(listener, loaded), name="t2i-loading", daemon=True)
    timeout = listener.gettimeout()
    listener.settimeout(POLL_SECONDS)
    thread.start()
    try:
        yield
    finally:
        loaded.set()
        thread.join()
        listener.settimeout(timeout)


def answer_until(listener: socket.socket, loaded: threading.Event) -> None:
    """Answer requests until the event. One that is slow holds up no other."""
    places = threading.BoundedSemaphore(MAX_CLIENTS)
    while not loaded.is_set():
        if not places.acquire(timeout=POLL_SECONDS):
            continue
        try:
            client, _ = listener.accept()
        except OSError:  # nobody came
            places.release()
            continue
        threading.Thread(target=answer_client, args=(client, places), daemon=True).start()


def answer_client(client: socket.socket, places: threading.BoundedSemaphore) -> None:
    """Answer one request, and close its connection."""
    try:
        with suppress(OSError), client:  # the client is gone, or slow
            until = time.monotonic() + CLIENT_SECONDS
            client.settimeout(CLIENT_SECONDS)
            client.recv(HEAD_BYTES)
            client.sendall(build_answer())
            client.shutdown(socket.SHUT_WR)
            # Closed with bytes unread, the connection would be reset, and the answer may be lost
            while time.monotonic() < until and client.recv(HEAD_BYTES):
                pass
    finally:
        places.release()


def build_answer() -> bytes:
    """Return the bytes of the response."""
    body = json.dumps(ApiError(503, "loading", "the model is being loaded; try again in a moment").body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": len(body),
        "retry-after": RETRY_SECONDS,
        "refresh": 1,
        "connection": "close",
    }
    lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body
