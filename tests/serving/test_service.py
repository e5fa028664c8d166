"""The service: turns, positions in the queue, and time-outs, with a drawer that waits until it is told."""

import asyncio
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from t2i.pipelines.calls.progress import Preview
from t2i.pipelines.memory_needed import count_bytes_needed, count_fitting_pixels
from t2i.pipelines.serving.admission import Admission, QueueFull
from t2i.pipelines.serving.api.responses import explain_failure
from t2i.pipelines.serving.drawing import CheckedRequest, Drawer, DrawRequest, EngineLost, ModelFacts
from t2i.pipelines.serving.engine import Cancelled, EngineCounts, StepEngine
from t2i.pipelines.serving.events import Event
from t2i.pipelines.serving.pace import Forecast, Pace
from t2i.pipelines.serving.service import Job, Service

from t2i.errors import InputError


class WaitingDrawer:
    """A drawer whose requests end when `released` is set, and with Cancelled when they are cancelled."""

    is_alive, counts = True, EngineCounts()

    def __init__(self, max_pixels: float = 1e9):
        self.facts = ModelFacts(64, 4, max_pixels)
        self.released, self.drawn = threading.Event(), []

    def watch_room(self, report) -> None:
        report(self.facts.max_pixels)

    def check(self, request):
        if not self.released.wait(10):
            raise EngineLost("it hangs")
        return CheckedRequest([], {"decoder": 4})

    def draw(self, request, watch=None):
        self.drawn.append(request)
        while not self.released.wait(0.01):
            if request.cancelled.is_set():
                raise Cancelled("cancelled")
        return []

    def cancel(self, request) -> None:
        request.cancelled.set()

    def close(self) -> None:
        self.released.set()


def ask(seed: int, count: int = 1, **settings) -> DrawRequest:
    return DrawRequest("text", {"prompt": "a cat", **settings}, seed, count, progress=True)


async def wait_for_end(job: Job) -> list[Event]:
    """Return a job's events, of which the last one ends it."""
    events = [await asyncio.wait_for(job.events.get(), 10)]
    while events[-1].kind not in ("done", "failed"):
        events.append(await asyncio.wait_for(job.events.get(), 10))
    return events


def run_service(work, drawers: list, max_queued: int = 8, **options) -> None:
    """Run a coroutine function of a service whose drawers draw two images at a time."""

    async def run() -> None:
        service = Service("tiny", drawers, Admission(2, max_queued, lanes=len(drawers)), **options)
        try:
            await asyncio.wait_for(work(service), 20)
        finally:
            service.close()

    asyncio.run(run())


def test_waiting_requests_learn_their_position_and_the_seconds_left():
    drawer = WaitingDrawer()

    async def work(service: Service) -> None:
        service.admission.seconds_per_image = 3.0
        running, first, second = (service.submit(ask(seed, 2)) for seed in range(3))
        event = await second.events.get()
        # Two images wait before it, and those that draw are half done on average
        assert event == Event("queued", {"position": 2, "seconds": 9.0})
        assert (await first.events.get()).data == {"position": 0, "seconds": 3.0}
        service.cancel(first)
        service.cancel(first)  # one that has ended takes no harm
        assert isinstance((await wait_for_end(first))[-1].data["error"], Cancelled)
        assert (await second.events.get()).data == {"position": 0, "seconds": 3.0}
        drawer.released.set()
        assert [(await wait_for_end(job))[-1].kind for job in (running, second)] == ["done", "done"]
        assert not service.jobs and [request.seed for request in drawer.drawn] == [0, 2]

    run_service(work, [drawer])


def test_a_request_that_waits_too_long_is_ended_and_leaves_the_queue():
    async def work(service: Service) -> None:
        service.submit(ask(0, 2))
        late = service.submit(ask(1))
        error = (await wait_for_end(late))[-1].data["error"]
        assert isinstance(error, TimeoutError) and "0.1 seconds" in str(error)
        assert service.admission.queued_images == 0 and len(service.jobs) == 1

    run_service(work, [WaitingDrawer()], queue_timeout=0.1)


def test_a_request_that_is_refused_leaves_nothing_behind():
    async def work(service: Service) -> None:
        service.submit(ask(0, 2))
        with pytest.raises(QueueFull):
            service.submit(ask(1))
        assert len(service.jobs) == 1

    run_service(work, [WaitingDrawer()], max_queued=0)


def test_drawers_share_the_requests_and_a_cancelled_one_ends_in_its_own():
    drawers = [WaitingDrawer(), WaitingDrawer()]

    async def work(service: Service) -> None:
        jobs = [service.submit(ask(seed)) for seed in range(4)]
        while sum(len(drawer.drawn) for drawer in drawers) < 4:
            await asyncio.sleep(0.01)
        assert [sorted(request.seed for request in drawer.drawn) for drawer in drawers] == [[0, 2], [1, 3]]
        service.cancel(jobs[1])
        assert (await wait_for_end(jobs[1]))[-1].kind == "failed"
        for drawer in drawers:
            drawer.released.set()
        assert [(await wait_for_end(jobs[number]))[-1].kind for number in (0, 2, 3)] == ["done"] * 3

    run_service(work, drawers)


