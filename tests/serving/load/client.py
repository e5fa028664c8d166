"""A client for load tests: requests of every kind, each with the image that it must get, and patterns of arrival."""

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx2
from PIL import Image, ImageChops

TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Ask:
    """A request: the route, its fields, and the image of edits and variations. Equal ones get equal images."""

    route: str
    fields: tuple[tuple[str, Any], ...]
    image: bytes | None = field(default=None, repr=False)

    def build(self, **more: Any) -> dict[str, Any]:
        """Return the arguments of httpx2's `post`."""
        fields = dict(self.fields) | more
        if self.image is None:
            return {"json": fields}
        texts = {name: json.dumps(value) if isinstance(value, bool) else str(value) for name, value in fields.items()}
        return {"data": texts, "files": {"image": ("given.png", self.image, "image/png")}}


@dataclass(frozen=True)
class Answer:
    """A response: its status (0 if the connection broke), the seconds it took, the images, and what errors say."""

    ask: Ask
    status: int
    seconds: float
    images: tuple[Image.Image, ...] = ()
    code: str | None = None
    retry_after: str | None = None


def draw_given_image(side: int) -> bytes:
    """Return a PNG file of a square."""
    image = Image.new("RGB", (side, side), "white")
    image.paste((200, 30, 30), (side // 4, side // 4, side // 2, side // 2))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def list_equal_asks(steps: int, number: int = 8) -> list[Ask]:
    """Return requests with equal settings and different seeds."""
    return [
        Ask("generations", (("prompt", "a cat"), ("seed", seed), ("steps", steps), ("prior_steps", steps)))
        for seed in range(number)
    ]


def list_mixed_asks(steps: int, side: int) -> list[Ask]:
    """Return requests of different routes, samplers, steps and guidance. side: in pixels, of the image to edit."""
    given = draw_given_image(side)
    text = [("prompt", "a red heart"), ("prior_steps", steps)]
    return [
        Ask("generations", (*text, ("seed", 1), ("steps", steps))),
        Ask("generations", (*text, ("seed", 2), ("steps", steps + 5), ("guidance_scale", 3.0))),
        Ask("generations", (*text, ("seed", 3), ("steps", max(2, steps // 2)), ("sampler", "unipc"))),
        Ask("generations", (*text, ("seed", 4), ("steps", steps), ("sampler", "dpmsolver++"))),
        Ask("generations", (*text, ("seed", 5), ("steps", steps), ("sampler", "ddpm"), ("guidance_scale", 1.0))),
        Ask("variations", (("seed", 6), ("steps", steps)), given),
        Ask("edits", (("prompt", "a blue square"), ("seed", 7), ("steps", steps), ("strength", 0.6)), given),
        Ask("edits", (("prompt", "a green frame"), ("seed", 8), ("steps", steps), ("left", 16)), given),
    ]


class Client:
    """An asyncio client of one server. Use it as a context manager. key: for a server that asks for one."""

    def __init__(self, address: str, key: str | None = None):
        self.address = address
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx2.AsyncClient(
            base_url=f"{address}/v1/images/", timeout=TIMEOUT_SECONDS, limits=limits, headers=headers
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.http.aclose()

    async def send(self, ask: Ask, due: float | None = None, **more: Any) -> Answer:
        """Send a request and return its answer. due: when it was to be sent, from which its seconds count."""
        start = time.perf_counter() if due is None else due
        try:
            response = await self.http.post(ask.route, **ask.build(**more))
        except httpx2.HTTPError as error:
            return Answer(ask, 0, time.perf_counter() - start, code=type(error).__name__)
        seconds = time.perf_counter() - start
        # Also a body that is no JSON has to be reported, as a fault of the server
        try:
            body = response.json()
            if response.status_code == 200:
                files = [base64.b64decode(item["b64_json"]) for item in body["data"]]
                return Answer(ask, 200, seconds, tuple(Image.open(io.BytesIO(file)).convert("RGB") for file in files))
            code = f"{body['error']['code']}: {body['error']['message']}"
        except (ValueError, KeyError, OSError):
            code = "unreadable"
        return Answer(ask, response.status_code, seconds, (), code, response.headers.get("retry-after"))

    async def send_and_leave(self, ask: Ask, seconds: float, **more: Any) -> None:
        """Send a request and break the connection after some seconds, whatever happens to it then."""
        async with Client(self.address) as other:
            with suppress(TimeoutError, httpx2.HTTPError):
                await asyncio.wait_for(other.http.post(ask.route, **ask.build(**more)), seconds)

    async def leave_while_uploading(self, ask: Ask, seconds: float) -> None:
        """Send half of a request's body, and break the connection after some seconds."""
        request = self.http.build_request("POST", ask.route, **ask.build())
        body = await request.aread()
        lines = [f"{name}: {value}\r\n" for name, value in request.headers.items()]
        head = f"POST {request.url.raw_path.decode()} HTTP/1.1\r\n{''.join(lines)}\r\n"
        _, writer = await asyncio.open_connection(request.url.host, request.url.port)
        writer.write(head.encode() + body[: len(body) // 2])
        await asyncio.sleep(seconds)
        writer.transport.abort()

    async def run_closed_loop(self, clients: int, asks: list[Ask], total: int) -> list[Answer]:
        """Send so many requests from clients that each wait for an answer before the next request."""
        numbers = iter(range(total))
        answers: list[Answer] = []

        async def work() -> None:
            for number in numbers:
                answers.append(await self.send(asks[number % len(asks)]))

        await asyncio.gather(*(work() for _ in range(clients)))
        return answers

    async def run_open_loop(self, rate: float, seconds: float, asks: list[Ask], seed: int = 0) -> list[Answer]:
        """Send requests at random moments, on average `rate` a second, whether or not earlier ones are answered."""
        chance, tasks = random.Random(seed), []
        end, due = time.perf_counter() + seconds, time.perf_counter()
        for number in count():
            due += chance.expovariate(rate)
            if due > end:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.send(asks[number % len(asks)], due)))
        return list(await asyncio.gather(*tasks))


def compare_images(one: Image.Image, other: Image.Image) -> int:
    """Return the largest difference in any channel; 256 for different sizes."""
    if one.size != other.size:
        return 256
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


def compute_percentile(values: list[float], percent: float) -> float:
    """Return the value below which so many percent of the others are; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


async def hold_slow_connection(host: str, port: int, kind: str, seconds: float) -> float | None:
    """Hold a connection that sends nothing, or a byte a second of its head or its body.

    Returns the seconds until the server closed it; None if it was still open in the end.
    """
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        if kind == "body":
            writer.write(head + b"content-length: 100000\r\n\r\n")
        ended = asyncio.create_task(reader.read())
        async for byte in drip_bytes(b"{" * 100_000 if kind == "body" else head * 1000, seconds):
            if ended.done():
                return time.perf_counter() - start
            if kind != "silent":
                with suppress(ConnectionError):
                    writer.write(byte)
        ended.cancel()
        return None
    except ConnectionError:
        return time.perf_counter() - start
    finally:
        writer.close()


async def drip_bytes(data: bytes, seconds: float) -> AsyncIterator[bytes]:
    """Yield a byte a second, for some seconds."""
    end = time.perf_counter() + seconds
    for index in range(len(data)):
        if time.perf_counter() > end:
            return
        yield data[index : index + 1]
        # Looks twice a second at whether the connection is closed
        await asyncio.sleep(min(1.0, max(0.05, end - time.perf_counter())))
