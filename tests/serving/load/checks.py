"""The load tests: each drives a server, and returns rows of what is wanted and what was measured."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from PIL import Image

from tests.serving.load.client import (
    Answer,
    Ask,
    Client,
    compare_images,
    compute_percentile,
    hold_slow_connection,
    list_equal_asks,
    list_mixed_asks,
)
from tests.serving.load.process import ServerProcess

MAX_DIFFERENCE = 1  # of 255, in any channel, from the image that is drawn alone
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Row:
    """A line of the table. is_timing: it depends on the speed of a machine that does nothing else."""

    test: str
    wanted: str
    measured: str
    passed: bool
    is_timing: bool = False


@dataclass(frozen=True)
class Scale:
    """How much a run takes. clock: by which batching is measured, "cpu" or "wall"."""

    seconds: float = 600.0  # of the soak
    clients: int = 100  # of the soak
    steps: int = 25  # of an image
    side: int = 128  # of the image that is edited
    kills: int = 50
    images: int = 64  # by which batching and capacity are measured
    repeats: int = 3
    slow_connections: int = 200
    max_batch: int = 8
    clock: str = "cpu"

    @property
    def phase(self) -> float:
        """Seconds of a phase of the tests of overload."""
        return self.seconds / 5


async def measure_solo_seconds(client: Client, asks: list[Ask], repeats: int = 5) -> float:
    """Return the seconds that a request takes alone."""
    return median([(await client.send(asks[number % len(asks)])).seconds for number in range(repeats)])


async def measure_capacity(client: Client, scale: Scale) -> float:
    """Return the images a second that as many clients get as the server draws at the same time."""
    asks, total = list_equal_asks(scale.steps), max(scale.max_batch * 2, scale.images // 2)
    start = time.perf_counter()
    answers = await client.run_closed_loop(scale.max_batch, asks, total)
    check_all_answered(answers)
    return total / (time.perf_counter() - start)


async def draw_expected(client: Client, asks: list[Ask]) -> dict[Ask, tuple[Image.Image, ...]]:
    """Return the images of each request, drawn alone."""
    answers = [await client.send(ask) for ask in asks]
    check_all_answered(answers)
    return {answer.ask: answer.images for answer in answers}


def check_all_answered(answers: list[Answer]) -> None:
    """Raise AssertionError unless every request was answered with an image."""
    failed = [answer for answer in answers if answer.status != 200]
    assert not failed, f"{len(failed)} of {len(answers)} failed, such as {failed[0]}"


# Test 1: batching


async def check_batching(model: str, scale: Scale) -> list[Row]:
    """Compare one server that batches, one that does not, and static batches, in turns."""
    equal, mixed = list_equal_asks(scale.steps), list_mixed_asks(scale.steps, scale.side)
    ratios: dict[str, list[float]] = {"equal": [], "mixed": [], "static": []}
    with (
        ServerProcess(model, "--max-batch", str(scale.max_batch)) as together,
        ServerProcess(model, "--max-batch", "1") as alone,
    ):
        async with Client(together.address) as fast, Client(alone.address) as slow:
            for _ in range(scale.repeats):
                for name, asks in (("equal", equal), ("mixed", mixed)):
                    batched = await measure_cost(together, fast, scale, asks)
                    ratios[name].append(await measure_cost(alone, slow, scale, asks) / batched)
                    if name == "equal":
                        static = await measure_cost(together, fast, scale, asks, static=True)
                        ratios["static"].append(static / batched)
    limits = {"equal": 1.6, "mixed": 1.4, "static": 0.75}
    names = {"equal": "batching, equal settings", "mixed": "batching, mixed", "static": "beside one static batch"}
    return [
        Row(f"1 {names[key]}", f">= {limits[key]}", f"{median(found):.2f}", median(found) >= limits[key], True)
        for key, found in ratios.items()
    ]


async def measure_cost(
    server: ServerProcess, client: Client, scale: Scale, asks: list[Ask], static: bool = False
) -> float:
    """Return the seconds that an image costs, by the clock of the scale. static: full batches, one after another."""
    before, start = server.measure_usage().cpu_seconds, time.perf_counter()
    if static:
        total = max(1, scale.images // scale.max_batch)
        for number in range(total):
            answer = await client.send(asks[number % len(asks)], n=scale.max_batch)
            check_all_answered([answer])
        images = total * scale.max_batch
    else:
        images = scale.images
        check_all_answered(await client.run_closed_loop(scale.max_batch, asks, images))
    wall, cpu = time.perf_counter() - start, server.measure_usage().cpu_seconds - before
    return (cpu if scale.clock == "cpu" else wall) / images


# Tests 3 and 4: arrivals at random, below and above what the server can draw


async def check_latency(server: ServerProcess, scale: Scale) -> list[Row]:
    """Let requests come at random at a part of the capacity."""
    rows, asks = [], list_equal_asks(scale.steps)
    async with Client(server.address) as client:
        solo, capacity = await measure_solo_seconds(client, asks), await measure_capacity(client, scale)
        for load, factor in ((0.25, 2), (0.5, 3), (0.75, 5)):
            answers = await client.run_open_loop(load * capacity, scale.phase, asks)
            lost = sum(answer.status != 200 for answer in answers)
            slowest = compute_percentile([answer.seconds for answer in answers], 95) / solo
            name = f"3 load {load:.0%}, {len(answers)} requests"
            rows.append(Row(f"{name}: lost", "0", str(lost), lost == 0))
            rows.append(Row(f"{name}: p95 / alone", f"<= {factor}", f"{slowest:.2f}", slowest <= factor, True))
    return rows


async def check_overload(server: ServerProcess, scale: Scale) -> list[Row]:
    """Let one and a half times as many requests come as the server can draw."""
    asks = list_equal_asks(scale.steps)
    async with Client(server.address) as client:
        solo, capacity = await measure_solo_seconds(client, asks), await measure_capacity(client, scale)
        start = time.perf_counter()
        # So that the queue fills at once, and refusals are seen also in a short run
        full = 64 + scale.max_batch
        flood, answers = await asyncio.gather(
            client.run_closed_loop(full, asks, full), client.run_open_loop(1.5 * capacity, scale.phase, asks)
        )
        answers += flood
        drawn = [answer for answer in answers if answer.status == 200]
        refused = [answer for answer in answers if answer.status == 429]
        goodput = len(drawn) / (time.perf_counter() - start) / capacity
        other = Counter(answer.status for answer in answers) - Counter({200: len(drawn), 429: len(refused)})
        refusal = 1000 * compute_percentile([answer.seconds for answer in refused], 99)
        slowest = compute_percentile([answer.seconds for answer in drawn], 95)
        limit = (full + scale.max_batch) / capacity + solo
        recovered = await measure_recovery(client, asks, solo)
        unsaid = sum(answer.retry_after is None for answer in refused)
    return [
        Row("4 load 150%: goodput / capacity", ">= 0.90", f"{goodput:.2f}", goodput >= 0.9, True),
        Row("4 load 150%: answers but 200 and 429", "none", str(dict(other)), not other),
        Row(f"4 load 150%: {len(refused)} refusals without Retry-After", "0", str(unsaid), unsaid == 0),
        Row("4 load 150%: p99 of refusing", "<= 250 ms", f"{refusal:.0f} ms", refusal <= 250, True),
        Row("4 load 150%: p95 of those drawn", f"<= {limit:.1f} s", f"{slowest:.1f} s", slowest <= limit, True),
        Row("4 load 150%: alone again", "within 10 s", f"{recovered:.1f} s", recovered <= 10, True),
    ]


async def measure_recovery(client: Client, asks: list[Ask], solo: float) -> float:
    """Return the seconds until a request takes at most half again as long as alone; at most a minute."""
    start = time.perf_counter()
    while (waited := time.perf_counter() - start) < 60:
        if (await client.send(asks[0])).seconds <= 1.5 * solo:
            return waited
    return waited


# Test 5: the soak


async def check_soak(server: ServerProcess, scale: Scale) -> list[Row]:
    """Let many clients send requests of all kinds, some of them bad, some of them killed, for a long time."""
    asks, chance = list_mixed_asks(scale.steps, scale.side), random.Random(0)
    bad = Ask("generations", (("prompt", "a cat"), ("steps", 0)))
    usages, answers, kills = [], [], 0
    async with Client(server.address) as client:
        expected = await draw_expected(client, asks)
        start = time.perf_counter()

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
    # The first fifth warms up: caches, threads, memory that allocators keep
    settled = usages[len(usages) // 5 :]
    growth = max(usage.rss for usage in settled) - settled[0].rss
    rest = {name: max(getattr(u, name) for u in settled) for name in ("files", "threads", "temporary")}
    statuses = Counter(answer.status for answer in answers)
    broken = sum(number for status, number in statuses.items() if status >= 500 or status == 0)
    wrong = count_wrong_images(answers, expected)
    limits = {"files": 3 * scale.clients + 100, "threads": scale.max_batch + 60, "temporary": 50}
    bad_answers = [answer.status for answer in answers if answer.ask is bad]
    drawn = f"{statuses[200]} drawn, {statuses[429]} refused, {kills} killed"
    return [
        Row(f"5 soak, {scale.clients} clients, {drawn}: 5xx or broken", "0", str(broken), broken == 0),
        Row("5 soak: images that are not their seeds'", "0", str(wrong), wrong == 0),
        Row("5 soak: bad requests that are not refused", "0", str(sum(s != 400 for s in bad_answers)),
            all(status == 400 for status in bad_answers)),
        Row("5 soak: memory growth", "<= 50 MB", f"{growth / MEGABYTE:.0f} MB", growth <= 50 * MEGABYTE, True),
        *(Row(f"5 soak: most {name}", f"<= {limits[name]}", str(rest[name]), rest[name] <= limits[name])
          for name in limits),
    ]  # fmt: skip


def count_wrong_images(answers: list[Answer], expected: dict[Ask, tuple]) -> int:
    """Return the number of answers whose images are not those that were drawn alone."""
    return sum(
        any(compare_images(*pair) > MAX_DIFFERENCE for pair in zip(answer.images, expected[answer.ask], strict=True))
        for answer in answers
        if answer.status == 200
    )


# Test 6: clients that are killed


async def check_kills(server: ServerProcess, scale: Scale) -> list[Row]:
    """Kill clients at random moments, while others draw."""
    asks, chance = list_mixed_asks(scale.steps, scale.side), random.Random(1)
    async with Client(server.address) as client:
        expected = await draw_expected(client, asks)
        solo = await measure_solo_seconds(client, asks, len(asks))
        mates = asyncio.create_task(client.run_closed_loop(4, asks, 2 * len(asks)))

        async def kill(number: int) -> None:
            await asyncio.sleep(chance.uniform(0, 5 * solo))
            stream = {"stream": True, "partial_images": 3} if number % 2 else {}
            ask = asks[number % len(asks)]
            stream = {} if ask.route == "variations" else stream
            await client.send_and_leave(ask, chance.uniform(0, 4 * solo), **stream)

        await asyncio.gather(*(kill(number) for number in range(scale.kills)))
        answers = await mates
        # Whatever were left running would go on to take processor time
        await asyncio.sleep(1.0)
        before = server.measure_usage().cpu_seconds
        await asyncio.sleep(2.0)
        busy = (server.measure_usage().cpu_seconds - before) / 2.0
    failed = sum(answer.status != 200 for answer in answers)
    wrong = count_wrong_images(answers, expected)
    return [
        Row(f"6 {scale.kills} clients killed: others that failed", "0", str(failed), failed == 0),
        Row("6 images that are not their seeds'", "0", str(wrong), wrong == 0),
        Row("6 processor time a second later", "<= 10%", f"{busy:.0%}", busy <= 0.1),
    ]


# Test 7: slow connections


async def check_slow_connections(server: ServerProcess, scale: Scale) -> list[Row]:
    """Hold connections that send nothing, or a byte a second, while a client draws."""
    asks, seconds = list_equal_asks(scale.steps), max(40.0, scale.seconds / 10)
    kinds = ("silent", "head", "body")
    async with Client(server.address) as client:
        alone = compute_percentile([(await client.send(asks[0])).seconds for _ in range(5)], 95)
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
    for index, (kind, limit) in enumerate(zip(kinds, (15, 15, 35))):
        found = closed[index :: len(kinds)]
        latest = max((value for value in found if value is not None), default=0.0)
        is_open = sum(value is None for value in found)
        measured = f"{latest:.1f} s" + (f", {is_open} never" if is_open else "")
        rows.append(Row(f"7 {len(found)} slow ({kind}): closed", f"<= {limit} s", measured,
                        not is_open and latest <= limit))  # fmt: skip
    return rows


ON_ONE_SERVER: dict[str, Callable] = {
    "3": check_latency,
    "4": check_overload,
    "5": check_soak,
    "6": check_kills,
    "7": check_slow_connections,
}


async def run_test(name: str, model: str, scale: Scale) -> list[Row]:
    """Run a test by its number, on a server of its own."""
    if name == "1":
        return await check_batching(model, scale)
    with ServerProcess(model, "--max-batch", str(scale.max_batch)) as server:
        return await ON_ONE_SERVER[name](server, scale)
