"""Tests 1 and 2: requests that share the calls of networks are drawn faster, and as if they were alone."""

import asyncio
import contextlib
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image
from typer.testing import CliRunner

from t2i.cli import app
from tests.serving.load.client import Answer, Ask, Client, compare_images, list_equal_asks, list_mixed_asks
from tests.serving.load.process import ServerProcess
from tests.serving.load.scale import MAX_DIFFERENCE, Row, Scale, check_all_answered

GIVEN = "given.png"  # the name of the image of requests, which records keep


@dataclass(frozen=True)
class Cost:
    """Seconds of an image, or how many times as many: of processor time, and of time that passes."""

    cpu: float
    wall: float


def divide(one: Cost, other: Cost) -> Cost:
    return Cost(one.cpu / other.cpu, one.wall / other.wall)


# Test 1: batching


async def check_batching(model: str, scale: Scale) -> list[Row]:
    """Compare one server that batches, one that does not, and static batches, in turns."""
    equal, mixed = list_equal_asks(scale.steps), list_mixed_asks(scale.steps, scale.side)
    ratios: dict[str, list[Cost]] = {"equal": [], "mixed": [], "static": []}
    # Several cores spin while they wait for each other, which counts as processor time
    with (
        ServerProcess(model, "--max-batch", str(scale.max_batch), cores=1) as together,
        ServerProcess(model, "--max-batch", "1", cores=1) as alone,
    ):
        async with Client(together.address) as fast, Client(alone.address) as slow:
            for _ in range(scale.repeats):
                for name, asks in (("equal", equal), ("mixed", mixed)):
                    batched = await measure_cost(together, fast, scale, asks)
                    ratios[name].append(divide(await measure_cost(alone, slow, scale, asks), batched))
                    if name == "equal":
                        static = await measure_cost(together, fast, scale, asks, static=True)
                        ratios["static"].append(divide(static, batched))
    limits = {"equal": 1.6, "mixed": 1.4, "static": 0.75}
    names = {"equal": "batching, equal settings", "mixed": "batching, mixed", "static": "beside one static batch"}
    rows = []
    for key, limit in limits.items():
        found = {clock: median(getattr(ratio, clock) for ratio in ratios[key]) for clock in ("cpu", "wall")}
        measured = f"{found['cpu']:.2f} cpu, {found['wall']:.2f} wall"
        rows.append(Row(f"1 {names[key]}", f">= {limit} {scale.clock}", measured, found[scale.clock] >= limit, True))
    return rows


async def measure_cost(
    server: ServerProcess, client: Client, scale: Scale, asks: list[Ask], static: bool = False
) -> Cost:
    """Return what an image costs. static: full batches, one after another."""
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
    return Cost(cpu / images, wall / images)


# Test 2: the same images


async def check_images(server: ServerProcess, scale: Scale) -> list[Row]:
    """Draw each image among others, in several orders, and by the command that draws it alone."""
    asks, chance = [*list_equal_asks(scale.steps), *list_mixed_asks(scale.steps, scale.side)], random.Random(2)

    async def send_later(client: Client, ask: Ask) -> Answer:
        await asyncio.sleep(chance.uniform(0, 3))
        return await client.send(ask)

    answers: list[Answer] = []
    async with Client(server.address) as client:
        for _ in range(scale.repeats):
            order = chance.sample(asks, len(asks))
            answers += await asyncio.gather(*(send_later(client, ask) for ask in order))
    check_all_answered(answers)
    expected = {ask: draw_by_command(ask, server.model) for ask in asks}
    pairs = [(answer.images[0], expected[answer.ask]) for answer in answers]
    difference = max(compare_images(*pair) for pair in pairs)
    records = [[json.loads(image.info["t2i"]) for image in pair] for pair in pairs]
    unequal = sum(found != wanted for found, wanted in records)
    name = f"2 {len(pairs)} images beside those of commands"
    return [
        Row(f"{name}: difference", f"<= {MAX_DIFFERENCE} of 255", str(difference), difference <= MAX_DIFFERENCE),
        Row(f"{name}: other records", "0", str(unequal), unequal == 0),
    ]


def draw_by_command(ask: Ask, model: str) -> Image.Image:
    """Return the image that the command of a request's task draws."""
    fields = dict(ask.fields)
    if ask.route == "generations":
        words = ["generate", fields.pop("prompt")]
    elif ask.route == "variations":
        words = ["variations", GIVEN]
    else:
        words = ["image-to-image" if "strength" in fields else "outpaint", GIVEN]
    for name, value in fields.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path(GIVEN).write_bytes(ask.image or b"")
        result = CliRunner().invoke(app, [*words, "--model", model, "--out", "out"])
        assert result.exit_code == 0, result.output
        (path,) = Path("out").glob("*.png")
        with Image.open(path) as image:
            return image.convert("RGB")
