"""Rows of the calls of a network: the steps that they are of, which can be joined, and counts of what was done."""

import threading
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from t2i.diffusion.condition import Condition, count_up

# Row counts of a call. Others are rounded up by repeating a row, for oneDNN and compilers build code for each count.
ROW_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)

# Seconds of a call, for their spread
CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
MAX_CONTEXTS = 8  # joined ones that are kept
MAX_HELD_ROUNDS = 20  # of the engine, in which others go before a newcomer
MAX_PAUSED_ROUNDS = 60  # of the engine, in which prior steps go before a request's decoder steps, in all
GATHERING_SECONDS = 0.05  # after it joined, that a newcomer waits for one outside its steps
DENOISERS = ("prior", "decoder", "upsampler")


@dataclass(eq=False)
class PreparedCondition:
    """A condition of one request, and the timesteps that are prepared with it; the context of its steps."""

    owner: "Drawing"
    condition: Condition
    timesteps: Tensor | None = None
    context: Any = None  # of this condition alone, for steps that bypass the engine

    @cached_property
    def form(self) -> tuple:
        """Parts that conditions must have in common to be joined, and whether timesteps are prepared."""
        return (self.timesteps is not None, *list_parts(self.condition))

    @cached_property
    def halves(self) -> list["PreparedCondition"]:
        """Two conditions, of the first half of the rows and of the second, kept for all steps."""
        rows = count_up(len(self.condition)).chunk(2)
        return [PreparedCondition(self.owner, self.condition.take_rows(part), self.timesteps) for part in rows]


@dataclass(eq=False)
class StepCall:
    """A step that a request waits for."""

    denoiser: str
    x: Tensor
    t: Tensor
    prepared: PreparedCondition
    form: tuple  # what steps must have in common to be joined
    result: Tensor | None = None
    error: BaseException | None = None
    done: bool = False

    def halve(self) -> list["StepCall"]:
        """Return a step of the first half of the rows, and one of the second."""
        parts = zip(self.x.chunk(2), self.t.expand(len(self.x)).chunk(2), self.prepared.halves)
        return [replace(self, x=x, t=t, prepared=prepared) for x, t, prepared in parts]


@dataclass(eq=False)
class Drawing:
    """A request inside the engine. `pipeline` draws through the engine, in the thread that joined."""

    pipeline: Any
    cancelled: threading.Event  # its next step ends it; see `StepEngine.cancel`
    answered: threading.Condition  # wakes its thread alone
    is_stepping: bool = False  # it takes steps: the others wait for its next one
    has_turn: bool = False  # its thread does its own part of a step; see `StepEngine.turn`
    waiting: StepCall | None = None
    joined: float = field(default_factory=time.monotonic)
    has_stepped: bool = False
    held_rounds: int = 0  # in which it waited for its first prior step, and others went first
    paused_rounds: int = 0  # in which it waited for a decoder step, and prior steps went first


def take_ready_steps(drawings: Collection[Drawing], now: float) -> list[StepCall]:
    """Return the steps that are taken now, which wait no longer; none while a request is between two of them.

    Requests that arrive one by one would share few calls: some are in the prior, others in the decoder. So prior steps
    go first, for at most `MAX_PAUSED_ROUNDS` of a request. Newcomers, which wait for their first prior step, let the
    others go on until there are as many newcomers as others, for at most `MAX_HELD_ROUNDS`; and for a moment while
    another request is outside its steps.
    """
    waiting = {drawing: drawing.waiting for drawing in drawings if drawing.waiting is not None}
    if any(drawing.is_stepping and drawing not in waiting for drawing in drawings):
        return []
    of_prior = [drawing for drawing, call in waiting.items() if call.denoiser == "prior"]
    newcomers = [drawing for drawing in of_prior if not drawing.has_stepped]
    others = [drawing for drawing in waiting if drawing not in newcomers]
    is_few = len(newcomers) < len(others) and all(drawing.held_rounds < MAX_HELD_ROUNDS for drawing in newcomers)
    # A request outside its steps may begin, or leave its place to another that will
    may_grow = len(waiting) < len(drawings) and all(now - drawing.joined < GATHERING_SECONDS for drawing in newcomers)
    if is_few or may_grow:
        of_prior = [drawing for drawing in of_prior if drawing in others]
        for drawing in newcomers:
            drawing.held_rounds += bool(others)
    paused = [drawing for drawing in others if of_prior and drawing not in of_prior]
    for drawing in paused:
        drawing.paused_rounds += 1
    taken = of_prior + [drawing for drawing in paused if drawing.paused_rounds > MAX_PAUSED_ROUNDS] or others
    for drawing in taken:
        drawing.waiting, drawing.has_stepped = None, True
    return [waiting[drawing] for drawing in taken]