def test_checks_that_hang_hold_up_nothing_else():
    drawer = WaitingDrawer()

    async def work(service: Service) -> None:
        # More than there are threads in the event loop's own pool
        checks = [asyncio.create_task(service.check(ask(seed))) for seed in range(40)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 5), 5) == 5
        drawer.released.set()
        assert {check.stages["decoder"] for check in await asyncio.gather(*checks)} == {4}

    run_service(work, [drawer])


def test_another_drawer_checks_if_one_does_not_answer(monkeypatch):
    drawers = [WaitingDrawer(), WaitingDrawer()]
    monkeypatch.setattr(drawers[0].released, "wait", lambda seconds: False)
    drawers[1].released.set()

    async def work(service: Service) -> None:
        assert (await service.check(ask(0))).stages == {"decoder": 4}

    run_service(work, drawers)


def test_memory_admits_fewer_large_images():
    drawer = WaitingDrawer(max_pixels=2 * 64 * 64)

    async def work(service: Service) -> None:
        small, also_small = service.submit(ask(0)), service.submit(ask(1))
        assert small.ticket.is_admitted and also_small.ticket.is_admitted
        drawer.released.set()
        await wait_for_end(small)
        await wait_for_end(also_small)
        drawer.released.clear()
        service.submit(ask(2, width=128))
        assert not service.submit(ask(3)).ticket.is_admitted

    run_service(work, [drawer])


def test_pixels_count_sizes_margins_and_passes_of_the_upsampler():
    facts, image = ModelFacts(64, 4, 0.0), Image.new("RGB", (100, 50))
    assert ask(0, 3).count_pixels(facts) == 3 * 64 * 64
    assert ask(0, 2, width=32, height=16, upsample=1).count_pixels(facts) == 2 * 32 * 16 * 16
    assert DrawRequest("variation", {}, 0, inputs=[image]).count_pixels(facts) == 64 * 64
    assert DrawRequest("outpaint", {"left": 10, "top": 6}, 0, inputs=[image]).count_pixels(facts) == 110 * 56


def test_a_request_draws_and_enlarges_no_more_pixels_than_the_service_allows():
    drawer, large = WaitingDrawer(), Image.new("RGB", (1024, 256))
    drawer.released.set()

    async def work(service: Service) -> None:
        assert service.max_pixels == 512 * 512
        for allowed in (ask(0, 64), ask(0, upsample=2), DrawRequest("upsample", {"upsample": 1}, 0, inputs=[large])):
            await service.check(allowed)
        for refused, name in (
            (ask(0, 65), "n asks for 266,240"),
            (ask(0, width=1024, height=512), "width asks for 524,288"),
            (ask(0, upsample=3), "upsample asks for a last pass over 1,048,576"),
            (
                DrawRequest("upsample", {"upsample": 2}, 0, inputs=[large]),
                "upsample asks for a last pass over 4,194,304",
            ),
        ):
            with pytest.raises(InputError, match=f"^{name} pixels in all; this server takes at most 262,144"):
                await service.check(refused)

    run_service(work, [drawer])


def test_memory_is_counted_alike_inside_an_engine(pipeline):
    prior, decoder = pipeline.resolve_options()
    needed = count_bytes_needed(pipeline, prior, decoder, 2)
    with StepEngine(pipeline):
        assert count_bytes_needed(pipeline, prior, decoder, 2) == needed > 0
        pixels = count_fitting_pixels(pipeline)
        assert 1 < pixels < float("inf")
        assert count_fitting_pixels(pipeline, processes=4) < pixels / 2


def test_memory_that_is_short_is_said_and_may_be_there_later():
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError()):
        shown = explain_failure(error)
        assert (shown.status, shown.code) == (503, "out_of_memory") and int(shown.headers["retry-after"]) > 0
    assert explain_failure(ValueError("bad rows")).status == 500


def test_a_preview_that_does_not_fit_into_memory_is_left_out():
    shown = []
    drawer = SimpleNamespace(engine=SimpleNamespace(step_aside=nullcontext))
    watch = SimpleNamespace(report_step=lambda *step: None, show_preview=lambda number, images: shown.append(number))
    report = Drawer.build_preview_callback(drawer, DrawRequest("text", {}, 0, previews=2), watch)

    def fail() -> list:
        raise MemoryError

    for step in range(1, 10):
        report(Preview("decoder", step, 9, torch.zeros(1), fail if step < 5 else list))
    assert shown == [1]


def test_images_of_another_size_are_forecast_by_their_own_steps_alone():
    usual, stages = Pace(), {"prior": 2, "decoder": 4}
    for stage in stages:
        usual.learn(stage, 1.0)
    assert Forecast(usual, stages).report_step("prior", 1, 2, now=0.0) == 5.0
    large = Forecast(None, stages)
    assert large.report_step("decoder", 1, 4, now=0.0) is None
    assert large.report_step("decoder", 2, 4, now=50.0) == 100.0
    assert usual.seconds["decoder"] == 1.0
