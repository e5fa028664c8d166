"""Coordination of the processes of one run: equal inputs, shared decisions, and the name of a process that died."""

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

HEARTBEAT_SECONDS = 1.0  # between two heartbeats
MAX_MISSED_HEARTBEATS = 3  # before a process counts as dead
SIGNAL_REPEAT_SECONDS = 2.0  # a launcher may pass on a signal that reached the whole group already
SIGNAL_GRACE_SECONDS = 5.0  # for the other processes to arrive after SIGTERM


def run_on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Run `function` on the main process, and return its result on every process.

    An InputError, RunError or OSError of the function is raised on every process.
    """
    outcome: list[Any] = [None, None]  # the result and the error
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


def check_processes_agree(accelerator: Accelerator, values: dict[str, Any]) -> None:
    """Check that every process was given the same values. Raises InputError with the first that differs."""
    if accelerator.num_processes == 1:
        return
    # Every process compares all values, so that all of them raise the same error
    gathered: list[dict[str, Any]] = [{}] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, values)
    first = gathered[0]
    for rank, other in enumerate(gathered):
        for name in sorted({**first, **other}):
            if other.get(name) != first.get(name):
                raise InputError(
                    f"process {rank} has {name}={other.get(name)!r}, process 0 has {first.get(name)!r}; "
                    "all processes of a run need the same configuration and data"
                )


class StopRequest:
    """A handler of SIGTERM and Ctrl-C: the first one asks the run to save and end, a later one ends it at once.

    signal: number of the signal; 0 if none has arrived.
    """

    def __init__(self) -> None:
        self.signal, self.time = 0, 0.0
        self.previous_handlers: dict[int, Any] = {}
        # Python allows handlers in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous_handlers[number] = signal.signal(number, self.handle_signal)

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
    """The last values that another process has published."""

    beats: int
    waits: int  # how many guarded waits it has entered
    seen_at: float  # when `beats` last changed, by this process's clock


class ProcessWatch:
    """A watch that ends this process if it waits for one that died or hangs, and names that process.

    Every process publishes its heartbeats and its number of waits in the group's store; training steps publish nothing.
    Process 0 or the launcher serves the store, and the store's own timeouts fail if that server hangs. So there are two
    threads: one talks to the store, the other judges from what the first has read. Put `guard_wait` around every
    call that waits for other processes. In a run of one process it does nothing.

    Args:
        stall_timeout: seconds of waiting after which a living process counts as hanging.
        advice: returns a sentence for the end of the error message.
    """

    def __init__(self, accelerator: Accelerator, stall_timeout: float, advice: Callable[[], str]):
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.stall_timeout, self.advice = stall_timeout, advice
        self.wait_count, self.beat_count, self.busy = 0, 0, False
        self.wait_started_at, self.end_requested_at = 0.0, 0.0  # 0 if there is no wait, no SIGTERM
        self.closed = threading.Event()
        now = time.monotonic()
        self.heartbeats = {rank: Heartbeat(0, 0, now) for rank in range(self.world) if rank != self.rank}
        self.store_answered_at = now
        self.awake_since = now  # a stopped process (SIGSTOP) must not blame the others for the time that it lost
        self.threads: list[threading.Thread] = []
        if self.world > 1:
            self.store = torch.distributed.distributed_c10d._get_default_store()
            self.publish_heartbeat()
            accelerator.wait_for_everyone()
            # A Python handler waits until the main thread leaves its kernel; the wakeup pipe gets a signal at once.
            self.reader, self.writer = os.pipe()
            os.set_blocking(self.writer, False)
            self.previous_wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
            for target in (self.exchange_heartbeats, self.monitor_wait):
                self.threads.append(threading.Thread(target=target, daemon=True))
                self.threads[-1].start()

    @contextmanager
    def guard_wait(self, busy: bool = False) -> Iterator[None]:
        """Watch the other processes while this one waits until all have reached the same place.

        busy: process 0 works for an unknown time there, so only a death ends the wait.
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
        except RuntimeError:
            # The connection to a dead process breaks. Wait until the dead one is surely silent, to name it.
            time.sleep((MAX_MISSED_HEARTBEATS + 2) * HEARTBEAT_SECONDS)
            if silent := self.find_silent_processes():
                self.end_process(silent, "died")
            raise
        finally:
            self.wait_started_at = 0.0

    # The thread that talks to the store

    def exchange_heartbeats(self) -> None:
        """Publish a heartbeat every second; poll those of the others while the main thread waits."""
        while not self.closed.wait(HEARTBEAT_SECONDS):
            # The store ends with process 0.
            with contextlib.suppress(RuntimeError):
                self.publish_heartbeat()
                if self.wait_started_at:
                    self.poll_heartbeats()

    def publish_heartbeat(self) -> None:
        self.beat_count += 1
        self.store.set(f"t2i/{self.rank}", f"{self.beat_count} {self.wait_count}")

    def poll_heartbeats(self) -> None:
        values = self.store.multi_get([f"t2i/{rank}" for rank in self.heartbeats])
        self.store_answered_at = time.monotonic()
        for heartbeat, value in zip(self.heartbeats.values(), values):
            beats, heartbeat.waits = map(int, value.split())
            if beats != heartbeat.beats:
                heartbeat.beats, heartbeat.seen_at = beats, self.store_answered_at

    # The thread that judges

    def monitor_wait(self) -> None:
        """Check every second, and after every signal, for how long the main thread has waited."""
        last = time.monotonic()
        while not self.closed.is_set():
            ready, _, _ = select.select([self.reader], [], [], HEARTBEAT_SECONDS)
            now = time.monotonic()
            # A gap means that this process was stopped, and perhaps the others too.
            if now - last > MAX_MISSED_HEARTBEATS * HEARTBEAT_SECONDS:
                self.awake_since = now
            last = now
            if ready and signal.SIGTERM in os.read(self.reader, 4096):
                self.end_requested_at = self.end_requested_at or now
            self.check_wait()

    def check_wait(self) -> None:
        """End this process if another one died after SIGTERM, or is late after the stall timeout."""
        now, wait = time.monotonic(), self.wait_started_at
        if not wait or self.closed.is_set():
            return
        # Time in which this process was stopped does not count against the others
        start = max(wait, self.awake_since)
        silent = self.find_silent_processes()
        asked_to_end = self.end_requested_at and now - max(start, self.end_requested_at) > SIGNAL_GRACE_SECONDS
        stalled = now - start > self.stall_timeout and (silent or not self.busy)
        # If the wait has ended meanwhile, `silent` may be wrong.
        if self.wait_started_at != wait:
            return
        if asked_to_end and silent:
            self.end_process(silent, "died")
        elif stalled:
            late = silent or [rank for rank, other in self.heartbeats.items() if other.waits < self.wait_count]
            self.end_process(late, f"did not arrive within {self.stall_timeout:g} s (train.stall_timeout)")

    def find_silent_processes(self) -> list[int]:
        """Return the ranks without a heartbeat during this wait; rank 0 if the store, which it serves, is silent."""
        long_ago = time.monotonic() - MAX_MISSED_HEARTBEATS * HEARTBEAT_SECONDS
        start = max(self.wait_started_at, self.awake_since)
        if max(self.store_answered_at, start) < long_ago:
            return [0] if self.rank else []
        return [rank for rank, other in self.heartbeats.items() if max(other.seen_at, start) < long_ago]

    def end_process(self, ranks: list[int], reason: str) -> None:
        """Exit at once, with a line that names the processes of these ranks as the cause, if there are any."""
        failure = f"the processes {reason}"
        if ranks:
            names = ", ".join(map(str, ranks))
            failure = f"process {names} of {self.world} {reason}, as seen by process {self.rank}"
        print_error_line(f"{failure}. {self.advice()}")
        os._exit(1)

    def close(self) -> None:
        """Stop the threads, and give signals back to the previous wakeup file."""
        if self.threads:
            self.closed.set()
            signal.set_wakeup_fd(self.previous_wakeup)
            os.write(self.writer, b"\0")
            for thread in self.threads:
                thread.join(MAX_MISSED_HEARTBEATS * HEARTBEAT_SECONDS)
            os.close(self.reader)
            os.close(self.writer)
            self.threads = []
