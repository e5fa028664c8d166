"""Tests 3, 4 and 14: requests that come at random, more than can be drawn, and from one key more than from another.

The speed of a machine drifts, so that what a request takes alone, and the capacity, are measured before and after.
"""

import asyncio
import secrets
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import mean

from tests.serving.load.client import Answer, Ask, Client, compute_percentile, list_equal_asks
from tests.serving.load.process import ServerProcess
from tests.serving.load.scale import Row, Scale, measure_capacity, measure_solo_seconds

MAX_QUEUE = 64  # of the server, which is its default
FAIR_BATCH = 4  # with 8, an image takes a CPU three times as long as alone, before anybody waits
MAX_TRIES, MAX_DRIFT = 3, 0.05  # of a phase; of its load, by the mean capacity before and after
KEY_CLIENTS = 32  # of the key that asks for much


# Tests 3 and 4: arrivals at random, below and above what the server can draw


async def check_latency(server: ServerProcess, scale: Scale) -> list[Row]:
    """Let requests come at random at a part of the capacity."""
    rows, asks = [], list_equal_asks(scale.steps)
    async with Client(server.address) as client:
        after = await measure_solo_seconds(client, asks), await measure_capacity(client, scale)
        for load, factor in ((0.25, 2), (0.5, 3), (0.75, 5)):
            # At another speed of the machine the load would be another; of these tries the nearest counts
            tries: list[tuple[float, list[Answer], float]] = []
            while len(tries) < MAX_TRIES and not any(abs(found / load - 1) <= MAX_DRIFT for found, _, _ in tries):
                before, asked = after, load * after[1]
                answers = await client.run_open_loop(asked, scale.phase, asks)
                after = await measure_solo_seconds(client, asks), await measure_capacity(client, scale)
                solo, capacity = (mean(pair) for pair in zip(before, after))
                tries.append((asked / capacity, answers, solo))
            found, answers, solo = min(tries, key=lambda a_try: abs(a_try[0] - load))
            lost = sum(answer.status != 200 for answer in answers)
            slowest = compute_percentile([answer.seconds for answer in answers], 95) / solo
            name = f"3 load {found:.0%} for {load:.0%}, {len(answers)} requests"
            rows.append(Row(f"{name}: lost", "0", str(lost), lost == 0))
            rows.append(Row(f"{name}: p95 / alone", f"<= {factor}", f"{slowest:.2f}", slowest <= factor, True))
    return rows


async def check_overload(server: ServerProcess, scale: Scale) -> list[Row]:
    """Let one and a half times as many requests come as the server can draw."""
    asks = list_equal_asks(scale.steps)
    async with Client(server.address) as client:
        before = await measure_solo_seconds(client, asks), await measure_capacity(client, scale)
        start = time.perf_counter()
        # So that the queue fills at once, and refusals are seen also in a short run
        full = MAX_QUEUE + scale.max_batch
        flood, answers = await asyncio.gather(
            client.run_closed_loop(full, asks, full), client.run_open_loop(1.5 * before[1], scale.phase, asks)
        )
        seconds = time.perf_counter() - start
        recovered = await measure_recovery(client, asks, before[0])
        after = await measure_solo_seconds(client, asks), await measure_capacity(client, scale)
        solo, capacity = (mean(pair) for pair in zip(before, after))
        answers += flood
        drawn = [answer for answer in answers if answer.status == 200]
        refused = [answer for answer in answers if answer.status == 429]
        goodput = len(drawn) / seconds / capacity
        other = Counter(answer.status for answer in answers) - Counter({200: len(drawn), 429: len(refused)})
        refusal = 1000 * compute_percentile([answer.seconds for answer in refused], 99)
        slowest = compute_percentile([answer.seconds for answer in drawn], 95)
        limit = full / capacity + solo
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


# Test 14: keys


async def send_one_by_one(client: Client, asks: list[Ask], total: int) -> list[Answer]:
    """Send so many requests, each when the one before is answered."""
    return [await client.send(asks[number % len(asks)]) for number in range(total)]


async def check_fairness(model: str, scale: Scale) -> list[Row]:
    """Let one key ask for as much as it may, while another one asks for an image at a time."""
    keys, asks = [secrets.token_hex(16) for _ in range(2)], list_equal_asks(scale.steps)
    ended, flood = asyncio.Event(), Counter[int]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys"
        path.touch(mode=0o600)
        path.write_text("".join(f"{name}: {key}\n" for name, key in zip(("much", "little"), keys)))
        with ServerProcess(model, "--max-batch", str(FAIR_BATCH), "--keys", str(path)) as server:
            async with Client(server.address, keys[0]) as much, Client(server.address, keys[1]) as little:

                async def ask_for_much() -> None:
                    while not ended.is_set():
                        flood[(await much.send(asks[0])).status] += 1

                solo = await measure_solo_seconds(little, asks)
                tasks = [asyncio.create_task(ask_for_much()) for _ in range(KEY_CLIENTS)]
                while await asyncio.to_thread(server.read_metric, "t2i_queue_pictures") < KEY_CLIENTS / 2:
                    await asyncio.sleep(0.1)
                # Until the requests of the flood come evenly, and not all at once
                await send_one_by_one(little, asks, scale.images // 8)
                answers = await send_one_by_one(little, asks, min(40, scale.images))
                ended.set()
                await asyncio.gather(*tasks)
                solo = mean((solo, await measure_solo_seconds(little, asks)))
    lost = sum(answer.status != 200 for answer in answers) + flood.total() - flood[200]
    slowest = compute_percentile([answer.seconds for answer in answers], 95) / solo
    return [
        Row(f"14 {KEY_CLIENTS} clients of one key: lost of both keys", "0", str(lost), lost == 0),
        Row("14 another key's p95 / alone", "<= 3", f"{slowest:.2f}", slowest <= 3, True),
    ]
