"""What the processes of one run owe each other: the same inputs, the same decisions, and a word when one is gone."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from t2i.errors import InputError, RunError, complain

Result = TypeVar("Result")

TICK = 1.0  # seconds between two signs of life
SILENCE = 3  # ticks without one, and a process is taken for dead
REPEATED = 2.0  # seconds in which a signal may come again: launchers pass on what reached the whole group anyway
AFTER_SIGNAL = 5.0  # seconds for the others to come, once the launcher has asked us to end


def on_main(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """`function()` of the main process, on every process; its InputError, RunError or OSError too."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (InputError, RunError, OSError) as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def check_same(accelerator: Accelerator, what: dict[str, Any]) -> None:
    """Refuse to start if the processes were given different things."""
    if accelerator.num_processes == 1:
        return
    everyone: list[dict[str, Any]] = [{}] * accelerator.num_processes
    torch.distributed.all_gather_object(everyone, what)
    for rank, other in enumerate(everyone):
        for name in sorted({**everyone[0], **other}):
            if other.get(name) != (value := everyone[0].get(name)):
                raise InputError(
                    f"process {rank} has {name}={other.get(name)!r}, process 0 has {value!r}; "
                    "all processes of a run need the same configuration and data"
                )


class StopRequest:
    """Whether SIGTERM or Ctrl-C has asked this process to save and end. A second one, later, ends it at once."""

    def __init__(self) -> None:
        self.signal, self.time = 0, 0.0
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self.time = number, now
        elif now - self.time > REPEATED:
            os._exit(128 + number)

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@dataclass
class Sign:
    """What another process last told, and when that was new here."""

    lives: int
    reached: int
    new: float


class Watch:
    """Ends a process that waits for one that is dead or hangs, and says which.

    One thread exchanges with the others, by the group's store, how often each has said that it lives and how many waits
    it has come to; a step itself tells nothing. The store is kept by process 0 or by the launcher and hangs with it,
    against which its timeouts are no help: so another thread judges, from what is known here. `waiting()` is around
    everything that waits for the others. Does nothing in a run of one process.
    """

    def __init__(self, accelerator: Accelerator, stall_timeout: float, advice: Callable[[], str]):
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.stall_timeout, self.advice = stall_timeout, advice
        self.place, self.beat, self.since, self.asked_to_end, self.busy = 0, 0, 0.0, 0.0, False
        self.closed = threading.Event()
        now = time.monotonic()
        self.signs = {rank: Sign(0, 0, now) for rank in range(self.world) if rank != self.rank}
        self.answered = now  # the store, for the last time
        self.awake = now  # since when this process has not been stopped itself
        self.threads: list[threading.Thread] = []
        if self.world > 1:
            self.store = torch.distributed.distributed_c10d._get_default_store()
            self.tell()
            accelerator.wait_for_everyone()
            self.reader, self.writer = os.pipe()  # a signal arrives here also while the main thread is inside a kernel
            os.set_blocking(self.writer, False)
            self.wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
            self.threads = [threading.Thread(target=work, daemon=True) for work in (self.exchange, self.look)]
            for thread in self.threads:
                thread.start()

    @contextmanager
    def waiting(self, busy: bool = False) -> Iterator[None]:
        """Around what cannot end before every process has come to the same place.

        busy: process 0 works there for as long as it takes, so that only its death counts.
        """
        if not self.threads:
            yield
            return
        self.place += 1
        self.since, self.busy = time.monotonic(), busy
        try:
            yield
        except RunError:
            raise
        except RuntimeError:  # the connection to a dead process breaks
            time.sleep((SILENCE + 2) * TICK)  # until a dead one is silent for certain
            if gone := self.silent():
                self.end(self.describe(gone, "died"))
            raise
        finally:
            self.since = 0.0

    def exchange(self) -> None:
        """A thread: a sign of life every second; those of the others while the main thread waits for them."""
        while not self.closed.wait(TICK):
            with contextlib.suppress(RuntimeError):  # the store ends with process 0
                self.tell()
                if self.since:
                    self.ask()

    def tell(self) -> None:
        self.beat += 1
        self.store.set(f"t2i/{self.rank}", f"{self.beat} {self.place}")

    def ask(self) -> None:
        values = self.store.multi_get([f"t2i/{rank}" for rank in self.signs])
        self.answered = time.monotonic()
        for sign, value in zip(self.signs.values(), values):
            lives, sign.reached = map(int, value.split())
            if lives != sign.lives:
                sign.lives, sign.new = lives, self.answered

    def look(self) -> None:
        """A thread: an eye on how long the main thread waits."""
        last = time.monotonic()
        while not self.closed.is_set():
            ready, _, _ = select.select([self.reader], [], [], TICK)
            now = time.monotonic()
            if now - last > SILENCE * TICK:  # the others may have been stopped with it
                self.awake = now
            last = now
            if ready and signal.SIGTERM in os.read(self.reader, 4096):
                self.asked_to_end = self.asked_to_end or time.monotonic()
            self.judge()

    def judge(self) -> None:
        now, since = time.monotonic(), self.since
        if not since or self.closed.is_set():
            return
        start = max(since, self.awake)
        if self.asked_to_end and now - max(start, self.asked_to_end) > AFTER_SIGNAL and (gone := self.silent()):
            self.end(self.describe(gone, "died"))
        elif now - start > self.stall_timeout and (not self.busy or self.silent()):
            late = self.silent() or [rank for rank, sign in self.signs.items() if sign.reached < self.place]
            if self.since == since:
                what = f"did not come within {self.stall_timeout:g} s (train.stall_timeout)"
                self.end(self.describe(late, what) if late else f"the processes {what} of each other. {self.advice()}")

    def silent(self) -> list[int]:
        """The processes that have given no sign of life while this one waited; without process 0 no other can."""
        long_ago, start = time.monotonic() - SILENCE * TICK, max(self.since, self.awake)
        if max(self.answered, start) < long_ago:
            return [0] if self.rank else []
        return [rank for rank, sign in self.signs.items() if max(sign.new, start) < long_ago]

    def describe(self, ranks: list[int], what: str) -> str:
        names = ", ".join(map(str, ranks))
        return f"process {names} of {self.world} {what}, says process {self.rank}. {self.advice()}"

    def end(self, message: str) -> None:
        complain(message)
        os._exit(1)

    def close(self) -> None:
        if self.threads:
            self.closed.set()
            signal.set_wakeup_fd(self.wakeup)
            os.write(self.writer, b"\0")
            for thread in self.threads:
                thread.join(SILENCE * TICK)
            os.close(self.reader)
            os.close(self.writer)
            self.threads = []
