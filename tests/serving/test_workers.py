"""Workers: a drawer in another process draws as one in this process does, and starts again when it dies or hangs."""

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from t2i.pipelines.jobs.planning import ModelSource
from t2i.pipelines.memory_needed import BatchTooLargeError
from t2i.pipelines.serving import worker as worker_module
from t2i.pipelines.serving import workers as workers_module
from t2i.pipelines.serving.admission import Admission
from t2i.pipelines.serving.api.responses import explain_failure
from t2i.pipelines.serving.draw_request import DrawRequest, ModelFacts
from t2i.pipelines.serving.drawing import CheckedRequest, DrawnImage, EngineLost
from t2i.pipelines.serving.engine import Cancelled, EngineCounts
from t2i.pipelines.serving.messages import decode_message, encode_message, pack_error, unpack_error
from t2i.pipelines.serving.server import ServerSettings, find_aliases
from t2i.pipelines.serving.worker import Worker
from t2i.pipelines.serving.workers import RemoteDrawer

from t2i.commands.serving import ServedModelFlags
from t2i.errors import InputError
from t2i.files.known_words import KnownWords

SOURCE = ModelSource("tiny", device="cpu")
RED = Image.new("RGB", (4, 2), (200, 30, 30))


class Seen:
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.steps, self.previews = [], []

    def report_step(self, stage: str, step: int, steps: int) -> None:
        self.steps.append((stage, step, steps))

    def show_preview(self, number: int, images: list[Image.Image]) -> None:
        self.previews.append((number, images))


class ScriptedDrawer:
    """A drawer that does what the prompt says."""

    facts = ModelFacts(64, 1, 1e6, known_words=KnownWords(frozenset({"cat"}), {"kitten": "cat"}))
    counts = EngineCounts(calls=3)
    is_alive = True

    def check(self, request: DrawRequest) -> CheckedRequest:
        if request.names[0] == "wrong":
            raise InputError("steps must be an integer")
        return CheckedRequest([f"{image.size} {image.mode}" for image in request.inputs[1:]], {"decoder": 25})

    def draw(self, request: DrawRequest, watch: Any) -> list[DrawnImage]:
        prompt = request.names[0]
        if prompt == "wrong":
            raise InputError("steps must be an integer")
        if prompt == "crash":
            raise ZeroDivisionError("by zero")
        if prompt == "wait":
            watch.report_step("decoder", 1, 9)
            if request.cancelled.wait(10):
                raise Cancelled("cancelled during a step")
        watch.report_step("decoder", 1, 1)
        watch.show_preview(0, [RED])
        return [DrawnImage(request.image or RED, {"prompt": prompt, "seed": request.seed}, request.seed)]

    def cancel(self, request: DrawRequest) -> None:
        request.cancelled.set()