class JoinedContexts:
    """Contexts of the joined conditions of requests, kept while the same requests take steps together."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple, tuple[list[PreparedCondition], Any]] = OrderedDict()

    def get(self, members: list[PreparedCondition], added: int, prepare: Callable[..., Any]) -> Any:
        """Return the context of the joined conditions. It is computed anew when other requests take part.

        added: copies of the last row at the end. prepare: of the network.
        """
        key = (added, *map(id, members))
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key][1]
        condition = reduce(Condition.cat, (member.condition for member in members))
        if added:
            last = len(condition) - 1
            condition = condition.take_rows(torch.tensor([*range(last + 1), *[last] * added]))
        timesteps = [member.timesteps for member in members if member.timesteps is not None]
        context = prepare(condition, torch.cat(timesteps).unique()) if timesteps else prepare(condition)
        # The members are kept with it, so that their ids stay theirs
        self.kept[key] = (members, context)
        while len(self.kept) > MAX_CONTEXTS:
            self.kept.popitem(last=False)
        return context

    def clear(self) -> None:
        self.kept.clear()

    def drop_idle(self, owners: Collection[Any]) -> None:
        """Drop the contexts of requests that have ended, which take memory that others count on."""
        for key, (members, _) in list(self.kept.items()):
            if any(member.owner not in owners for member in members):
                del self.kept[key]


def count_rows(calls: list[StepCall]) -> int:
    return sum(len(call.x) for call in calls)


def measure_work(calls: list[StepCall]) -> int:
    """Return a measure of what a network's call takes at most: attention grows with the square of the cells."""
    return round_up_rows(count_rows(calls)) * calls[0].x.shape[2:].numel() ** 2


@dataclass
class EngineCounts:
    """Counts of the engine's work since it started, in JSON's types.

    rows_spread: calls of at most so many rows as `ROW_COUNTS` has, and of more than the one before; then of more than
    all. seconds_spread: the same of seconds of a call by `CALL_SECONDS`, for each network.
    """

    calls: int = 0  # of networks
    rows: int = 0  # that requests waited for
    added_rows: int = 0  # by rounding up
    wasted_rows: int = 0  # of requests that were cancelled while a step ran
    running_rows: int = 0  # of the call that runs now
    longest: float = 0.0  # seconds of a call by the engine's thread
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(DENOISERS, 0.0))
    rows_spread: list[int] = field(default_factory=lambda: [0] * (len(ROW_COUNTS) + 1))
    seconds_spread: dict[str, list[int]] = field(
        default_factory=lambda: {name: [0] * (len(CALL_SECONDS) + 1) for name in DENOISERS}
    )

    def add_call(self, denoiser: str, rows: int, seconds: float, added_rows: int = 0) -> None:
        """Count a call of a network that succeeded."""
        self.calls += 1
        self.rows += rows
        self.added_rows += added_rows
        self.seconds[denoiser] += seconds
        self.rows_spread[bisect_left(ROW_COUNTS, rows)] += 1
        self.seconds_spread[denoiser][bisect_left(CALL_SECONDS, seconds)] += 1

    def add(self, other: "EngineCounts") -> "EngineCounts":
        """Return the counts of two engines together."""
        names = ("calls", "rows", "added_rows", "wasted_rows", "running_rows")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return EngineCounts(
            **sums,
            longest=max(self.longest, other.longest),
            seconds={name: self.seconds[name] + other.seconds[name] for name in DENOISERS},
            rows_spread=add_lists(self.rows_spread, other.rows_spread),
            seconds_spread={
                name: add_lists(self.seconds_spread[name], other.seconds_spread[name]) for name in DENOISERS
            },
        )


def add_lists(first: list[int], second: list[int]) -> list[int]:
    return [one + other for one, other in zip(first, second, strict=True)]


def round_up_rows(rows: int) -> int:
    """Return the next number of `ROW_COUNTS`; beyond them the number itself."""
    return next((count for count in ROW_COUNTS if count >= rows), rows)


def list_parts(condition: Condition) -> list[Any]:
    """Return the names of a condition's parts, those of nested ones after theirs, and the shapes of unindexed ones."""
    parts: list[Any] = [type(condition)]
    for name, part in sorted(condition.parts.items()):
        parts.append(name)
        if isinstance(part, Condition):
            parts += list_parts(part)
        elif name in condition.unindexed:
            parts.append(tuple(part.shape[1:]))
    return parts
