"""Tests 9 and 11: bodies that are too large, and images that would take much memory."""

import asyncio
import select
import socket
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from itertools import repeat
from typing import Any

import httpx2
from t2i.pipelines.serving.gateway.limits import Limits

from tests.serving.images import BOMBS, LARGE, UNUSUAL
from tests.serving.load.client import draw_given_image
from tests.serving.load.process import ServerProcess
from tests.serving.load.scale import MEGABYTE, Row, Scale

LIMITS = Limits()
BUFFERS = 8 * MEGABYTE  # that the system takes of a body before the server reads it
GIGABYTE = 2**30
TOGETHER = 16  # requests with an image of one kind
MAX_PICTURE_MEMORY = 400 * MEGABYTE


# Test 9: bodies


async def check_oversize(server: ServerProcess, scale: Scale) -> list[Row]:
    """Send what is too large, as far as the server takes it."""
    form, announced = "multipart/form-data; boundary=x", f"content-length: {GIGABYTE}"
    file = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    field = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
    chunked = "transfer-encoding: chunked"
    # The route, its kind of body, its length, its beginning, and the bytes that the server may read
    cases: dict[str, tuple[str, str, str, bytes, int]] = {
        "a JSON of 1 GB, announced": ("generations", "application/json", announced, b'{"prompt": "', 0),
        "a JSON of 1 GB, in chunks": ("generations", "application/json", chunked, b'{"prompt": "', LIMITS.json_bytes),
        "a form of 1 GB, announced": ("edits", form, announced, file, 0),
        "a file of 1 GB, in chunks": ("edits", form, chunked, file, LIMITS.file_bytes),
        "a prompt of 2 MB, in chunks": ("edits", form, chunked, field, LIMITS.field_bytes),
    }

    async def send_all() -> list[Row]:
        rows = []
        for name, (route, kind, length, start, limit) in cases.items():
            lines = f"host: localhost\r\ncontent-type: {kind}\r\n{length}\r\n\r\n"
            head = f"POST /v1/images/{route} HTTP/1.1\r\n{lines}".encode()
            parts = repeat(b"a" * 16_384, 2 * MEGABYTE // 16_384 if "prompt" in name else GIGABYTE // 16_384)
            frames = frame_chunks(start, parts) if length == chunked else iter([start, *parts])
            status, sent = await asyncio.to_thread(send_until_answered, server, head, frames)
            allowed = limit + BUFFERS
            measured = f"{status} after {sent / MEGABYTE:.1f} MB"
            rows.append(Row(f"9 {name}", f"413 by {allowed / MEGABYTE:.1f} MB", measured,
                            status == 413 and sent <= allowed))  # fmt: skip
        image = draw_given_image(scale.side)
        many = [("image[]", (f"{number}.png", image)) for number in range(17)]
        fields = {f"a{number}": "1" for number in range(65)}
        for name, data, files in (("17 images", {"prompt": "a"}, many), ("65 fields", fields, many[:1])):
            url = f"{server.address}/v1/images/edits"
            status = (await asyncio.to_thread(httpx2.post, url, data=data, files=files, timeout=60)).status_code
            rows.append(Row(f"9 {name}", "400", str(status), status == 400))
        return rows

    rows, growth = await watch_memory(server, send_all())
    limit = 2 * LIMITS.body_bytes
    peak = Row("9 most memory and temporary files", f"<= +{limit / MEGABYTE:.0f} MB", f"{growth / MEGABYTE:+.0f} MB",
               growth <= limit)  # fmt: skip
    return [*rows, peak]


def frame_chunks(start: bytes, parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the parts of a body as HTTP frames them where its length is not known."""
    for part in (start, *parts):
        yield f"{len(part):x}\r\n".encode() + part + b"\r\n"


def send_until_answered(server: ServerProcess, head: bytes, frames: Iterator[bytes]) -> tuple[int, int]:
    """Send a body until the server answers. Returns the status (0 for none) and the bytes of the body that went."""
    sent, answer = 0, b""
    with socket.create_connection((server.host, server.port), timeout=60) as connection:
        connection.sendall(head)
        rest = b""
        with suppress(ConnectionError):
            while rest := rest or next(frames, b""):
                readable, writable, _ = select.select([connection], [connection], [], 60)
                if readable or not writable:
                    break
                count = connection.send(rest)
                sent, rest = sent + count, rest[count:]
        with suppress(OSError):
            answer = connection.recv(65_536)
    return int(answer.split()[1]) if answer else 0, sent


# Test 11: images


async def check_bombs(server: ServerProcess, scale: Scale) -> list[Row]:
    """Send images that are small files, and would be large in memory; and some that only are unusual."""
    wanted = {name: {(400, "image")} for name in BOMBS} | {name: {(200, None)} for name in UNUSUAL}
    # Together they may be more than the server holds: then some are to come again
    wanted |= {name: {(200, None), (503, None), (429, None)} for name in LARGE}
    kinds = BOMBS | UNUSUAL | LARGE

    async def send_all() -> list[Row]:
        rows = []
        async with httpx2.AsyncClient(timeout=600) as client:
            for name, data in kinds.items():
                found = Counter(await asyncio.gather(*(vary(client, data) for _ in range(TOGETHER))))
                texts = [", ".join(sorted(map(describe, answers))) for answers in (wanted[name], found)]
                rows.append(Row(f"11 {TOGETHER} at once: {name}", *texts, set(found) <= wanted[name]))
        return rows

    async def vary(client: httpx2.AsyncClient, data: bytes) -> tuple[int, str | None]:
        files = {"image": ("a.png", data)}
        answer = await client.post(f"{server.address}/v1/images/variations", data={"steps": scale.steps}, files=files)
        return answer.status_code, None if answer.status_code == 200 else answer.json()["error"]["param"]

    rows, growth = await watch_memory(server, send_all())
    peak = Row("11 most memory", f"<= +{MAX_PICTURE_MEMORY / MEGABYTE:.0f} MB", f"{growth / MEGABYTE:+.0f} MB",
               growth <= MAX_PICTURE_MEMORY)  # fmt: skip
    return [*rows, peak]


def describe(answer: tuple[int, str | None]) -> str:
    return " ".join(str(part) for part in answer if part is not None)


async def watch_memory(server: ServerProcess, work: Awaitable[list[Row]]) -> tuple[list[Row], int]:
    """Await something. Returns its result, and by how much the server's memory and temporary files grew at most."""
    before, files = server.measure_usage(), 0
    server.reset_peak()
    task: Any = asyncio.ensure_future(work)
    while not task.done():
        files = max(files, server.measure_usage().temporary_bytes)
        await asyncio.sleep(0.05)
    return task.result(), server.read_peak() - before.rss + max(0, files - before.temporary_bytes)
