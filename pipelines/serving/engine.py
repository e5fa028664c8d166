"""The engine: steps of denoisers that run in several threads become one call of the network.

Every request runs an unchanged pipeline in a thread of its own. Where its prior or decoder would take a step, it waits
for the engine, which joins the steps of the requests whose turn it is (`take_ready_steps`). Requests may differ in
task, sampler, number of steps and guidance, for all of these act on one request's own rows.

Of models/emoji in 12 + 25 steps, a request's own part of a step takes 0.2 ms, the network's for eight 15 ms (AMD EPYC,
two cores, 2026-12-02). Equal requests that wait are not made one call: that would win 7 % at most.
"""

import copy
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from math import inf
from typing import Any

import torch
from t2i.pipelines.serving.rows import (
    DENOISERS,
    GATHERING_SECONDS,
    ROW_COUNTS,
    Drawing,
    EngineCounts,
    JoinedContexts,
    PreparedCondition,
    StepCall,
    count_rows,
    measure_work,
    round_up_rows,
    take_ready_steps,
)
from torch import Tensor

from t2i.diffusion.condition import Condition
from t2i.runtime.memory import is_out_of_memory

logger = logging.getLogger(__name__)

MERGED = ("prior", "decoder")  # an upsampler's steps are of windows of any size, and run alone
HEARTBEAT_SECONDS = 1.0
# An engine that is silent for longer hangs; or for so many times what the call of a network takes that runs
MAX_SILENCE_SECONDS, MAX_SILENCE_CALLS = 30.0, 4.0
MAX_CALL_SECONDS = 900.0  # that a call is expected to take; also the first one, of which nothing is known
CLOSING_SECONDS = 30.0


class Cancelled(RuntimeError):
    """End of a request between two steps, because it was cancelled or the engine was closed."""


