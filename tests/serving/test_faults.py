"""Faults of real processes: workers and servers that are killed, stopped or told to end while they draw."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.serving.load.client import Answer, Ask, Client, compare_images
from tests.serving.load.process import ServerProcess, list_worker_processes

pytestmark = pytest.mark.slow


def ask_for(steps: int) -> Ask:
    return Ask("generations", (("prompt", "a red circle"), ("seed", 1), ("steps", steps), ("prior_steps", 3)))


SHORT, MIDDLE, LONG = ask_for(3), ask_for(300), ask_for(900)


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


def send_all(
    server: ServerProcess, asks: list[tuple[Ask, str]], disturb: Callable[[], object] | None = None, pause: float = 2.0
) -> list[Answer]:
    """Send requests to models at the same time, do something while they are drawn, and return the answers.

    disturb: is called. pause: seconds before it is.
    """

    async def run() -> list[Answer]:
        async with Client(server.address) as client:
            tasks = [asyncio.create_task(client.send(ask, model=model)) for ask, model in asks]
            if disturb is not None:
                await asyncio.sleep(pause)
                await asyncio.to_thread(disturb)
            return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


def get_status(server: ServerProcess, path: str) -> int:
    return httpx2.get(f"{server.address}/{path}", timeout=5).status_code


def count_images(server: ServerProcess) -> tuple[float, float]:
    """Return how many images are drawn now, and how many wait."""
    return server.read_metric("t2i_running_pictures"), server.read_metric("t2i_queue_pictures")


def is_gone(process: psutil.Process) -> bool:
    """Return True for a process that has ended; nobody may have asked for its status yet."""
    with suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def find_busy_worker(server: ServerProcess) -> psutil.Process:
    """Return the worker that takes the most processor time."""
    workers = server.list_workers()
    before = {worker.pid: worker.cpu_times().user for worker in workers}
    time.sleep(1)
    return max(workers, key=lambda worker: worker.cpu_times().user - before[worker.pid])


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_fails_its_own_requests_alone_and_comes_back(server, fault):
    asks = [(SHORT, "first"), (SHORT, "second")]
    expected = send_all(server, asks)
    assert [answer.status for answer in expected] == [200, 200] and len(server.list_workers()) == 2

    def disturb() -> None:
        find_busy_worker(server).send_signal(fault)
        if fault == signal.SIGSTOP:
            # The server answers what it can, and lets nobody wait for a worker that does not
            assert [get_status(server, path) for path in ("health", "ready", "v1/models")] == [200] * 3
            found = send_all(server, asks)
            assert [answer.status for answer in found] == [503, 200] and found[0].seconds < 20

    answers = send_all(server, [(LONG, "first"), (LONG, "first")], disturb)
    assert [(answer.status, answer.code.partition(":")[0]) for answer in answers] == [(503, "engine_lost")] * 2
    # The other model draws meanwhile, and the first one too after a while
    assert send_all(server, asks[1:])[0].status == 200
    wait_for(lambda: len(server.list_workers()) == 2 and get_status(server, "ready") == 200)
    again = send_all(server, asks)
    assert [compare_images(*one.images, *other.images) for one, other in zip(expected, again, strict=True)] == [0, 0]
    assert get_status(server, "health") == 200


def test_a_cancelled_request_frees_its_worker(server):
    async def run() -> None:
        async with Client(server.address) as client:
            await client.send_and_leave(LONG, 3, model="first")

    asyncio.run(run())
    time.sleep(1)
    before = server.measure_usage().cpu_seconds
    time.sleep(2)
    assert server.measure_usage().cpu_seconds - before < 0.5


def test_workers_end_with_their_server_alone_and_at_once_if_it_is_killed(server):
    workers = server.list_workers()
    # A group's signal leaves the workers to the server
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    assert send_all(server, [(SHORT, "first")])[0].status == 200
    # One that is stopped cannot notice it itself
    workers[0].suspend()
    server.process.kill()
    wait_for(lambda: all(map(is_gone, workers)), 30)


def test_workers_that_load_their_model_end_with_a_server_that_is_killed(pipeline_folder):
    command = [sys.executable, "-m", "t2i", "serve", "--model", str(pipeline_folder), "--port", "0"]
    process = subprocess.Popen([*command, "--device", "cpu", "--workers", "2"], stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list_worker_processes(process.pid)) == 2)
    workers = list_worker_processes(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: all(map(is_gone, workers)))  # at the latest when they have imported what they need


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_answers_all_it_has_and_leaves_no_process(pipeline_folder, number):
    options = ["--device", "cpu", "--workers", "2", "--max-batch", "4", "--drain", "600"]
    with ServerProcess(str(pipeline_folder), *options) as server:
        workers = server.list_workers()
        refused: list[httpx2.Response] = []

        def stop() -> None:
            wait_for(lambda: count_images(server) == (8, 8), 60)
            if number == signal.SIGINT:  # a terminal sends it to all
                os.killpg(server.process.pid, number)
            else:
                server.process.send_signal(number)
            wait_for(lambda: get_status(server, "ready") == 503, 10)
            assert get_status(server, "health") == 200
            refused.append(httpx2.post(f"{server.address}/v1/images/generations", **SHORT.build(), timeout=60))
            assert server.process.wait(600) == 0

        answers = send_all(server, [(MIDDLE, pipeline_folder.name)] * 16, stop, pause=0)
        assert [answer.status for answer in answers] == [200] * 16
        assert refused[0].json()["error"]["code"] == "shutting_down" and refused[0].headers["x-should-retry"] == "true"
        wait_for(lambda: all(map(is_gone, workers)), 10)


@pytest.mark.parametrize(("drain", "signals"), [("600", 2), ("0.5", 1)], ids=["told twice", "out of time"])
def test_a_server_that_may_not_wait_ends_its_requests_with_an_error(pipeline_folder, drain, signals):
    def listen(server: ServerProcess) -> list[str]:
        """The lines of a stream."""
        url, body = f"{server.address}/v1/images/generations", LONG.build(stream=True)
        with httpx2.stream("POST", url, **body, timeout=120) as answer:
            return list(answer.iter_lines())

    options = ["--device", "cpu", "--max-batch", "4", "--drain", drain]
    with ServerProcess(str(pipeline_folder), *options) as server, ThreadPoolExecutor(1) as pool:
        streamed = pool.submit(listen, server)
        wait_for(lambda: count_images(server) == (1, 0), 60)

        def stop() -> None:
            wait_for(lambda: count_images(server) == (4, 4), 60)
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
            assert server.process.wait(30) == 0

        answers = send_all(server, [(LONG, pipeline_folder.name)] * 7, stop, pause=0)
        assert [(answer.status, answer.code.partition(":")[0]) for answer in answers] == [(503, "shutting_down")] * 7
        lines = streamed.result()
        event = json.loads(lines[lines.index("event: error") + 1].removeprefix("data: "))
        assert event["error"]["code"] == "shutting_down"
