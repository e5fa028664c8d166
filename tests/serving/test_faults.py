"""Faults of real processes: workers and servers that are killed, stopped or told to end while they draw."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.serving.load.client import Answer, Ask, Client, compare_images
from tests.serving.load.process import ServerProcess

pytestmark = pytest.mark.slow

LONG = Ask("generations", (("prompt", "a red circle"), ("seed", 1), ("steps", 900), ("prior_steps", 3)))
SHORT = Ask("generations", (("prompt", "a red circle"), ("seed", 1), ("steps", 3), ("prior_steps", 3)))


@pytest.fixture(scope="module")
def server(pipeline_folder: Path) -> Iterator[ServerProcess]:
    """A server of two models: a worker each, which draws two images at a time."""
    models = ["--model", f"second={pipeline_folder}"]
    with ServerProcess(f"first={pipeline_folder}", *models, "--device", "cpu", "--max-batch", "2") as server:
        yield server


def wait_for(condition: Callable[[], object], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.1)


def send_all(server: ServerProcess, asks: list[tuple[Ask, str]], disturb: Callable[[], object]) -> list[Answer]:
    """Send requests to models at the same time, do something while they are drawn, and return the answers."""

    async def run() -> list[Answer]:
        async with Client(server.address) as client:
            tasks = [asyncio.create_task(client.send(ask, model=model)) for ask, model in asks]
            await asyncio.sleep(2)
            await asyncio.to_thread(disturb)
            return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


def is_ready(server: ServerProcess) -> bool:
    return httpx2.get(f"{server.address}/ready", timeout=30).status_code == 200


def find_busy_worker(server: ServerProcess) -> psutil.Process:
    """Return the worker that takes the most processor time."""
    workers = server.list_workers()
    before = {worker.pid: worker.cpu_times().user for worker in workers}
    time.sleep(1)
    return max(workers, key=lambda worker: worker.cpu_times().user - before[worker.pid])


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_fails_its_own_requests_alone_and_comes_back(server, fault):
    asks = [(SHORT, "first"), (SHORT, "second")]
    expected = send_all(server, asks, lambda: None)
    assert [answer.status for answer in expected] == [200, 200] and len(server.list_workers()) == 2
    answers = send_all(server, [(LONG, "first"), (LONG, "first")], lambda: find_busy_worker(server).send_signal(fault))
    assert [(answer.status, answer.code.partition(":")[0]) for answer in answers] == [(503, "engine_lost")] * 2
    # The other model draws meanwhile, and the first one too after a while
    assert send_all(server, asks[1:], lambda: None)[0].status == 200
    wait_for(lambda: is_ready(server))
    again = send_all(server, asks, lambda: None)
    assert [compare_images(*one.images, *other.images) for one, other in zip(expected, again, strict=True)] == [0, 0]
    assert len(server.list_workers()) == 2 and httpx2.get(f"{server.address}/health").status_code == 200


def test_a_cancelled_request_frees_its_worker(server):
    async def run() -> None:
        async with Client(server.address) as client:
            await client.send_and_leave(LONG, 3, model="first")

    asyncio.run(run())
    time.sleep(1)
    before = server.measure_usage().cpu_seconds
    time.sleep(2)
    assert server.measure_usage().cpu_seconds - before < 0.5


def test_workers_end_with_a_server_that_is_killed_or_told_to_stop(server, pipeline_folder):
    workers = server.list_workers()
    # A group's signal leaves the workers to the server
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    assert send_all(server, [(SHORT, "first")], lambda: None)[0].status == 200
    server.process.kill()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive and len(gone) == 2


def test_a_server_that_is_told_to_stop_ends_its_requests_and_leaves_no_process(pipeline_folder):
    with ServerProcess(str(pipeline_folder), "--device", "cpu", "--workers", "2", "--max-batch", "2") as server:
        workers = server.list_workers()
        asks = [(SHORT, pipeline_folder.name)] * 6
        status = []
        answers = send_all(server, asks, lambda: status.append(server.stop()))
        assert status == [0] and [answer.status for answer in answers] == [200] * 6
        assert not psutil.wait_procs(workers, timeout=10)[1]
