"""Test 5: many clients for a long time, some of them bad, some of them killed."""

import asyncio
import random
import time
from collections import Counter

from tests.serving.load.client import Ask, Client, list_mixed_asks
from tests.serving.load.process import ServerProcess, Usage
from tests.serving.load.scale import MEGABYTE, Row, Scale, count_wrong_images, draw_expected

SETTLING_SECONDS = 3.0  # until connections of clients that went are closed


async def check_soak(server: ServerProcess, scale: Scale) -> list[Row]:
    """Let many clients send requests of all kinds, some of them bad, some of them killed, for a long time."""
    asks, chance = list_mixed_asks(scale.steps, scale.side), random.Random(0)
    bad = Ask("generations", (("prompt", "a cat"), ("steps", 0)))
    usages, answers, kills = [], [], 0
    async with Client(server.address) as client:
        expected = await draw_expected(client, asks)
        await asyncio.sleep(SETTLING_SECONDS)
        before, start = server.measure_usage(), time.perf_counter()

        async def work() -> None:
            nonlocal kills
            while time.perf_counter() - start < scale.seconds:
                ask, kind = chance.choice(asks), chance.random()
                if kind < 0.05:
                    kills += 1
                    await client.send_and_leave(ask, chance.uniform(0, 2))
                    continue
                answer = await client.send(bad if kind < 0.1 else ask)
                answers.append(answer)
                if answer.retry_after:
                    await asyncio.sleep(min(2.0, float(answer.retry_after)))

        async def watch() -> None:
            while time.perf_counter() - start < scale.seconds:
                usages.append(server.measure_usage())
                await asyncio.sleep(max(0.2, scale.seconds / 300))

        await asyncio.gather(watch(), *(work() for _ in range(scale.clients)))
    await asyncio.sleep(SETTLING_SECONDS)
    after = server.measure_usage()
    statuses = Counter(answer.status for answer in answers)
    broken = sum(number for status, number in statuses.items() if status >= 500 or status == 0)
    wrong = count_wrong_images(answers, expected)
    unrefused = sum(answer.status != 400 for answer in answers if answer.ask is bad)
    drawn = f"{statuses[200]} drawn, {statuses[429]} refused, {kills} killed"
    memory, threads = (measure_growth(usages, name) for name in ("rss", "threads"))
    files, temporary = after.files - before.files, after.temporary - before.temporary
    return [
        Row(f"5 {scale.clients} clients, {drawn}: 5xx or broken", "0", str(broken), broken == 0),
        Row("5 images that are not their seeds'", "0", str(wrong), wrong == 0),
        Row("5 bad requests that are not refused", "0", str(unrefused), unrefused == 0),
        Row("5 memory after the warm-up", "<= +50 MB", f"{memory / MEGABYTE:+.0f} MB", memory <= 50 * MEGABYTE, True),
        Row("5 threads after the warm-up", "<= +2", f"{threads:+d}", threads <= 2, True),
        Row("5 open files afterwards", "<= +2", f"{files:+d}", files <= 2),
        Row("5 temporary files afterwards", "<= +0", f"{temporary:+d}", temporary <= 0),
    ]


def measure_growth(usages: list[Usage], name: str) -> int:
    """Return by how much the most of something is more after the warm-up than in the tenth that follows on it.

    The first fifth warms up: threads start, caches fill, allocators keep memory.
    """
    values = [getattr(usage, name) for usage in usages]
    start, end = len(values) // 5, max(len(values) // 5 + 1, 3 * len(values) // 10)
    return max(values[end:], default=0) - max(values[start:end], default=0)
