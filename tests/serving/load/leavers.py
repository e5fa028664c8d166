"""Tests 6, 7 and 8: clients that go away, that are slow, and that never read."""

import asyncio
import json
import random
import socket
import time
from contextlib import ExitStack

from tests.serving.load.client import (
    Client,
    compute_percentile,
    hold_slow_connection,
    list_equal_asks,
    list_mixed_asks,
)
from tests.serving.load.process import ServerProcess
from tests.serving.load.scale import MEGABYTE, Row, Scale, count_wrong_images, draw_expected, measure_solo_seconds

TICK_ROWS = 4  # of a request of one image in one call: with guidance, and two candidates of the prior
GAUGES = ("t2i_running_pictures", "t2i_queue_pictures", "t2i_running_rows")


# Test 6: clients that go away


async def check_kills(server: ServerProcess, scale: Scale) -> list[Row]:
    """Kill clients at random moments, while others draw; then all that are left at the same moment."""
    asks, chance = list_mixed_asks(scale.steps, scale.side), random.Random(1)
    async with Client(server.address) as client:
        expected = await draw_expected(client, asks)
        solo = await measure_solo_seconds(client, asks, len(asks))
        wasted = server.read_metric("t2i_wasted_rows_total")
        mates = asyncio.create_task(client.run_closed_loop(4, asks, 2 * len(asks)))

        async def kill(number: int) -> None:
            await asyncio.sleep(chance.uniform(0, 5 * solo))
            ask, kind, seconds = asks[number % len(asks)], number // len(asks) % 3, chance.uniform(0, 4 * solo)
            if kind == 0:
                return await client.leave_while_uploading(ask, seconds)
            streams = kind == 1 and ask.route != "variations"
            await client.send_and_leave(ask, seconds, **({"stream": True, "partial_images": 3} if streams else {}))

        await asyncio.gather(*(kill(number) for number in range(scale.kills)))
        answers = await mates
        # A full batch and a queue, all of which go at once
        long = list_equal_asks(20 * scale.steps, 2 * scale.max_batch)
        last = [asyncio.create_task(client.send_and_leave(ask, 600)) for ask in long]
        while await asyncio.to_thread(server.read_metric, "t2i_running_pictures") < scale.max_batch:
            await asyncio.sleep(0.05)
        for task in last:
            task.cancel()
        await asyncio.wait(last)
        idle = await measure_seconds_to_idle(server)
        wasted = server.read_metric("t2i_wasted_rows_total") - wasted
    failed = sum(answer.status != 200 for answer in answers)
    wrong = count_wrong_images(answers, expected)
    limit = TICK_ROWS * (scale.kills + len(last))
    return [
        Row(f"6 {scale.kills} clients killed: others that failed", "0", str(failed), failed == 0),
        Row("6 images that are not their seeds'", "0", str(wrong), wrong == 0),
        Row(f"6 {len(last)} clients killed at once: nothing runs or waits", "<= 1 s", f"{idle:.1f} s", idle <= 1, True),
        Row("6 rows that were drawn for nobody", f"<= {limit}", f"{wasted:.0f}", wasted <= limit),
    ]


async def measure_seconds_to_idle(server: ServerProcess) -> float:
    """Return the seconds until the server draws nothing and nothing waits; at most a minute."""
    start = time.perf_counter()
    while (waited := time.perf_counter() - start) < 60:
        if not any([await asyncio.to_thread(server.read_metric, name) for name in GAUGES]):
            break
        await asyncio.sleep(0.02)
    return waited


# Test 7: slow connections


async def check_slow_connections(server: ServerProcess, scale: Scale) -> list[Row]:
    """Hold connections that send nothing, or a byte a second, while a client draws."""
    asks, seconds = list_equal_asks(scale.steps), max(40.0, scale.seconds / 10)
    kinds = ("silent", "head", "body")
    async with Client(server.address) as client:
        alone = compute_percentile([(await client.send(asks[0])).seconds for _ in range(10)], 95)
        held = [
            asyncio.create_task(
                hold_slow_connection(server.host, server.port, kinds[number % len(kinds)], seconds)
            )
            for number in range(scale.slow_connections)
        ]  # fmt: skip
        times = []
        while not all(task.done() for task in held):
            times.append((await client.send(asks[0])).seconds)
        closed = [task.result() for task in held]
    slowest = compute_percentile(times, 95)
    rows = [Row("7 slow connections: p95 of a client", f"<= {1.2 * alone + 0.2:.1f} s", f"{slowest:.1f} s",
                slowest <= 1.2 * alone + 0.2, True)]  # fmt: skip
    for index, (kind, limit) in enumerate(zip(kinds, (15, 15, 30))):
        found = closed[index :: len(kinds)]
        latest = max((value for value in found if value is not None), default=0.0)
        is_open = sum(value is None for value in found)
        measured = f"{latest:.1f} s" + (f", {is_open} never" if is_open else "")
        rows.append(Row(f"7 {len(found)} slow ({kind}): closed", f"<= {limit} s", measured,
                        not is_open and latest <= limit))  # fmt: skip
    return rows


# Test 8: clients that never read


async def check_deaf_clients(server: ServerProcess, scale: Scale) -> list[Row]:
    """Let clients ask for events that they never read, while others draw."""
    asks = list_mixed_asks(scale.steps, scale.side)
    most = 0
    async with Client(server.address) as client:
        with ExitStack() as stack:
            expected = await draw_expected(client, asks)
            # Takes the memory of full batches of edits, and of requests as those that are not read
            await client.run_closed_loop(scale.max_batch, asks, 2 * scale.max_batch)
            await asyncio.gather(*(client.send(asks[0], n=8) for _ in range(scale.deaf_clients)))
            before, start = server.measure_usage().rss, time.perf_counter()
            deaf = [stack.enter_context(ask_and_never_read(server, scale)) for _ in range(scale.deaf_clients)]
            ports = {one.getsockname()[1] for one in deaf}
            mates = asyncio.create_task(client.run_closed_loop(4, asks, 2 * len(asks)))
            drawn, closed = None, None
            while closed is None and time.perf_counter() - start < 600:
                await asyncio.sleep(0.5)
                seconds = time.perf_counter() - start
                most = max(most, server.measure_usage().rss)
                if drawn is None and mates.done() and not server.read_metric("t2i_running_pictures"):
                    drawn = seconds
                if not server.count_connections(ports):
                    closed = seconds
            answers = await mates
    failed = sum(answer.status != 200 for answer in answers)
    wrong = count_wrong_images(answers, expected)
    limit = 75 + (drawn or 0)  # a minute, and what the system's buffers take meanwhile
    return [
        Row(f"8 beside {len(deaf)} that never read: failed", "0", str(failed), failed == 0),
        Row("8 images that are not their seeds'", "0", str(wrong), wrong == 0),
        Row("8 those that never read: closed", f"<= {limit:.0f} s", f"{closed or 600:.0f} s", (closed or 600) <= limit),
        Row("8 memory", "<= +50 MB", f"{(most - before) / MEGABYTE:+.0f} MB", most - before <= 50 * MEGABYTE, True),
    ]


def ask_and_never_read(server: ServerProcess, scale: Scale) -> socket.socket:
    """Return a connection that asked for the events of eight images, with a buffer as small as the system allows."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((server.host, server.port))
    fields = {"prompt": "a cat", "n": 8, "steps": scale.steps, "stream": True, "partial_images": 3}
    body = json.dumps(fields).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection
