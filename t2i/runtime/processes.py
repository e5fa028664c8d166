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

from t2i.errors import InputError, RunError, print_error_line

Result = TypeVar("Result")

HEARTBEAT_SECONDS = 1.0  # seconds between two signs of life
MAX_MISSED_HEARTBEATS = 3  # ticks without one, and a process is taken for dead
SIGNAL_REPEAT_SECONDS = (
    2.0  # seconds in which a signal may come again: launchers pass on what reached the whole group anyway
)
SIGNAL_GRACE_SECONDS = 5.0  # seconds for the others to come, once the launcher has asked us to end


def run_on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
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


def check_processes_agree(accelerator: Accelerator, what: dict[str, Any]) -> None:
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
        self.previous_handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {
                number: signal.signal(number, self.handle_signal) for number in (signal.SIGTERM, signal.SIGINT)
            }

    def handle_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self.time = number, now
        elif now - self.time > SIGNAL_REPEAT_SECONDS:
            os._exit(128 + number)

    def close(self) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


@dataclass
class Heartbeat:
    """What another process last told, and when that was new here."""

    beats: int
    waits: int
    seen_at: float


class ProcessWatch:
    """Ends a process that waits for one that is dead or hangs, and says which.

    One thread exchanges with the others, by the group's store, how often each has said that it lives and how many waits
    it has come to; a step itself tells nothing. The store is kept by process 0 or by the launcher and hangs with it,
    against which its timeouts are no help: so another thread judges, from what is known here. `guarded_wait()` is
    around
    everything that waits for the others. Does nothing in a run of one process.
    """

    def __init__(self, accelerator: Accelerator, stall_timeout: float, advice: Callable[[], str]):
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.stall_timeout, self.advice = stall_timeout, advice
        self.wait_count, self.beat_count, self.wait_started_at, self.end_requested_at, self.busy = 0, 0, 0.0, 0.0, False
        self.closed = threading.Event()
        now = time.monotonic()
        self.heartbeats = {rank: Heartbeat(0, 0, now) for rank in range(self.world) if rank != self.rank}
        self.store_answered_at = now  # the store, for the last time
        self.awake_since = now  # since when this process has not been stopped itself
        self.threads: list[threading.Thread] = []
        if self.world > 1:
            self.store = torch.distributed.distributed_c10d._get_default_store()
            self.publish_heartbeat()
            accelerator.wait_for_everyone()
            self.reader, self.writer = os.pipe()  # a signal arrives here also while the main thread is inside a kernel
            os.set_blocking(self.writer, False)
            self.wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
            self.threads = [
                threading.Thread(target=work, daemon=True) for work in (self.exchange_heartbeats, self.monitor_wait)
            ]
            for thread in self.threads:
                thread.start()

    @contextmanager
    def guarded_wait(self, busy: bool = False) -> Iterator[None]:
        """Around what cannot end before every process has come to the same place.

        busy: process 0 works there for as long as it takes, so that only its death counts.
        """
        if not self.threads:
            yield
            return
        self.wait_count += 1
        self.wait_started_at, self.busy = time.monotonic(), busy
        try:
            yield
        except RunError:
            raise
        except RuntimeError:  # the connection to a dead process breaks
            time.sleep((MAX_MISSED_HEARTBEATS + 2) * HEARTBEAT_SECONDS)  # until a dead one is silent for certain
            if gone := self.find_silent_processes():
                self.end_process(self.format_process_failure(gone, "died"))
            raise
        finally:
            self.wait_started_at = 0.0

    def exchange_heartbeats(self) -> None:
        """A thread: a sign of life every second; those of the others while the main thread waits for them."""
        while not self.closed.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(RuntimeError):  # the store ends with process 0
                self.publish_heartbeat()
                if self.wait_started_at:
                    self.poll_heartbeats()

    def publish_heartbeat(self) -> None:
        self.beat_count += 1
        self.store.set(f"t2i/{self.rank}", f"{self.beat_count} {self.wait_count}")

    def poll_heartbeats(self) -> None:
        values = self.store.multi_get([f"t2i/{rank}" for rank in self.heartbeats])
        self.store_answered_at = time.monotonic()
        for sign, value in zip(self.heartbeats.values(), values):
            lives, sign.waits = map(int, value.split())
            if lives != sign.beats:
                sign.beats, sign.seen_at = lives, self.store_answered_at

    def monitor_wait(self) -> None:
        """A thread: an eye on how long the main thread waits."""
        last = time.monotonic()
        while not self.closed.is_set():
            ready, _, _ = select.select([self.reader], [], [], HEARTBEAT_SECONDS)
            now = time.monotonic()
            if now - last > MAX_MISSED_HEARTBEATS * HEARTBEAT_SECONDS:  # the others may have been stopped with it
                self.awake_since = now
            last = now
            if ready and signal.SIGTERM in os.read(self.reader, 4096):
                self.end_requested_at = self.end_requested_at or time.monotonic()
            self.end_if_stalled()

    def end_if_stalled(self) -> None:
        now, since = time.monotonic(), self.wait_started_at
        if not since or self.closed.is_set():
            return
        start = max(since, self.awake_since)
        if (
            self.end_requested_at
            and now - max(start, self.end_requested_at) > SIGNAL_GRACE_SECONDS
            and (gone := self.find_silent_processes())
        ):
            self.end_process(self.format_process_failure(gone, "died"))
        elif now - start > self.stall_timeout and (not self.busy or self.find_silent_processes()):
            late = self.find_silent_processes() or [
                rank for rank, sign in self.heartbeats.items() if sign.waits < self.wait_count
            ]
            if self.wait_started_at == since:
                what = f"did not come within {self.stall_timeout:g} s (train.stall_timeout)"
                self.end_process(
                    self.format_process_failure(late, what)
                    if late
                    else f"the processes {what} of each other. {self.advice()}"
                )

    def find_silent_processes(self) -> list[int]:
        """The processes that have given no sign of life while this one waited; without process 0 no other can."""
        long_ago, start = (
            time.monotonic() - MAX_MISSED_HEARTBEATS * HEARTBEAT_SECONDS,
            max(self.wait_started_at, self.awake_since),
        )
        if max(self.store_answered_at, start) < long_ago:
            return [0] if self.rank else []
        return [rank for rank, sign in self.heartbeats.items() if max(sign.seen_at, start) < long_ago]

    def format_process_failure(self, ranks: list[int], what: str) -> str:
        names = ", ".join(map(str, ranks))
        return f"process {names} of {self.world} {what}, says process {self.rank}. {self.advice()}"

    def end_process(self, message: str) -> None:
        print_error_line(message)
        os._exit(1)

    def close(self) -> None:
        if self.threads:
            self.closed.set()
            signal.set_wakeup_fd(self.wakeup)
            os.write(self.writer, b"\0")
            for thread in self.threads:
                thread.join(MAX_MISSED_HEARTBEATS * HEARTBEAT_SECONDS)
            os.close(self.reader)
            os.close(self.writer)
            self.threads = []
