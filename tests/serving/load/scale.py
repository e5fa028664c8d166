"""What a load test returns, how much it takes, and what several of them measure."""

import time
from dataclasses import dataclass
from statistics import median

from PIL import Image

from tests.serving.load.client import Answer, Ask, Client, compare_images, list_equal_asks

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
    deaf_clients: int = 4  # that read nothing of eight images each
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
    """Return the images a second that as many clients get as the server draws at the same time: the median of runs."""
    asks, total, found = list_equal_asks(scale.steps), max(scale.max_batch * 2, scale.images), []
    for _ in range(scale.repeats):
        start = time.perf_counter()
        check_all_answered(await client.run_closed_loop(scale.max_batch, asks, total))
        found.append(total / (time.perf_counter() - start))
    return median(found)


async def draw_expected(client: Client, asks: list[Ask]) -> dict[Ask, tuple[Image.Image, ...]]:
    """Return the images of each request, drawn alone."""
    answers = [await client.send(ask) for ask in asks]
    check_all_answered(answers)
    return {answer.ask: answer.images for answer in answers}


def check_all_answered(answers: list[Answer]) -> None:
    """Raise AssertionError unless every request was answered with an image."""
    failed = [answer for answer in answers if answer.status != 200]
    assert not failed, f"{len(failed)} of {len(answers)} failed, such as {failed[0]}"


def count_wrong_images(answers: list[Answer], expected: dict[Ask, tuple]) -> int:
    """Return the number of answers whose images are not those that were drawn alone."""
    return sum(
        any(compare_images(*pair) > MAX_DIFFERENCE for pair in zip(answer.images, expected[answer.ask], strict=True))
        for answer in answers
        if answer.status == 200
    )