class ThreadProcess:
    """A worker in a thread of this process, in the place of a process. kill: cuts its connection."""

    exitcode = -9

    def __init__(self, target: object, args: tuple, daemon: bool):
        self.connection = Connection(os.dup(args[0].fileno()))
        self.thread = threading.Thread(target=self.run, args=args[1:], daemon=True)

    def run(self, source: ModelSource, max_batch: int, processes: int) -> None:
        worker = Worker(self.connection)
        self.heart = worker.heart
        if source.model == "none":
            worker.send("broken", message="model 'none' is no folder")
            self.kill()
            return
        worker.drawer = ScriptedDrawer()
        worker.threads = ThreadPoolExecutor(max_batch)
        with suppress(EOFError, OSError):
            worker.send("ready", facts=worker.drawer.facts.pack())
            worker.receive()
        # A process's threads would end with it
        for request in list(worker.requests.values()):
            request.cancelled.set()

    def start(self) -> None:
        self.thread.start()

    def kill(self) -> None:
        with socket.socket(fileno=os.dup(self.connection.fileno())) as other, suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)

    def join(self, timeout: float | None = None) -> None:
        self.thread.join(timeout)
        # It ends by os._exit, which must be the test's until then
        self.heart.join(timeout)

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def in_threads(monkeypatch):
    """Workers are threads, and pauses are short."""
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=ThreadProcess)
    monkeypatch.setattr(workers_module.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(worker_module.os, "_exit", lambda status: None)
    monkeypatch.setattr(worker_module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(workers_module, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(workers_module, "FIRST_PAUSE_SECONDS", 0.05)


@pytest.fixture
def drawer(in_threads) -> Iterator[RemoteDrawer]:
    drawer = RemoteDrawer(SOURCE, max_batch=4)
    drawer.wait_until_ready()
    yield drawer
    drawer.close()


def ask(prompt: str, **more: Any) -> DrawRequest:
    """A request of a prompt, and of an image if it is given."""
    inputs = [prompt, *([more.pop("image")] if "image" in more else [])]
    return DrawRequest("text", {}, 7, inputs=inputs, names=[prompt], **more)


def draw_in_thread(drawer: Any, request: DrawRequest, watch: Any = None) -> tuple[threading.Thread, list]:
    """Return the thread that draws, and the list that gets what it returns or raises."""
    results: list = []

    def work() -> None:
        try:
            results.append(drawer.draw(request, watch))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, results


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def test_messages_keep_images_numbers_and_texts():
    mask = Image.frombytes("L", (3, 1), b"\x00\x7f\xff")
    sent = {"text": "é\ud800\n", "number": 0.1, "large": 2**60, "images": [RED, {"mask": mask}], "none": None}
    kind, found = decode_message(encode_message("draw", **sent))
    assert kind == "draw" and {name: found[name] for name in ("text", "number", "large", "none")} == {
        name: sent[name] for name in ("text", "number", "large", "none")
    }
    for one, other in ((found["images"][0], RED), (found["images"][1]["mask"], mask)):
        assert (one.mode, one.size, one.tobytes()) == (other.mode, other.size, other.tobytes())
    with pytest.raises(TypeError, match="takes no object"):
        encode_message("draw", value=object())


def test_a_remote_drawer_returns_images_and_reports_steps_and_previews(drawer):
    seen = Seen()
    (found,) = drawer.draw(ask("a cat", image=Image.new("RGB", (3, 3), "blue")), seen)
    assert found.record == {"prompt": "a cat", "seed": 7} and found.seed == 7
    assert found.image.tobytes() == Image.new("RGB", (3, 3), "blue").tobytes()
    assert seen.steps == [("decoder", 1, 1)] and seen.previews[0][1][0].tobytes() == RED.tobytes()
    assert drawer.facts.image_size == 64 and not drawer.answers
    wait_for(lambda: drawer.counts.calls == 3)


def test_a_remote_drawer_checks_requests_without_their_pixels(drawer):
    checked = drawer.check(ask("a cat", image=Image.new("RGB", (30, 20))))
    assert checked == CheckedRequest(["(30, 20) 1"], {"decoder": 25}) and not drawer.answers
    assert drawer.facts == ScriptedDrawer.facts
    with pytest.raises(InputError, match="steps must be an integer"):
        drawer.check(ask("wrong"))


def test_a_check_that_is_not_answered_ends(drawer, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(ScriptedDrawer, "check", lambda *_: released.wait(10) and CheckedRequest([], {}))
    monkeypatch.setattr(workers_module, "CHECK_SECONDS", 0.05)
    with pytest.raises(EngineLost, match="does not answer"):
        drawer.check(ask("a cat"))
    assert not drawer.answers
    # Of a worker that is silent already nothing is asked
    with monkeypatch.context() as patch:
        patch.setattr(drawer.link, "last_message", 0.0)
        patch.setattr(drawer.link, "send", None)
        with drawer.lock, pytest.raises(EngineLost, match="does not answer"):
            drawer.check(ask("a cat"))
    released.set()


def test_errors_of_a_worker_keep_their_kind(drawer):
    with pytest.raises(InputError, match="steps must be an integer"):
        drawer.draw(ask("wrong"))
    with pytest.raises(RuntimeError, match="ZeroDivisionError.*by zero"):
        drawer.draw(ask("crash"))


@pytest.mark.parametrize(
    "error",
    [
        BatchTooLargeError("a batch of 9 does not fit", 3),
        BatchTooLargeError("a batch of 1 does not fit", 0),
        InputError("steps must be an integer"),
        Cancelled("cancelled"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        MemoryError(),
        ValueError("bad rows"),
    ],
)
def test_clients_get_the_same_error_from_a_worker(error):
    here, there = explain_failure(error), explain_failure(unpack_error(pack_error(error)))
    assert (there.status, there.code, there.param) == (here.status, here.code, here.param)
    assert there.message == here.message or here.status == 500  # which has a number of its own


def test_a_cancelled_request_ends_in_the_worker(drawer):
    request, seen = ask("wait"), Seen()
    thread, results = draw_in_thread(drawer, request, seen)
    wait_for(lambda: seen.steps)
    drawer.cancel(request)
    thread.join(10)
    assert isinstance(results[0], Cancelled)
    # Also one that was cancelled before the worker knew it
    late = ask("wait")
    drawer.cancel(late)
    with pytest.raises(Cancelled):
        drawer.draw(late)


def test_a_worker_that_dies_fails_its_requests_and_is_started_again(drawer):
    admission = Admission(4, 4)
    drawer.watch_room(lambda pixels: admission.set_room(admission.lanes[0], pixels))
    seen = Seen()
    thread, results = draw_in_thread(drawer, ask("wait"), seen)
    wait_for(lambda: seen.steps)
    drawer.link.process.kill()
    thread.join(10)
    assert isinstance(results[0], EngineLost)
    # Meanwhile requests wait for it
    ticket = admission.enter(1)
    wait_for(lambda: ticket.is_admitted)
    assert drawer.starts == 2 and drawer.is_alive
    assert drawer.draw(ask("a cat"))[0].seed == 7


@pytest.mark.parametrize("silent", ["process", "engine"])
def test_a_worker_that_hangs_is_ended_and_started_again(drawer, monkeypatch, silent):
    link, seen = drawer.link, Seen()
    thread, results = draw_in_thread(drawer, ask("wait"), seen)
    wait_for(lambda: seen.steps)
    if silent == "process":
        monkeypatch.setattr(workers_module, "MAX_SILENCE_SECONDS", 0.2)
        monkeypatch.setattr(worker_module, "HEARTBEAT_SECONDS", 1.0)
    else:
        monkeypatch.setattr(ScriptedDrawer, "is_alive", False)
    thread.join(10)
    assert isinstance(results[0], EngineLost) and link.ended.is_set()
    monkeypatch.undo()


def test_a_model_that_cannot_be_loaded_is_said_in_its_own_words(in_threads):
    drawer = RemoteDrawer(ModelSource("none", device="cpu"), max_batch=4)
    with pytest.raises(InputError, match="model 'none' is no folder"):
        drawer.wait_until_ready()
    assert not drawer.is_alive
    with pytest.raises(EngineLost):
        drawer.draw(ask("a cat"))
    drawer.close()


def test_several_models_have_names_and_share_devices(tmp_path):
    (tmp_path / "a=b").mkdir()
    several = ServedModelFlags(model=["small=models/a", "large=owner/b"], device="cuda:0,cuda:1")
    assert several.named_models == (("small", "models/a"), ("large", "owner/b"))
    assert several.devices == ("cuda:0", "cuda:1") and several.build().model == "models/a"
    # A folder alone is one model, whatever its name
    alone = ServedModelFlags(model=[str(tmp_path / "a=b")])
    assert alone.named_models == () and alone.build().model == str(tmp_path / "a=b")
    assert ServedModelFlags().named_models == () and ServedModelFlags().build().model.endswith("emoji")


@pytest.mark.parametrize(
    ("models", "message"),
    [(["models/a", "models/b"], "model 'models/a' has no name"), (["a=x", "a=y"], "model 'a' is given twice")],
)
def test_models_without_a_name_of_their_own_are_refused(models, message):
    with pytest.raises(InputError, match=message):
        _ = ServedModelFlags(model=models).named_models


def test_aliases_stand_for_the_first_model_or_the_one_they_name():
    settings = ServerSettings(aliases=("dall-e-2", "big=large"))
    assert find_aliases(settings, ["small", "large"]) == {"dall-e-2": "small", "big": "large"}
    with pytest.raises(InputError, match="alias 'x=none' names no model; there are small"):
        find_aliases(ServerSettings(aliases=("x=none",)), ["small"])
