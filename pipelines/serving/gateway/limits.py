"""Limits of what clients may send, hold and wait for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits that keep one client from taking what others need. Tests shorten them.

    Args:
        body_bytes: of a request's whole body.
        json_bytes: of a JSON body, which holds no images; json_depth: of lists and objects inside each other.
        file_bytes: of one file of a form; files: of a form.
        fields: texts of a form; field_bytes: of one of them.
        held_bytes: of bodies, until the answer, of all requests together; and of the decoded images of those that draw.
        head_bytes: of a request's line and headers.
        head_seconds: from a connection, or a request's first byte, to the end of its headers.
        body_seconds: that a body may be late at any moment, behind body_pace, bytes a second; and of silence in it.
        idle_seconds: from a response to the next request of a connection.
        write_seconds: for a client that reads nothing of what is sent.
        connections: at the same time. Beyond them, the one that has waited longest without a request is closed.
        check_seconds: between two looks at the connections.
        exit_seconds: for the last answers and the engine to end, when the time to drain is over.
    """

    # Sizes
    body_bytes: int = 64 * 2**20
    json_bytes: int = 2**20
    json_depth: int = 16
    file_bytes: int = 32 * 2**20
    files: int = 17  # 16 images, as OpenAI's API takes, and a mask
    fields: int = 64
    field_bytes: int = 64 * 2**10
    held_bytes: int = 256 * 2**20
    head_bytes: int = 16 * 2**10
    # Seconds, long enough for a slow line, and short beside a drawing
    head_seconds: float = 10.0
    body_seconds: float = 20.0
    body_pace: float = 16 * 2**10
    idle_seconds: float = 15.0
    # What systems buffer hides a slow reader for a while, so that this may be long
    write_seconds: float = 60.0
    connections: int = 512
    check_seconds: float = 0.5
    exit_seconds: float = 10.0