class StepEngine:
    """Batches the steps of pipeline calls that run in several threads. Close it, or use it as a context manager.

    Args:
        pipeline: whose prior, decoder and upsampler the requests share. Calls from threads that did not join work as
            before.
        max_rows: of a call of a network; guidance takes two rows for an image.
        cores: that the networks compute with.
    """

    def __init__(self, pipeline: Any, max_rows: int = 32, cores: int = 1):
        self.pipeline, self.max_rows, self.cores = pipeline, max_rows, cores
        self.pipelines: dict[type, Any] = {type(pipeline): pipeline}  # by class, with the same components
        self.counts, self.last_heartbeat = EngineCounts(), time.monotonic()
        self.max_silence = MAX_SILENCE_SECONDS
        self.rates: dict[str, float] = {}  # of each network: the most seconds of a call by its `measure_work`
        self.drawings: set[Drawing] = set()
        # The lock guards all of the above. Each change notifies the engine, which wakes the one thread that it answers
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        # Held by the thread of the one request that does its own part of a step: small operations of several threads
        # would hand the interpreter to each other more often than they compute
        self.turn = threading.Lock()
        self.own = threading.local()  # .drawing: of a thread that joined
        self.contexts, self.closed = JoinedContexts(), False
        # The networks' own methods, which may be compiled ones, and in their place those that wait for the engine
        networks: dict[str, Any] = {name: getattr(pipeline, name, None) for name in DENOISERS}
        self.networks = {name: network for name, network in networks.items() if hasattr(network, "step")}
        self.methods = {name: (network.prepare, network.step) for name, network in self.networks.items()}
        for name, network in self.networks.items():
            network.prepare, network.step = partial(self.prepare, name), partial(self.step, name)
        self.thread = threading.Thread(target=self.run, name="t2i-engine", daemon=True)
        self.thread.start()

    @property
    def is_alive(self) -> bool:
        """True while the engine takes steps, or waits for some."""
        # Without the lock, which an engine that hangs may hold
        return time.monotonic() - self.last_heartbeat < self.max_silence

    def __enter__(self) -> "StepEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all requests, end the engine's thread, and give the networks their own methods back."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            for drawing in self.drawings:
                drawing.answered.notify()
            # Their next step ends them; until then it must be the engine's
            self.changed.wait_for(lambda: not self.drawings, CLOSING_SECONDS)
        self.thread.join()
        for network in self.networks.values():
            for method in ("prepare", "step"):
                network.__dict__.pop(method, None)

    # What a request's thread does

    @contextmanager
    def join(self, kind: type | None = None, cancelled: threading.Event | None = None) -> Iterator[Drawing]:
        """Enter a request of this thread. Its pipeline shares the networks, and nothing that calls change.

        kind: class of the pipeline; None is that of the engine's. cancelled: for `cancel`.
        """
        drawing = Drawing(self.copy_pipeline(kind), cancelled or threading.Event(), threading.Condition(self.lock))
        self.own.drawing = drawing
        torch.set_num_threads(1)  # the cores are the networks'
        with self.changed:
            self.drawings.add(drawing)
        try:
            yield drawing
        finally:
            self.own.drawing = None
            # Whatever keeps the loop over its steps alive, which ends the turn too
            self.set_turn(drawing, False)
            with self.changed:
                self.drawings.discard(drawing)
                self.changed.notify_all()

    def cancel(self, cancelled: threading.Event) -> None:
        """End the request that joined, or will join, with this event, before its next step; from any thread."""
        with self.changed:
            cancelled.set()
            for drawing in self.drawings:
                drawing.answered.notify()
            self.changed.notify_all()

    @contextmanager
    def step_aside(self) -> Iterator[None]:
        """Let the others take their steps while this thread does something else, such as decoding a preview."""
        drawing: Drawing | None = getattr(self.own, "drawing", None)
        if drawing is None:  # a thread that did not join
            yield
            return
        if self.must_end(drawing):
            raise Cancelled("cancelled between two steps")
        with self.set_stepping(False):
            yield

    def copy_pipeline(self, kind: type | None) -> Any:
        """Return a pipeline for one request: the same networks and schedulers, and its own flags and progress."""
        pipeline = copy.copy(self.get_pipeline(kind or type(self.pipeline)))
        # Past `__setattr__`, which would check all components again
        pipeline.__dict__["progress_bar"] = self.iterate_steps
        return pipeline

    def get_pipeline(self, kind: type) -> Any:
        """Return the pipeline of a class, with the same components, that all requests are copies of."""
        with self.changed:
            if kind not in self.pipelines:
                self.pipelines[kind] = kind.from_pipe(self.pipeline)  # type: ignore[attr-defined]
            return self.pipelines[kind]

    def iterate_steps(self, timesteps: Iterable) -> Iterator[Any]:
        """Yield timesteps, in the place of a progress bar. Between the first and the last, others wait for this one."""
        with self.set_stepping(True):
            yield from timesteps

    @contextmanager
    def set_stepping(self, stepping: bool) -> Iterator[None]:
        """Set whether the others have to wait for the next step of this thread's request."""
        drawing: Drawing = self.own.drawing
        with self.changed:
            before, drawing.is_stepping = drawing.is_stepping, stepping
            self.changed.notify_all()
        self.set_turn(drawing, stepping)
        try:
            yield
        finally:
            self.set_turn(drawing, before)
            with self.changed:
                drawing.is_stepping = before
                self.changed.notify_all()

    def set_turn(self, drawing: Drawing, has_turn: bool) -> None:
        """Wait for the turn, or end it, unless a request has it, or has it not, already."""
        if has_turn and not drawing.has_turn:
            self.turn.acquire()
        elif drawing.has_turn and not has_turn:
            self.turn.release()
        drawing.has_turn = has_turn

    def prepare(self, name: str, condition: Condition, *timesteps: Tensor) -> Any:
        """Stand for the network's `prepare`: the engine prepares the conditions of all requests at once."""
        drawing = getattr(self.own, "drawing", None)
        # The upsampler's steps, an autoregressive prior's codes, and a thread that did not join
        if name not in MERGED or not self.networks[name].needs_scheduler or drawing is None:
            return self.methods[name][0](condition, *timesteps)
        return PreparedCondition(drawing, condition, *timesteps)

    def step(self, name: str, x: Tensor, t: Tensor, context: Any) -> Tensor:
        """Stand for the network's `step`. Raises Cancelled, and whatever the network raises for these rows alone."""
        if not isinstance(context, PreparedCondition):
            with self.step_aside(), self.count_own_call(name, len(x)):
                return self.methods[name][1](x, t, context)
        # Steering takes gradients through a step, which another thread cannot record
        if torch.is_grad_enabled():
            return self.step_alone(name, x, t, context)
        # Here, so that an error in it is this request's own
        form = (name, x.shape[1:], x.dtype, context.form)
        call, drawing = StepCall(name, x, t, context, form), self.own.drawing
        self.set_turn(drawing, False)
        self.wait_for_step(call, drawing)
        self.set_turn(drawing, drawing.is_stepping)
        if call.error is not None:
            raise call.error
        assert call.result is not None
        return call.result

    def wait_for_step(self, call: StepCall, drawing: Drawing) -> None:
        """Wait until the engine has taken a step. Raises Cancelled."""
        with self.changed:
            if self.must_end(drawing):
                raise Cancelled("cancelled before a step")
            drawing.waiting = call
            self.changed.notify_all()
            # A step that runs is waited for, for its rows are in use
            drawing.answered.wait_for(lambda: call.done or (drawing.waiting is call and self.must_end(drawing)))
            drawing.waiting = None
            if self.must_end(drawing):
                self.counts.wasted_rows += len(call.x) if call.done else 0
                raise Cancelled("cancelled during a step")

    def must_end(self, drawing: Drawing) -> bool:
        """Return True for a request that was cancelled, and for all when the engine is closed."""
        return self.closed or drawing.cancelled.is_set()

    def step_alone(self, name: str, x: Tensor, t: Tensor, prepared: PreparedCondition) -> Tensor:
        """Take a step in this thread."""
        prepare, step = self.methods[name]
        if prepared.context is None:
            timesteps = [] if prepared.timesteps is None else [prepared.timesteps]
            with torch.no_grad():
                prepared.context = prepare(prepared.condition, *timesteps)
        with self.count_own_call(name, len(x)):
            return step(x, t, prepared.context)

    @contextmanager
    def count_own_call(self, name: str, rows: int) -> Iterator[None]:
        """Count a call of a network in this thread, if the thread joined and the call succeeds."""
        start = time.monotonic()
        yield
        if getattr(self.own, "drawing", None) is not None:
            with self.changed:
                self.counts.add_call(name, rows, time.monotonic() - start)

    # What the engine's thread does

    @torch.no_grad()
    def run(self) -> None:
        """Run the steps that requests wait for, until the engine is closed."""
        torch.get_num_threads()  # or the first product would take the number that was set last in any thread
        torch.set_num_threads(self.cores)
        while True:
            with self.changed:
                # Of those that are taken a cancelled request waits for the end
                while not self.closed and not (calls := take_ready_steps(self.drawings, time.monotonic())):
                    self.last_heartbeat = time.monotonic()
                    self.contexts.drop_idle(self.drawings)
                    is_idle = all(drawing.waiting is None for drawing in self.drawings)
                    self.changed.wait(HEARTBEAT_SECONDS if is_idle else GATHERING_SECONDS)
                if self.closed:
                    return
            # Without the lock, so that requests come and go while the networks run
            for group in self.build_groups(calls):
                self.run_group(group)
            del calls, group  # or requests that end would stay until the next step

    def build_groups(self, calls: list[StepCall]) -> list[list[StepCall]]:
        """Divide steps into calls of a network: of one network, of one form, of at most `max_rows` rows."""
        groups: dict[tuple, list[list[StepCall]]] = {}
        for call in sorted(calls, key=lambda call: id(call.prepared)):  # in the same order while they are the same
            batches = groups.setdefault(call.form, [[]])
            if batches[-1] and count_rows(batches[-1]) + len(call.x) > self.max_rows:
                batches.append([])
            batches[-1].append(call)
        return [batch for batches in groups.values() for batch in batches]

    def run_group(self, calls: list[StepCall]) -> None:
        """Run steps in one call, and hand each its rows. If that fails they run alone, or halved if memory is short."""
        # One request alone, of many images or candidates: no call takes more memory than a full batch
        if count_rows(calls) > self.max_rows:
            return self.run_halves(calls)
        is_short = False  # of memory
        try:
            with self.watch_call(calls):
                results: Iterable[Tensor] = self.call_network(calls)
        except BaseException as error:
            # Contexts take memory, which may be what is short
            self.contexts.clear()
            is_short = count_rows(calls) > 1 and is_out_of_memory(error)
            if is_short:
                logger.warning("%d rows do not fit into memory at once: %s", count_rows(calls), error)
            elif len(calls) == 1:
                self.finish_calls(calls, [None], error)
                return
        else:
            self.finish_calls(calls, results)
            return
        # Here the error, which keeps what the network allocated, is gone
        if is_short:
            self.run_halves(calls)
        else:
            # Each alone, so that only the request at fault fails
            for call in calls:
                self.run_group([call])

    def run_halves(self, calls: list[StepCall]) -> None:
        """Run half of the steps and then the others; of one step, half of its rows."""
        if len(calls) > 1:
            self.run_group(calls[: len(calls) // 2])
            self.run_group(calls[len(calls) // 2 :])
            return
        parts = calls[0].halve()
        for part in parts:
            self.run_group([part])
        error = next((part.error for part in parts if part.error is not None), None)
        results = [part.result for part in parts if part.result is not None]
        self.finish_calls(calls, [torch.cat(results) if error is None else None], error)

    @contextmanager
    def watch_call(self, calls: list[StepCall]) -> Iterator[None]:
        """Count a call of a network if it succeeds, and allow the engine to be silent while it runs."""
        name, rows, work, start = calls[0].denoiser, count_rows(calls), measure_work(calls), time.monotonic()
        # Images of another size may take much longer than all before
        expected = max(self.counts.longest, self.rates[name] * work if name in self.rates else inf)
        with self.changed:
            self.counts.running_rows = rows
            self.max_silence = max(MAX_SILENCE_SECONDS, MAX_SILENCE_CALLS * min(expected, MAX_CALL_SECONDS))
            self.last_heartbeat = start
        try:
            yield
            seconds = time.monotonic() - start
            with self.changed:
                self.counts.add_call(name, rows, seconds, round_up_rows(rows) - rows)
                self.counts.longest = max(self.counts.longest, seconds)
                self.rates[name] = max(self.rates.get(name, 0.0), seconds / work)
        finally:
            with self.changed:
                self.counts.running_rows = 0
                self.last_heartbeat, self.max_silence = time.monotonic(), MAX_SILENCE_SECONDS

    def finish_calls(
        self, calls: list[StepCall], results: Iterable[Tensor | None], error: BaseException | None = None
    ) -> None:
        """Wake the threads that wait for these steps."""
        with self.changed:
            for call, result in zip(calls, results):
                call.result, call.error, call.done = result, error, True
                call.prepared.owner.answered.notify()

    def call_network(self, calls: list[StepCall]) -> Iterator[Tensor]:
        """Return the rows of each step from one call of the network."""
        rows = count_rows(calls)
        added = round_up_rows(rows) - rows
        prepare, step = self.methods[calls[0].denoiser]
        context = self.contexts.get([call.prepared for call in calls], added, prepare)
        x, t = (torch.cat(parts) for parts in zip(*((call.x, call.t.expand(len(call.x))) for call in calls)))
        if added:
            # Any row will do: its result is cut off
            x, t = (torch.cat([part, part[-1:].expand(added, *part.shape[1:])]) for part in (x, t))
        result = step(x, t, context)
        return iter(result[:rows].split([len(call.x) for call in calls]))

    def warm_up(self, counts: Iterable[int] = ROW_COUNTS) -> None:
        """Take a step of prior and decoder with each number of rows up to `max_rows`, from the calling thread."""
        shapes = {"prior": (self.pipeline.clip.embed_dim,), "decoder": self.pipeline.latent_shape}
        for name in shapes.keys() & self.networks.keys():
            network = self.networks[name]
            if not network.needs_scheduler:
                continue
            for count in (count for count in counts if count <= self.max_rows):
                x = torch.zeros(count, *shapes[name], dtype=network.dtype, device=self.pipeline._execution_device)
                with self.join(), torch.no_grad(), self.set_stepping(True):
                    context = network.prepare(network.null(count))
                    network.step(x, torch.zeros(count, dtype=torch.long, device=x.device), context)
